"""Weights come back from a checkpoint, all of them, under whatever names and shapes transformers saved them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import arguments, largest_difference, often, samples
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, TrainerCallback

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.checks import tiny
from hf_hetero.errors import ConfigError
from hf_hetero.trainer.checkpoints.restoring import is_saved_otherwise, restore

CONVERTED = ("qwen3_moe", "gemma3", "nemotron_h", "glm4_moe")
"""Experts one by one; other names of parts; both."""
AS_THEY_ARE = ("llama", "gemma2")
NUM_STEPS = 4


def a_model(model_type: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = tiny.build(tiny.shrunk(CONFIG_MAPPING[model_type]()), "cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1)
    return model


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == NUM_STEPS // 2


def run(
    model: Any,
    folder: Path,
    resume: str | None = None,
    trainer_class: type[HeteroTrainer] = HeteroTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> None:
    trainer = trainer_class(
        model=model,
        args=arguments(str(folder), 1, 4, **{"max_steps": NUM_STEPS, "optim": "adamw_torch", **changes}),
        train_dataset=samples([5 + 3 * n % 17 for n in range(4 * NUM_STEPS)], vocab=32),
        eval_dataset=samples([7, 11], vocab=32),
        callbacks=list(callbacks),
        hetero=HeteroConfig(solver="fast"),
    )
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("model_type", often(CONVERTED, "qwen3_moe"))
def test_a_resumed_run_has_the_weights_of_the_whole_one(tmp_path: Path, model_type: str) -> None:
    """To the bit, in a process that begins with other weights, as each does whose model is made by chance."""
    whole = a_model(model_type)
    run(whole, tmp_path / "whole")
    begun = a_model(model_type)
    run(begun, tmp_path / "parts", callbacks=[StopAt()], save_strategy="steps", save_steps=1000)
    resumed = a_model(model_type, seed=1)
    run(resumed, tmp_path / "parts", resume=str(tmp_path / "parts" / f"checkpoint-{NUM_STEPS // 2}"))
    assert largest_difference(weights_of(resumed), weights_of(whole)) == 0
    assert largest_difference(weights_of(begun), weights_of(whole)) > 1e-5  # what is compared does move


class Worsening(HeteroTrainer):
    """Each evaluation is worse than the one before."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": float(self.state.global_step)}


def test_the_best_model_is_the_one_that_was_saved(tmp_path: Path) -> None:
    """Experts, too, are again what they were when the best model was saved."""
    model, seen = a_model("qwen3_moe"), list[dict[str, torch.Tensor]]()

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights_of(model))

    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    run(model, tmp_path, trainer_class=Worsening, callbacks=[Watch()], **steps, **best)
    assert largest_difference(weights_of(model), seen[0]) == 0
    assert largest_difference(weights_of(model), seen[-1]) > 1e-5


@pytest.mark.parametrize("model_type", AS_THEY_ARE)
def test_what_is_saved_as_it_is_is_left_to_trainer(tmp_path: Path, model_type: str) -> None:
    model = a_model(model_type)
    model.save_pretrained(tmp_path)
    assert not is_saved_otherwise(model, tmp_path)


def test_a_part_of_ones_own_is_read_under_its_name(tmp_path: Path) -> None:
    """Trainer saves what was added to a model, and `from_pretrained` does not know it."""
    model = a_model("qwen3_moe")
    model.score = torch.nn.Linear(3, 2)
    before = weights_of(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert is_saved_otherwise(model, tmp_path)
    restore(model, tmp_path)
    assert largest_difference(weights_of(model), before) == 0


def test_types_and_random_numbers_stay(tmp_path: Path) -> None:
    """Weights of two types come back to the bit, as the same tensors; the run's random numbers are its own."""
    model = a_model("qwen3_moe").to(torch.bfloat16)
    model.lm_head.to(torch.float32)
    before, tensors = weights_of(model), dict(model.named_parameters())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    state = torch.get_rng_state()
    restore(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(model.named_parameters())
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(now, before[name]) for name, now in weights_of(model).items())


def test_a_weight_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A negative control: a checkpoint that lacks a weight is refused, and nothing is left to chance."""
    model = a_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "layers.1.self_attn.q_proj" not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for model\.layers\.1\.self_attn\.q_proj\.weight"):
        restore(model, tmp_path)


UNREAD = {"shieldgemma2"}
"""`from_pretrained` does not find what `save_pretrained` wrote of it."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_every_type_comes_back(tmp_path: Path, kind: Any) -> None:
    """Of every type of model that transformers can build small, each tensor comes back to the bit."""
    lost, num_saved_otherwise = dict[str, Any](), 0
    for config_class in kind._model_mapping:
        model_type = config_class.model_type
        try:
            torch.manual_seed(0)
            architecture = tiny.architecture_of(config := tiny.shrunk(config_class()))
            model: Any = tiny.build(config, "cpu", architecture)
            model.float()
            with torch.no_grad():
                for weight in model.parameters():
                    weight.copy_(torch.randn(weight.shape))
            before, folder = weights_of(model), tmp_path / model_type
            model.save_pretrained(folder)
        except Exception:  # by the type's own code, which wants other sizes
            continue
        if not is_saved_otherwise(model, folder):
            continue
        num_saved_otherwise += 1
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        try:
            restore(model, folder)
        except Exception as error:
            lost[model_type] = repr(error)
            continue
        if wrong := [name for name, now in weights_of(model).items() if not torch.equal(now, before[name])]:
            lost[model_type] = wrong[:3]
    assert lost.keys() <= UNREAD, lost
    assert num_saved_otherwise > 20
