"""Models with a loss or an attention of their own learn the same under every plan: weights against references.

The reference is one process, each sample alone, and independent of the package.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    IGNORE,
    LENGTHS,
    ScriptedTrainer,
    arguments,
    largest_difference,
    run_ranks,
    samples,
    shard_on_cpu,
    trained,
    trainer_order,
)
from torch.nn import functional as F

from hf_hetero import HeteroConfig, HeteroTrainer, UnsupportedModel

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
TOLERANCE = 2e-6
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "dropout": 0.0}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0}
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {  # names of classes, config, whether labels are aligned
    "bart": ("Bart", {**BART, "init_std": 0.3}, True),
    "bloom": ("Bloom", {**BLOOM, "initializer_range": 0.3}, False),
    "gptj": ("GPTJ", {**GPTJ, **NO_DROPOUT, "initializer_range": 0.3}, False),
    "xlm": ("XLM", {**XLM, "embed_init_std": 0.3}, True),  # both: sees tokens after its own, and has a loss of its own
}


def model_of(kind: str) -> Any:
    name, fields, _ = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=97, **fields)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def expected_of(kind: str) -> dict[str, Any]:
    """Each sample alone, token losses summed, divided once, plain gradient descent."""
    model, data, aligned = model_of(kind).train(), samples(LENGTHS), MODELS[kind][2]
    losses, first = list[float](), 0 if aligned else 1
    for rows in STEPS:
        model.zero_grad()
        count = sum(label != IGNORE for row in rows for label in data[row]["labels"][first:])
        loss_sum = 0.0
        for row in rows:
            ids, labels = (torch.tensor(data[row][key]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids[None]).logits[0]
            loss = F.cross_entropy(logits[: len(ids) - first], labels[first:], reduction="sum") / count
            loss.backward()
            loss_sum += loss.item()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad if p.grad is not None else 0.0
        losses.append(loss_sum)
    return {"weights": {name: p.detach() for name, p in model.named_parameters()}, "losses": losses}


def train_case(kind: str, max_degree: int | None, args: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return trained(model_of(kind), samples(LENGTHS), hetero=HeteroConfig(max_degree=max_degree), **args)


@pytest.mark.parametrize(
    ("kind", "num_ranks"),
    [
        ("bart", 2),
        ("bloom", 2),
        pytest.param("bart", 4, marks=pytest.mark.slow),
        *(pytest.param(kind, 4, marks=pytest.mark.slow) for kind in ("bloom", "gptj", "xlm")),
    ],
)
def test_weights_equal_the_reference(kind: str, num_ranks: int) -> None:
    """Losses, and the weights after four steps, under plans that mix degrees, methods, recompute and empty groups."""
    expected = expected_of(kind)
    for rank in run_ranks(train_case, num_ranks, kind, num_ranks, {}):
        assert largest_difference(rank["weights"], expected["weights"]) <= TOLERANCE
        logged = [entry["loss"] for entry in rank["logs"] if "loss" in entry]
        assert not logged or logged == pytest.approx(expected["losses"], rel=1e-6)


def planned_degrees(kind: str) -> tuple[set[int], float]:
    """Degrees of the groups that the planner may choose from, and the loss of an evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = HeteroTrainer(
            model_of(kind), arguments(folder, 2), train_dataset=samples(LENGTHS), eval_dataset=samples(LENGTHS)
        )
        loss = trainer.evaluate()["eval_loss"]
    cost = trainer.cost_model
    assert cost is not None
    return set(cost.degrees(2)), loss


@pytest.mark.parametrize("kind", ["bloom", "bart"])
def test_ranks_share_whole_samples_only_where_they_are_told_to(kind: str) -> None:
    """Without `max_degree` none is shared of a model whose ranks would all do the same; an evaluation is exact, too."""
    expected = expected_loss(kind)
    for degrees, loss in run_ranks(planned_degrees, 2, kind):
        assert degrees == ({1} if kind == "bloom" else {1, 2})
        assert loss == pytest.approx(expected, rel=1e-6)


def expected_loss(kind: str) -> float:
    model, data, first = model_of(kind).eval(), samples(LENGTHS), 0 if MODELS[kind][2] else 1
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data:
            ids, labels = (torch.tensor(row[key]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids[None]).logits[0]
            total += float(F.cross_entropy(logits[: len(ids) - first], labels[first:], reduction="sum"))
            count += int((labels[first:] != IGNORE).sum())
    return total / count


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The causal language model loss, as a user would write it."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class WithOwnLoss(ScriptedTrainer):
    """Each rank has a token that stands in, beside its samples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=own_loss, **kwargs)


def train_sharded(kind: str, max_degree: int | None, args: dict[str, Any]) -> dict[str, Any]:
    shard_on_cpu()
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    return train_case(kind, max_degree, {**fsdp, **args})


@pytest.mark.parametrize(
    ("kind", "num_ranks", "max_degree", "args"),
    [
        ("bloom", 2, 2, {}),
        pytest.param("bloom", 4, 4, {}, marks=pytest.mark.slow),
        pytest.param("gptj", 2, 2, {"activation_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("bloom", 2, 2, {"trainer_class": WithOwnLoss}, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_equal_the_reference(
    kind: str, num_ranks: int, max_degree: int | None, args: dict[str, Any]
) -> None:
    """Under FSDP2, where ranks have other numbers of samples, or none, no rank waits for another, and all are exact."""
    expected = expected_of(kind)
    for rank in run_ranks(train_sharded, num_ranks, kind, max_degree, args):
        assert rank["wrapper"].startswith("FSDP")
        assert largest_difference(rank["weights"], expected["weights"]) <= TOLERANCE


def test_labels_of_ones_own_loss_are_not_moved(tmp_path: Path) -> None:
    """A loss of the user's would be given labels for other tokens than by plain Trainer: that is refused in words."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    with pytest.raises(UnsupportedModel, match="BartForCausalLM compares each token with its own label"):
        HeteroTrainer(
            model_of("bart"), arguments(str(tmp_path), 1), train_dataset=samples(LENGTHS), compute_loss_func=loss
        )
