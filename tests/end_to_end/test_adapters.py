"""Adapters learn as without plans, whatever lies under them; and what they have learnt can be saved, loaded, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LENGTHS,
    ScriptedTrainer,
    arguments,
    largest_difference,
    often,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trained,
    trainer_order,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_hetero.model.lm_head import LeanHead
from hf_hetero.trainer.fitting import fit

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "all linear layers": {"target_modules": "all-linear"},
    "head trained whole": {"modules_to_save": ["lm_head"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings adapted": {"target_modules": ["embed_tokens", "v_proj"]},
}


class FakeLinear4bit(torch.nn.Linear):
    """Weights in four bits a number, two to a byte, as under QLoRA; a scale a row. They stay frozen."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 7)
        levels = (weight / self.scale).round().to(torch.int8) + 8
        packed = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        levels = torch.stack([self.weight >> 4, self.weight & 15], dim=-1).flatten(1)
        return F.linear(input, (levels.to(input.dtype) - 8) * self.scale)


def quantised(model: Any) -> Any:
    """The same with all linear layers but the head in four bits."""
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, FakeLinear4bit(child))
    return model.requires_grad_(False)


def adapted(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = tiny_model(dtype=dtype)
    options = {"target_modules": ["q_proj", "v_proj"], **KINDS.get(kind, {})}
    if kind == "four bits":
        model, options["target_modules"] = quantised(model), "all-linear"
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype)  # bytes stay bytes


def train(kind: str) -> dict[str, Any]:
    return trained(adapted(kind), samples(LENGTHS))


@pytest.mark.parametrize("kind", often([*KINDS, "four bits"], "lora", "dora", "head trained whole", "four bits"))
def test_gradients_equal_the_reference(kind: str) -> None:
    """Gradients of each step, and the weights after four, under plans that mix degrees, methods and micro-batches."""
    found = run_ranks(train, 4, kind)
    expected = reference_steps(adapted(kind), samples(LENGTHS), STEPS)
    for rank in found:
        for step, gradients in enumerate(expected["gradients"]):
            assert gradients
            assert largest_difference(rank["gradients"][step], gradients) < 1e-12
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-12


def head_of(kind: str) -> str:
    trainer = ScriptedTrainer(adapted(kind), arguments("unused", 1), train_dataset=samples(LENGTHS))
    fit(trainer, trainer.hetero)
    return type(trainer.model.get_base_model().get_output_embeddings()).__name__


def test_which_heads_are_lean(caplog: pytest.LogCaptureFixture) -> None:
    """A frozen head does without whole logits; one that peft has wrapped does not, which is said."""
    assert head_of("lora") == LeanHead.__name__
    assert "Whole logits" not in caplog.text
    assert head_of("head trained whole") == "ModulesToSaveWrapper"
    assert "Whole logits are computed for the loss: its output embedding is a ModulesToSaveWrapper" in caplog.text


def save(folder: str) -> dict[str, torch.Tensor]:
    model = adapted("lora", torch.float32)
    args = arguments(folder, torch.distributed.get_world_size())
    trainer = ScriptedTrainer(model, args, train_dataset=samples(LENGTHS))
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        return {"logits": model.eval()(torch.arange(3, 30)[None]).logits.clone()}


def test_saved_loaded_merged(tmp_path: Path) -> None:
    """The adapter alone is saved; loaded onto the base, or merged into it and saved whole, it gives the same logits."""
    ids = torch.arange(3, 30)[None]
    expected = run_ranks(save, 2, str(tmp_path / "adapter"))[0]["logits"]
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names

    torch.manual_seed(0)
    with torch.no_grad():
        untrained = tiny_model().eval()(ids).logits
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(ids).logits, expected)
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (untrained - expected).abs().max() > 1e-2  # there was something to save
