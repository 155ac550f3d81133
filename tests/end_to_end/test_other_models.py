"""Models that are no plain Llama learn, under plans of mixed degrees, as each sample alone, in fp64.

Models that see images, on text; layers that drop keywords; positions that start after the padding token; layers of
different widths; experts without weights. What they compute in fp32 whatever they are given is computed in fp64.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import (
    LENGTHS,
    MIXED_LAYERS,
    MLA,
    TINY,
    arguments,
    largest_difference,
    reference_steps,
    run_ranks,
    samples,
    trained,
    trainer_order,
    with_lora,
)
from sights import all_in_double
from transformers import Trainer

from hf_hetero import HeteroTrainer
from hf_hetero.checks.in_double import in_double
from hf_hetero.collators import PackedCollator
from hf_hetero.collators.limits import limits_of
from hf_hetero.data import epochs
from hf_hetero.errors import BadSample
from hf_hetero.trainer.packing import packer_of

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
TOWER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TOWER |= {"image_size": 28, "patch_size": 14}
QWEN: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
GEMMA4 = {**TINY, **MIXED_LAYERS, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
GEMMA4 |= {"global_head_dim": 16}
UNSEEN = {"image_token_index": TINY["vocab_size"]}  # a token that no row has
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # text, tower, and what joins them
    "gemma3": ("Gemma3", {**TINY, **MIXED_LAYERS}, TOWER, {"mm_tokens_per_image": 4}),
    "gemma4": ("Gemma4", GEMMA4, TOWER, {}),
    "mistral3": (
        "Mistral3",
        {**TINY, "model_type": "mistral"},
        {**TOWER, "model_type": "pixtral", "head_dim": 8},
        UNSEEN,
    ),
    "llava": ("Llava", {**TINY, "model_type": "llama"}, {**TOWER, "model_type": "clip_vision_model"}, UNSEEN),
    "qwen2.5-vl": ("Qwen2_5_VL", {**TINY, **MROPE}, {**QWEN, "patch_size": 14, "fullatt_block_indexes": [0]}, {}),
    "qwen3-vl": (
        "Qwen3VL",
        {**TINY, **MROPE},
        {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {},
    ),
}
NONE = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout"), 0.0
)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron": ("NemotronForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "roberta": ("RobertaForCausalLM", {"is_decoder": True, "pad_token_id": 1, "bos_token_id": 0}),
    "biogpt": ("BioGptForCausalLM", {"activation_dropout": 0.0}),
    "gemma4-text": ("Gemma4ForCausalLM", GEMMA4),
    "llama4": (
        "Llama4ForCausalLM",
        {"num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
        | {"floor_scale": 4},
    ),
    "deepseek-v3.2": (
        "DeepseekV32ForCausalLM",
        {**MLA, "n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "index_topk": 64}
        | {"index_head_dim": 8, "index_n_heads": 2, "num_experts_per_tok": 2},
    ),
    "aria-text": ("AriaTextForCausalLM", {"moe_num_experts": 4, "moe_topk": 2}),
    "longcat": (
        "LongcatFlashForCausalLM",
        {**MLA, "num_layers": 2, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "ffn_hidden_size": 48}
        | {"expert_ffn_hidden_size": 16},
    ),
}


def model_of(name: str, lora: bool = False) -> Any:
    torch.manual_seed(0)
    if name in SEEING:
        kind, text, tower, own = SEEING[name]
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=tower, **own)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    else:
        kind, own = OTHERS[name]
        architecture = getattr(transformers, kind)
        taken = {key: value for key, value in TINY.items() if not (name == "longcat" and key == "num_hidden_layers")}
        model = architecture(architecture.config_class(**{**taken, **NONE, **own}))
    return with_lora(model) if lora else model


def freeze_towers(model: Any) -> None:
    """Under plain Trainer, too, DDP with recomputed layers misses the gradients of weights that text never meets."""
    for key, weight in model.named_parameters():
        weight.requires_grad_("language_model" in key or "lm_head" in key)


def train(name: str, lora: bool, changes: dict[str, Any]) -> dict[str, Any]:
    model = model_of(name, lora)
    if "activation_checkpointing" in changes and name in SEEING:
        freeze_towers(model)
    with all_in_double(model):
        return trained(model, samples(LENGTHS), **changes)


def check(name: str, num_ranks: int, lora: bool = False, **changes: Any) -> None:
    model = model_of(name, lora)
    with in_double(model):
        expected = reference_steps(model, samples(LENGTHS), STEPS)
    for found in run_ranks(train, num_ranks, name, lora, changes):
        assert found["wrapper"] == "DistributedDataParallel"
        for step, gradients in enumerate(expected["gradients"]):
            assert largest_difference(found["gradients"][step], gradients) < 1e-12
        assert largest_difference(found["weights"], expected["weights"]) < 1e-12


def test_a_model_that_sees_learns_from_text() -> None:
    """Gemma 3 as AutoModelForCausalLM loads it, with the tower that no row goes through, on two ranks."""
    check("gemma3", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OTHERS, *(name for name in SEEING if name != "gemma3")])
def test_others_learn_the_same(name: str) -> None:
    """On two ranks."""
    check(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "nemotron", "roberta", "llama4"])
def test_on_four_ranks(name: str) -> None:
    """Under all degrees and methods."""
    check(name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen3-vl", "stablelm"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_with_layers_computed_again(name: str, use_reentrant: bool) -> None:
    """A layer that is recomputed finds the context of its micro-batch again."""
    check(name, 2, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": use_reentrant})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2.5-vl", "nemotron"])
def test_with_lora(name: str) -> None:
    """Adapters inside the language model, and none that text reaches in the tower."""
    check(name, 2, lora=True)


def plain_norms() -> list[float]:
    """What plain Trainer logs of its first step, and what it logs where DDP looks for weights without a gradient."""
    found: list[float] = []
    for looks in (None, True):
        changes = {"activation_checkpointing": True, "ddp_find_unused_parameters": looks, "max_steps": 1}
        with tempfile.TemporaryDirectory() as folder:
            plain = Trainer(
                model_of("deepseek-v3.2"), arguments(folder, 2, **changes), train_dataset=samples([16] * 24)
            )
            plain.train()
        found += [entry["grad_norm"] for entry in plain.state.log_history if "grad_norm" in entry]
    return found


def test_weights_without_a_gradient_under_ddp() -> None:
    """Refused in the first step, which plain Trainer learns from without exchanging all gradients (the control)."""
    changes: dict[str, Any] = {"activation_checkpointing": True}
    for error in run_ranks(train, 2, "deepseek-v3.2", False, changes, expect_errors=True):
        assert "10 weights got no gradient (model.layers.0.self_attn.indexer.wq_b.weight, " in str(error)
        assert "Set ddp_find_unused_parameters=True" in str(error)
    single, exchanged = run_ranks(plain_norms, 2)[0]
    assert abs(single - exchanged) > 0.1 * exchanged


@pytest.mark.slow
def test_weights_without_a_gradient_that_ddp_looks_for() -> None:
    """What the refusal says to set trains exactly."""
    check("deepseek-v3.2", 2, activation_checkpointing=True, ddp_find_unused_parameters=True)


# -------------------------------------------------------------------------------------------------- rows with images


@pytest.mark.parametrize(("name", "key"), [("gemma4", "pixel_values_videos"), ("qwen2.5-vl", "pixel_values_videos")])
def test_rows_that_cannot_be_seen_are_refused(name: str, key: str, tmp_path: Any) -> None:
    """Before anything is learnt: a row that has an input of a tower, whatever its length."""
    model = model_of(name)
    data = samples([8, 6])
    data[1][key] = [[0.0]] * 6  # as many as tokens, by accident
    data[0][key] = None
    trainer = HeteroTrainer(model, arguments(str(tmp_path), 1), train_dataset=data)
    with pytest.raises(BadSample, match=f"row 1 has {key}: images, videos and sounds cannot be shared out"):
        trainer.train()


def test_images_that_a_collator_makes_are_refused() -> None:
    """Their patches are no row a sample, so nothing else would miss them."""

    def collate(rows: list[Any], patches: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([rows[0]["input_ids"]]), "pixel_values": torch.zeros(patches, 4)}

    inputs = frozenset({"pixel_values"})
    for patches in (3, 16):
        packer = PackedCollator(example_collator=partial(collate, patches=patches), model_inputs=inputs)
        with pytest.raises(BadSample, match="row 0 has pixel_values"):
            packer.sample({"input_ids": [3, 4, 5]}, "row 0")
    empty = PackedCollator(example_collator=partial(collate, patches=0), model_inputs=inputs)
    assert empty.sample({"input_ids": [3, 4, 5]}, "row 0").inputs == {}


def test_positions_after_the_padding_token() -> None:
    """As RoBERTa makes them of a row; padding tokens inside it take no position, and there is room for fewer."""
    limits = limits_of(model_of("roberta"))
    assert (limits.padding, limits.longest) == (1, TINY["max_position_embeddings"] - 2)
    sample = PackedCollator(limits=limits).sample({"input_ids": [5, 6, 1, 7, 8]}, "row 0")
    ids = torch.tensor([[5, 6, 1, 7, 8]])
    embeddings: Any = transformers.models.roberta.modeling_roberta.RobertaEmbeddings
    assert sample.position_ids(0, 5).tolist() == embeddings.create_position_ids_from_input_ids(ids, 1)[0].tolist()
    assert sample.position_ids(3, 5).tolist() == [4, 5]
    assert sample.part(3, 5).position_ids(0, 2).tolist() == [2, 3]
    assert packer_of(PackedCollator(limits=limits), None).limits.padding == 1


def train_and_evaluate(name: str, folder: str) -> tuple[float, float, int]:
    """The loss of two evaluations after a training that saves, on rank 0 alone, and how often rows were counted."""
    rows, counted = samples(LENGTHS), 0

    class Rows(torch.utils.data.Dataset[Any]):
        """Rows that can be referred to."""

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, row: int) -> Any:
            return rows[row]

    def count(*_: Any) -> Any:
        nonlocal counted
        counted += 1
        return counts(*_)

    counts = epochs.read_rows
    epochs.read_rows = count
    data, world = Rows(), dist.get_world_size()
    changes: Any = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = HeteroTrainer(model_of(name), arguments(folder, world, **changes), train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"], counted


@pytest.mark.parametrize(
    "name", ["stablelm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "qwen3-vl"))]
)
def test_evaluating_after_a_save(name: str, tmp_path: Path) -> None:
    """One rank's config is written into when it saves, and it still tries no model, and counts no rows, alone."""
    for first, again, counted in run_ranks(train_and_evaluate, 2, name, str(tmp_path), timeout_s=60):
        assert first == again
        assert counted == 1  # of the evaluation's
