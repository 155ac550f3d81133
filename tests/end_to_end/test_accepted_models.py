"""Models that are more than a stock architecture learn as under plain Trainer: adapters, users' classes, odd losses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    LENGTHS,
    ScriptedTrainer,
    arguments,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    tiny_model,
    trained,
    trainer_order,
)
from peft import LoHaConfig, LoraConfig, get_peft_model
from transformers import Trainer

from hf_hetero import HeteroTrainer
from hf_hetero.attention.kernels import choose_kernel
from hf_hetero.trainer.fitting import compute_dtype

pytestmark = pytest.mark.slow

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 2.0, 1.5],
    "original_max_position_embeddings": 16,
}


class Scaled(transformers.LlamaForCausalLM):
    """A user's own class of a supported architecture, under a name of its own."""

    def forward(self, *args: Any, inputs_embeds: Any = None, input_ids: Any = None, **kwargs: Any) -> Any:
        embeds = 1.5 * self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        return super().forward(*args, inputs_embeds=embeds, **kwargs)


class Tiny(Scaled):
    """And a class of that one."""


def model_of(kind: str) -> Any:
    model = tiny_model()
    torch.manual_seed(1)
    if kind == "transformers' adapters":
        model.add_adapter(LoraConfig(**LORA))
    elif kind == "mixed adapters":
        model = get_peft_model(model, LoraConfig(**LORA), adapter_name="one", mixed=True)
        model.add_adapter("two", LoHaConfig(r=4, target_modules=["v_proj"], init_weights=False))
        model.set_adapter(["one", "two"])
    elif kind == "a user's class":
        own = Tiny(model.config)
        own.load_state_dict(model.state_dict())
        return own
    elif kind == "gpt2":
        none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.3}
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, **none)
        return transformers.GPT2LMHeadModel(config)
    return model


def first_labels() -> list[dict[str, Any]]:
    """Samples whose first label is not masked, in part, as a tokenizer leaves them."""
    data = samples(LENGTHS)
    for row in data[::2]:
        row["labels"] = list(row["input_ids"])
    return data


def pad(examples: list[Any]) -> dict[str, torch.Tensor]:
    def padded(name: str, value: int) -> torch.Tensor:
        rows = [torch.tensor(example[name]) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = padded("input_ids", -1) >= 0
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask.long()}


class PaddingTrainer(Trainer):
    """Stock, on one process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=pad, **kwargs)


def train(kind: str) -> dict[str, Any]:
    return trained(model_of(kind), first_labels(), trainer_class=ScriptedTrainer)


@pytest.mark.parametrize("kind", ["transformers' adapters", "mixed adapters", "a user's class", "gpt2"])
def test_learns_as_under_plain_trainer(kind: str) -> None:
    """Losses, gradients and weights of each step, on one rank and on two that share samples.

    Of GPT-2 and of classes with a name of their own Trainer does not know that the loss shifts labels: it divides by
    the first label of each sample, too.
    """
    expected = trained(model_of(kind), first_labels(), trainer_class=PaddingTrainer)
    losses = [entry["loss"] for entry in expected["logs"] if "loss" in entry]
    for found in (train(kind), *run_ranks(train, 2, kind)):
        for step, gradients in enumerate(expected["gradients"]):
            assert largest_difference(found["gradients"][step], gradients) < 2e-6
        assert largest_difference(found["weights"], expected["weights"]) < 2e-6
        assert [entry["loss"] for entry in found["logs"] if "loss" in entry] == pytest.approx(losses, rel=1e-6)


def longrope_model() -> Any:
    longest = {"original_max_position_embeddings": 16, "max_position_embeddings": 128}
    return tiny_model("phi3", dtype=torch.float64, rope_parameters=copy.deepcopy(LONGROPE), **longest)


def train_longrope(changes: dict[str, Any]) -> dict[str, Any]:
    return trained(longrope_model(), samples(LENGTHS), **changes)


@pytest.mark.parametrize(
    ("changes", "num_ranks"),
    [
        ({}, 4),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 2),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, 1),
    ],
    ids=["plain", "recomputed", "compiled"],
)
def test_rotary_tables_by_the_sample(changes: dict[str, Any], num_ranks: int) -> None:
    """Under LongRoPE short and long samples learn, in one pack or shared by ranks, as each does alone."""
    expected = reference_steps(longrope_model(), samples(LENGTHS), STEPS)
    for found in run_ranks(train_longrope, num_ranks, changes):
        for step, gradients in enumerate(expected["gradients"]):
            assert largest_difference(found["gradients"][step], gradients) < 1e-7  # the tables are in fp32


def test_precision_of_the_launcher(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --mixed_precision` asks for counts as what the arguments ask for: kernel and costs."""
    found: list[Any] = []
    for asked, changes in ((None, {"bf16": True}), ("bf16", {}), (None, {})):
        if asked is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        else:
            monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        trainer = HeteroTrainer(tiny_model(), arguments(str(tmp_path), 1, **changes), train_dataset=samples(LENGTHS))
        trainer.train()
        assert trainer.cost_model is not None
        kernel = choose_kernel("cuda", compute_dtype(trainer))
        found.append((trainer.cost_model.kv_bytes_per_token, kernel.name))
    assert found[0] == found[1] != found[2]
    assert found[0][0] * 2 == found[2][0]
