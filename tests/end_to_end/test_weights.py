"""Weights of a dataset multiply the losses of its tokens, under any plan, and change nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
import pytest
import torch
from helpers import (
    IGNORE,
    LENGTHS,
    ScriptedTrainer,
    arguments,
    gradients_of,
    largest_difference,
    run_ranks,
    samples,
    shard_on_cpu,
    tiny_model,
    trained,
    trainer_order,
)
from torch.nn import functional as F

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer, UnsupportedModel
from hf_hetero.collators import PackedCollator

STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
WEIGHED = HeteroConfig(weight_column="importance")


def weighed_rows(per_token: bool = True) -> list[dict[str, Any]]:
    """Rows with weights of both signs, and 0: a number for the row, or, where asked for, one for each token."""
    generator = torch.Generator().manual_seed(5)
    rows = samples(LENGTHS)
    for number, row in enumerate(rows):
        drawn = torch.randn(len(row["input_ids"]), generator=generator, dtype=torch.float64).tolist()
        row["importance"] = drawn if per_token and number % 2 else (number % 5) - 1.5
    return rows


def reference(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each sample alone, on one process: each token's loss times its weight, over the targets of the step."""
    model, gradients, losses = tiny_model(dtype=torch.float64), [], []
    for step in STEPS:
        model.zero_grad()
        count = sum(label != IGNORE for row in step for label in rows[row]["labels"][1:])
        total = 0.0
        for row in step:
            ids, labels = (torch.tensor(rows[row][name]) for name in ("input_ids", "labels"))
            weights = torch.as_tensor(rows[row]["importance"], dtype=torch.float64).expand(len(ids))
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            terms = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="none")
            loss = (terms * weights[1:]).sum() / count
            (loss + 0 * logits.sum()).backward()
            total += loss.item()
        gradients.append(gradients_of(model))
        losses.append(total)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"gradients": gradients, "weights": weights, "losses": losses}


def run(hetero: dict[str, Any], kind: Any = ScriptedTrainer, sharded: bool = False, **changes: Any) -> Any:
    if sharded:
        shard_on_cpu()
        changes |= {
            "fsdp": "full_shard",
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
        }
    settings = replace(WEIGHED, **hetero)
    return trained(tiny_model(dtype=torch.float64), weighed_rows(), kind, settings, **changes)


def check(found: list[Any], wrapper: str) -> None:
    expected = reference(weighed_rows())
    for rank in found:
        assert rank["wrapper"] == wrapper
        for ours, theirs in zip(rank["gradients"], expected["gradients"], strict=True):
            assert largest_difference(ours, theirs) < 1e-12
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-12
    logged = [entry["loss"] for entry in found[0]["logs"] if "loss" in entry]
    assert logged == pytest.approx(expected["losses"], rel=1e-6)


@pytest.mark.parametrize("chunked", [True, False])
def test_weights_multiply_losses(chunked: bool) -> None:
    """Gradients and weights of the model are those of weighed samples alone, whatever spans ranks hold."""
    check(run_ranks(run, 4, {"chunked_loss": chunked}), "DistributedDataParallel")


@pytest.mark.slow
def test_weights_under_fsdp2() -> None:
    """So they are where weights of the model are sharded."""
    check(run_ranks(run, 4, {}, ScriptedTrainer, True), "FSDPLlamaForCausalLM")


class OfTheTokenItself(ScriptedTrainer):
    """A negative control: each token's loss is multiplied by its own weight, not by that of what it predicts."""

    def _run_on(self, fitted: Any) -> Any:
        run = super()._run_on(fitted)
        if not isinstance(run.packer, _OnePlaceLater):
            self._planned_run = run = replace(run, packer=_OnePlaceLater(**vars(run.packer)))
        return run


class _OnePlaceLater(PackedCollator):
    def sample(self, *args: Any) -> Any:
        sample = super().sample(*args)
        return replace(sample, weights={name: values.roll(1) for name, values in sample.weights.items()})


def test_weights_in_other_places_are_caught() -> None:
    """Weights one place further are no rounding error."""
    [found, _] = run_ranks(run, 2, {}, OfTheTokenItself)
    assert largest_difference(found["gradients"][0], reference(weighed_rows())["gradients"][0]) > 1e-3


def test_weights_of_one_change_nothing() -> None:
    """Weights of 1 give the loss that rows without weights have."""
    rows, model = samples(LENGTHS), tiny_model(dtype=torch.float64)
    weighed = trained(model, [{**row, "importance": 1} for row in rows], ScriptedTrainer, WEIGHED)
    plain = trained(tiny_model(dtype=torch.float64), rows, ScriptedTrainer)
    assert largest_difference(weighed["weights"], plain["weights"]) < 1e-14


def test_a_table_and_an_evaluation(tmp_path: Any) -> None:
    """A table keeps the column that is no input of the model; evaluation weighs as training does."""
    rows = weighed_rows(per_token=False)
    table, model = datasets.Dataset.from_list(rows), tiny_model(dtype=torch.float64)
    trainer = HeteroTrainer(
        model=model,
        args=arguments(str(tmp_path), 1, remove_unused_columns=True),
        train_dataset=table,
        eval_dataset=table,
        hetero=WEIGHED,
    )
    targets = terms = 0.0
    for row in rows:
        ids, labels = (torch.tensor(row[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum").item()
        terms, targets = terms + loss * row["importance"], targets + int((labels[1:] != IGNORE).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(terms / targets, rel=1e-10)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(reference(rows)["losses"][0], rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (None, "has no importance"),
        ("much", "importance is 'much', and weights are numbers"),
        (float("nan"), "It must be a finite number"),
        ([1.0, 2.0], r"has 2 importance and \d+ input_ids"),
        ([[1.0]], "It must be a finite number, or one for each token"),
    ],
)
def test_rows_without_usable_weights(tmp_path: Any, weights: Any, words: str) -> None:
    """A row whose weights cannot be what was meant is refused, with its number and what to do."""
    rows = [{**row, "importance": 1.0} for row in samples(LENGTHS)]
    rows[7]["importance"] = weights
    if weights is None:
        del rows[7]["importance"]
    trainer = HeteroTrainer(model=tiny_model(), args=arguments(str(tmp_path), 1), train_dataset=rows, hetero=WEIGHED)
    with pytest.raises(HeteroError, match=rf"(?i)row 7.*{words}"):
        trainer.train()


def blind(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A sum over tokens that sees no weights."""
    logits, targets = outputs.logits[..., :-1, :].flatten(0, 1), labels[..., 1:].flatten()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


class Doubling(ScriptedTrainer):
    """Doubles the loss of the model, which knows weights."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return 2 * outputs.loss * self.args.world_size


def test_a_loss_that_knows_no_weights(tmp_path: Any) -> None:
    """A loss that would learn as if there were none is refused before the first step; one that hands them on is not."""
    trainer = HeteroTrainer(
        model=tiny_model(),
        args=arguments(str(tmp_path), 1),
        train_dataset=weighed_rows(),
        hetero=WEIGHED,
        compute_loss_func=blind,
    )
    with pytest.raises(UnsupportedModel, match=r"weight_column='importance': compute_loss_func .* knows no weights"):
        trainer.train()
    for rank in run_ranks(run, 2, {}, Doubling):
        doubled = {name: 2 * gradient for name, gradient in reference(weighed_rows())["gradients"][0].items()}
        assert largest_difference(rank["gradients"][0], doubled) < 1e-12
