"""TRL's KTOTrainer under plans learns what it learns of whole batches on one process, whatever the plan."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers import Recorder, largest_difference, plain_name, run_ranks, scripted, shard_on_cpu, whole
from words import say, tokenizer

from hf_hetero import HeteroConfig, HeteroError, HeteroKTOTrainer, UnsupportedModel
from hf_hetero.trainer.pairs.plans import PlansOfUnpaired

trl = pytest.importorskip("trl")
from preference_pairs import SIZES, Degrees, PlannerOfItems, config, exact_head, model_of  # noqa: E402

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
LOGGED = ("loss", "rewards", "logps", "logits", "entropy", "kl", "num_tokens")
WORDS = [(prompt, chosen, True) for prompt, chosen, _ in SIZES] + [(prompt, other, False) for prompt, _, other in SIZES]
"""Of prompt and completion, and whether it is wanted: a step of eight is followed by one of six."""


def preferences() -> list[dict[str, Any]]:
    rows = [
        {"prompt": say(prompt, n), "completion": " " + say(completion, 3 * n + 1), "label": wanted}
        for n, (prompt, completion, wanted) in enumerate(WORDS)
    ]
    return [rows[5 * n % len(rows)] for n in range(len(rows))]


def turned_by_twos(trainer: Any, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
    """Mismatched completions as TRL makes them for batches of two, whatever the batches are."""
    by_twos = copy.copy(args)
    by_twos.per_device_train_batch_size = 2
    return trl.KTOTrainer._prepare_dataset(trainer, dataset, processing_class, by_twos, dataset_name)


class Stock(trl.KTOTrainer):
    _prepare_dataset = turned_by_twos


class Planned(HeteroKTOTrainer):
    _prepare_dataset = turned_by_twos


class Scripted(Planned):
    def _plan_source(self) -> Any:
        flat = scripted(OfSamples(self.args.world_size))
        return PlansOfUnpaired(flat) if self.calculate_KL else flat

    def _planners(self) -> Any:
        return SimpleNamespace(for_evaluation=self._plan_source)


class OfSamples(PlannerOfItems):
    """Scripted plans of samples, none of which is offloaded."""

    def plan(self, items: Any) -> Any:
        return super().plan([(tokens,) for tokens in items])


def train(
    folder: str,
    changes: dict[str, Any],
    kind: Any = Scripted,
    adapters: bool = False,
    hetero: dict[str, Any] | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Gradients, weights and logs of a run."""
    if changes.get("fsdp"):
        shard_on_cpu()
    recorder, degrees = Recorder(), Degrees()
    table = datasets.Dataset.from_list(preferences())
    is_stock = not issubclass(kind, HeteroKTOTrainer)
    options: dict[str, Any] = {} if is_stock else {"hetero": HeteroConfig(**(hetero or {}))}
    if changes.get("eval_strategy"):
        options["eval_dataset"] = table
    reference = None if adapters else model_of(3, False, dtype=torch.float64)
    trainer = kind(
        model_of(0, adapters, dtype=torch.float64),
        ref_model=reference,
        args=config(folder, trl.KTOConfig, 8, **{"beta": 0.5, **changes}),
        train_dataset=table,
        processing_class=tokenizer(),
        callbacks=[recorder, degrees],
        **options,
    )
    if is_stock:
        exact_head(trainer.model.get_base_model() if adapters else trainer.model)
        if reference is not None:
            exact_head(reference)
    trainer.train(resume_from_checkpoint=resume)
    named = trainer.model.named_parameters()
    return {
        "gradients": recorder.gradients,
        "weights": {plain_name(name): whole(p) for name, p in named if ".ref." not in name},
        "logs": trainer.state.log_history,
        "degrees": degrees.found,
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def compare(found: dict[str, Any], expected: dict[str, Any], near: float = 1e-12) -> None:
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) < near
    assert largest_difference(found["weights"], expected["weights"]) < near
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name in (name for name in theirs if name.removeprefix("eval_").startswith(LOGGED)):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


def test_preferences_are_learned_the_same(tmp_path: Any) -> None:
    """Gradients, weights, logs and evaluation under mixed plans on 4 ranks are TRL's of whole batches."""
    changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16, "desirable_weight": 1.3}
    expected = train(str(tmp_path / "stock"), changes, Stock)
    # what is learned depends on the distance, so that a wrong one would be noticed
    assert all(entry["kl"] > 0.01 for entry in expected["logs"] if "loss" in entry)
    assert any("eval_loss" in entry for entry in expected["logs"])
    found = run_ranks(train, 4, str(tmp_path / "planned"), {**changes, "per_device_eval_batch_size": 4})
    for rank in found:
        compare(rank, expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_losses(loss: str, num_ranks: int, tmp_path: Any) -> None:
    """So they are with each loss, on any number of ranks, where longer completions are cut."""
    changes = {"loss_type": loss, "undesirable_weight": 0.7, "max_length": 30}
    expected = train(str(tmp_path / "stock"), changes, Stock)
    folder = str(tmp_path / "planned")
    found = run_ranks(train, num_ranks, folder, changes)[0] if num_ranks > 1 else train(folder, changes)
    compare(found, expected)


@pytest.mark.slow
def test_it_is_trls_own_distance(tmp_path: Any) -> None:
    """TRL itself on two ranks has the distance of the whole step: one process with both batches learns the same."""
    # in the second step two ranks would see some rows twice; DDP cannot look into the outputs of the exact head
    changes = {"max_steps": 1, "ddp_find_unused_parameters": False}
    compare(run_ranks(train, 2, str(tmp_path / "two"), changes, Stock)[0], train(str(tmp_path / "one"), changes, Stock))


@pytest.mark.slow
def test_accumulated_batches(tmp_path: Any) -> None:
    """With gradient accumulation the distance is that of the whole step, as the loss is."""
    expected = train(str(tmp_path / "stock"), {}, Stock)
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    compare(run_ranks(train, 2, str(tmp_path / "planned"), changes)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, SHARDED, {"activation_checkpointing": True}], ids=["whole", "sharded", "again"]
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL's
def test_however_the_model_is_held(changes: dict[str, Any], adapters: bool, tmp_path: Any) -> None:
    """So they are of adapters, of sharded weights, and where layers are recomputed."""
    expected = train(str(tmp_path / "stock"), {}, Stock, adapters)
    found = run_ranks(train, 2, str(tmp_path / "planned"), changes, Scripted, adapters)[0]
    assert found["wrapper"].startswith("FSDP") == bool(changes.get("fsdp"))
    compare(found, expected)


@pytest.mark.slow
def test_precomputed_references(tmp_path: Any) -> None:
    """A reference that was asked before training, of both kinds of completions, is that which each step asks."""
    expected = train(str(tmp_path / "stock"), {}, Stock)
    found = run_ranks(train, 2, str(tmp_path / "planned"), {"precompute_ref_log_probs": True})[0]
    compare(found, expected)


@pytest.mark.slow
def test_resumed(tmp_path: Any) -> None:
    """A run that goes on from a checkpoint ends with the weights of one that was not cut short."""
    folder = str(tmp_path)
    complete = run_ranks(train, 2, folder, {"save_strategy": "steps", "save_steps": 2})[0]
    rest = run_ranks(train, 2, folder, {}, Scripted, False, {}, str(tmp_path / "checkpoint-2"))[0]
    assert len(rest["gradients"]) == 2
    assert largest_difference(rest["weights"], complete["weights"]) < 1e-12


@pytest.mark.slow
def test_longer_than_a_rank(tmp_path: Any) -> None:
    """The package's own planner shares completions that no rank could hold, mismatched ones, too."""
    expected = train(str(tmp_path / "stock"), {}, Stock)
    found = run_ranks(train, 4, str(tmp_path / "planned"), {}, Planned, False, {"max_tokens_per_rank": 30})[0]
    compare(found, expected)
    assert max(found["degrees"]) > 1


# ------------------------------------------------------------------------------------------------- what must be noticed


def broken_train(folder: str, wrong: str) -> dict[str, Any]:
    """Train with a distance that is none, that of the last micro-batch, or that may be negative."""
    from hf_hetero.trainer.pairs import kto

    known = kto.Distance
    broken = {
        "none": ("mean", lambda self: 0 * self.sums[0]),
        "last": ("plus", lambda self, sums: known(sums, self.num_micro_batches + 1)),
        "twice": ("plus", lambda self, sums: known(self.sums + sums * sums.new_tensor([2, 1]), self[1] + 1)),
    }
    setattr(known, *broken[wrong])
    return train(folder, {})


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["none", "last", "twice"])
def test_wrong_distances_are_caught(wrong: str, tmp_path: Any) -> None:
    """A distance of a part of the step, or of none, is no rounding."""
    expected = train(str(tmp_path / "stock"), {}, Stock)
    found = run_ranks(broken_train, 4, str(tmp_path / "planned"), wrong)[0]
    with pytest.raises(AssertionError):
        compare(found, expected, 1e-4)


class Mixing(Scripted):
    """A negative control: completions are planned together with those that they are compared with."""

    def _plan_source(self) -> Any:
        return scripted(OfSamples(self.args.world_size))


def test_a_mixed_plan_is_refused(tmp_path: Any) -> None:
    """A plan that would learn before the distance is known is refused on all ranks."""
    for error in run_ranks(train, 2, str(tmp_path), {}, Mixing, expect_errors=True):
        assert isinstance(error, HeteroError)
        assert "before the last mismatched ones" in str(error)


def test_other_collators_are_refused(tmp_path: Any) -> None:
    """Completions are packed, by this package's collator."""
    with pytest.raises(UnsupportedModel, match="data_collator type does not"):
        HeteroKTOTrainer(
            model_of(0, False),
            model_of(1, False),
            config(str(tmp_path), trl.KTOConfig, 8),
            data_collator=dict,
            train_dataset=datasets.Dataset.from_list(preferences()),
            processing_class=tokenizer(),
        )
