"""TRL's CPOTrainer and ORPOTrainer under plans learn what they learn of whole batches on one process."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers import Recorder, largest_difference, plain_name, run_ranks, scripted, shard_on_cpu, whole
from words import tokenizer

from hf_hetero import HeteroTrainerMixin, UnsupportedModel
from hf_hetero.trainer.pairs.plans import PlansOfPairs

trl = pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from preference_pairs import PlannerOfItems, config, model_of, pairs  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

from hf_hetero import HeteroCPOTrainer, HeteroORPOTrainer  # noqa: E402

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
LOSSES: dict[str, dict[str, Any]] = {
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0},
    "cpo-simpo": {"loss_type": "simpo", "cpo_alpha": 0.5, "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "beta": 0.5},
    "alphapo": {"loss_type": "simpo", "alpha": 0.2, "cpo_alpha": 0.0},
    "cut": {"max_length": 24},
}
LOGGED = ("loss", "rewards", "logps", "nll_loss", "log_odds")


class ScriptedPairs:
    def _plan_source(self) -> Any:
        trainer: Any = self
        return PlansOfPairs(scripted(PlannerOfItems(trainer.args.world_size)))

    def _planners(self) -> Any:
        return SimpleNamespace(for_evaluation=self._plan_source)


class ScriptedCPO(ScriptedPairs, HeteroCPOTrainer):
    pass


class ScriptedORPO(ScriptedPairs, HeteroORPOTrainer):
    pass


def train(folder: str, changes: dict[str, Any], kind: Any = ScriptedCPO, adapters: bool = False) -> dict[str, Any]:
    """Gradients, weights and logs of a run."""
    if changes.get("fsdp"):
        shard_on_cpu()
    recorder = Recorder()
    settings = ORPOConfig if issubclass(kind, ORPOTrainer) else CPOConfig
    trainer = kind(
        model_of(0, adapters, dtype=torch.float64),
        args=config(folder, settings, **{"max_length": 128, "remove_unused_columns": False, **changes}),
        train_dataset=datasets.Dataset.from_list(pairs()),
        processing_class=tokenizer(),
        callbacks=[recorder],
    )
    trainer.train()
    return {
        "gradients": recorder.gradients,
        "weights": {plain_name(name): whole(p) for name, p in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def compare(found: dict[str, Any], expected: dict[str, Any], near: float = 1e-12) -> None:
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) < near
    assert largest_difference(found["weights"], expected["weights"]) < near
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name in (name for name in theirs if name.startswith(LOGGED)):
            if name == "nll_loss" and not theirs[name]:  # TRL leaves it out where it is not learned
                continue
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


ODDS = 1e-5
"""TRL has the odds of ORPO in fp32."""


def test_pairs_are_learned_the_same(tmp_path: Any) -> None:
    """Gradients, weights and logs under mixed plans on 4 ranks are TRL's, of CPO with the loss of its tokens."""
    expected = train(str(tmp_path / "stock"), {}, CPOTrainer)
    for rank in run_ranks(train, 4, str(tmp_path / "planned"), {}):
        compare(rank, expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", list(LOSSES))
def test_losses(name: str, num_ranks: int, tmp_path: Any) -> None:
    """So they are with each loss, on any number of ranks."""
    expected = train(str(tmp_path / "stock"), LOSSES[name], CPOTrainer)
    compare(run_ranks(train, num_ranks, str(tmp_path / "planned"), LOSSES[name])[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_odds(num_ranks: int, tmp_path: Any) -> None:
    """So they are of ORPO, which learns the chosen sequence with its prompt."""
    expected = train(str(tmp_path / "stock"), {}, ORPOTrainer)
    compare(run_ranks(train, num_ranks, str(tmp_path / "planned"), {}, ScriptedORPO)[0], expected, ODDS)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("changes", [{}, SHARDED], ids=["whole", "sharded"])
def test_however_the_model_is_held(changes: dict[str, Any], adapters: bool, tmp_path: Any) -> None:
    """So they are of adapters, and of sharded weights; accumulated batches are one step."""
    expected = train(str(tmp_path / "stock"), {}, CPOTrainer, adapters)
    planned = {**changes, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    found = run_ranks(train, 2, str(tmp_path / "planned"), planned, ScriptedCPO, adapters)[0]
    assert found["wrapper"].startswith("FSDP") == bool(changes.get("fsdp"))
    compare(found, expected)


def broken_train(folder: str, wrong: str) -> dict[str, Any]:
    """Train with a mean over each rank's tokens, or with prompts that are compared."""
    from hf_hetero.samples import pairs as rows
    from hf_hetero.trainer.pairs import planned, without_reference

    if wrong == "own":
        without_reference.over_group = lambda context, parts: parts
    elif wrong == "each":
        planned.counted_once = lambda context, loss: loss
    else:
        rows.NOT_LEARNED = -101
    return train(folder, LOSSES["simpo"])


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["own", "each", "prompts"])
def test_wrong_sums_are_caught(wrong: str, tmp_path: Any) -> None:
    """Sums of one rank only, a pair that counts on each rank, prompts that are compared: none is rounding."""
    expected = train(str(tmp_path / "stock"), LOSSES["simpo"], CPOTrainer)
    found = run_ranks(broken_train, 4, str(tmp_path / "planned"), wrong)[0]
    with pytest.raises(AssertionError):
        compare(found, expected, 1e-3)


def test_the_mixin_alone_is_refused() -> None:
    """TRL's own loss knows no plan; the trainer that does is named."""
    for theirs, ours in ((CPOTrainer, "HeteroCPOTrainer"), (ORPOTrainer, "HeteroORPOTrainer")):
        with pytest.raises(UnsupportedModel, match=rf"Use hf_hetero\.{ours}"):
            type("Mixed", (HeteroTrainerMixin, theirs), {})(None)
