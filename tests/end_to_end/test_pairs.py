"""TRL's DPOTrainer under plans learns what it learns of whole batches on one process, whatever the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import largest_difference, run_ranks, scripted
from words import tokenizer

from hf_hetero import HeteroDPOTrainer, HeteroError, HeteroTrainerMixin, UnsupportedModel

trl = pytest.importorskip("trl")
from preference_pairs import PlannerOfItems, Scripted, config, model_of, pairs, train  # noqa: E402

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
LOSSES: dict[str, dict[str, Any]] = {
    "smoothed": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"], "beta": 0.5, "learning_rate": 1e-4},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "cut": {"max_length": 16, "truncation_mode": "keep_end"},
}


LOGGED = ("loss", "rewards", "logps", "logits", "entropy", "mean_token_accuracy", "num_tokens")


def compare(found: dict[str, Any], expected: dict[str, Any], near: float = 1e-12) -> None:
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) < near
    assert largest_difference(found["weights"], expected["weights"]) < near
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        names = [name for name in theirs if name.startswith(("loss", "eval_loss", "rewards", "logps", "logits"))]
        names += [
            name for name in theirs if name.removeprefix("eval_") in ("entropy", "mean_token_accuracy", "num_tokens")
        ]
        if not abs(theirs.get("rewards/margins", 1.0)) > 1e-9:  # before the first step: who is ahead is rounding
            names.remove("rewards/accuracies")
        for name in names:
            # TRL keeps columns of a reference in fp32; here they are fp64
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5 if near < 1e-9 else 1e-4, abs=1e-7), name


def test_pairs_are_learned_the_same(tmp_path: Any) -> None:
    """Gradients, weights, logs and evaluation under mixed plans on 4 ranks are TRL's; the reference is given back."""
    changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    expected = train(str(tmp_path / "stock"), changes, trl.DPOTrainer)
    assert any("eval_loss" in entry for entry in expected["logs"])
    found = run_ranks(train, 4, str(tmp_path / "planned"), {**changes, "per_device_eval_batch_size": 2})
    for rank in found:
        compare(rank, expected)
        assert rank["reference"] == "sdpa"
        assert "beside a reference" in rank["source"]
    counts = [entry["hetero/micro_batches"] for entry in found[0]["logs"] if "loss" in entry]
    assert len(set(counts)) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")  # TRL's
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", list(LOSSES))
def test_losses(name: str, num_ranks: int, tmp_path: Any) -> None:
    """So they are with each loss, on any number of ranks."""
    expected = train(str(tmp_path / "stock"), LOSSES[name], trl.DPOTrainer)
    folder = str(tmp_path / "planned")
    found = run_ranks(train, num_ranks, folder, LOSSES[name])[0] if num_ranks > 1 else train(folder, LOSSES[name])
    # TRL has the logarithms of exo_pair's label smoothing in fp32
    compare(found, expected, 1e-6 if name == "exo_pair" else 1e-12)


@pytest.mark.slow
def test_accumulated_batches(tmp_path: Any) -> None:
    """With gradient accumulation a step has the pairs of all its batches."""
    expected = train(str(tmp_path / "stock"), {}, trl.DPOTrainer)
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    compare(run_ranks(train, 2, str(tmp_path / "planned"), changes)[0], expected)


@pytest.mark.slow
def test_streamed_pairs(tmp_path: Any) -> None:
    """A dataset that can only be iterated is read on rank 0, and its pairs are packed as they come."""
    expected = train(str(tmp_path / "stock"), {}, trl.DPOTrainer, streamed=True)
    compare(run_ranks(_streamed, 2, str(tmp_path / "planned"))[0], expected)


def _streamed(folder: str) -> dict[str, Any]:
    return train(folder, {}, streamed=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL's
@pytest.mark.parametrize("adapters", [False, True])
def test_recomputed_layers(adapters: bool, tmp_path: Any) -> None:
    """With activation checkpointing, which is TRL's default, of a model and of an adapter."""
    changes = {"activation_checkpointing": True}
    expected = train(str(tmp_path / "stock"), changes, trl.DPOTrainer, adapters)
    compare(run_ranks(train, 4, str(tmp_path / "planned"), changes, Scripted, adapters)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_adapters(sharded: bool, fresh: bool, tmp_path: Any) -> None:
    """The reference is TRL's copy of the adapter as it was, or the model without; where weights are sharded, too."""
    expected = _adapted(str(tmp_path / "stock"), {}, trl.DPOTrainer, fresh)
    options = (SHARDED if sharded else {}, Scripted, fresh)
    found = run_ranks(_adapted, 2, str(tmp_path / "planned"), *options)[0]
    assert found["wrapper"].startswith("FSDP") == sharded
    compare(found, expected)


def _adapted(folder: str, changes: dict[str, Any], kind: Any, fresh: bool) -> dict[str, Any]:
    return train(folder, changes, kind, adapters=True, fresh=fresh)


@pytest.mark.slow
def test_sharded_weights(tmp_path: Any) -> None:
    """Model and reference under FSDP2."""
    expected = train(str(tmp_path / "stock"), {}, trl.DPOTrainer)
    found = run_ranks(train, 4, str(tmp_path / "planned"), SHARDED)[0]
    assert found["wrapper"].startswith("FSDP")
    compare(found, expected)


@pytest.mark.slow
def test_precomputed_references(tmp_path: Any) -> None:
    """A reference that was asked before training is that which is asked in each step: a model, or an adapter."""
    changes = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    planned = {**changes, "per_device_eval_batch_size": 2, "precompute_ref_log_probs": True}
    for adapters in (False, True):
        expected = train(str(tmp_path / "stock"), changes, trl.DPOTrainer, adapters)
        found = run_ranks(train, 4, str(tmp_path / "planned"), planned, Scripted, adapters)[0]
        compare(found, expected)
        assert "beside a reference" not in found["source"]


@pytest.mark.slow
def test_columns_of_a_reference(tmp_path: Any) -> None:
    """TRL's own precomputed columns, which are in fp32, are the same numbers."""
    import datasets

    changes, folder = {"precompute_ref_log_probs": True}, str(tmp_path / "table")
    # ranks share what TRL has computed by a file beside the table's
    datasets.Dataset.from_list(pairs()).save_to_disk(folder)
    expected = train(str(tmp_path / "stock"), changes, trl.DPOTrainer, data=folder)
    options = (Scripted, False, torch.float64, {}, None, folder)
    compare(run_ranks(train, 2, str(tmp_path / "planned"), changes, *options)[0], expected, 1e-6)


@pytest.mark.slow
def test_resumed(tmp_path: Any) -> None:
    """A run that goes on from a checkpoint ends with the weights of one that was not cut short."""
    folder = str(tmp_path)
    whole = run_ranks(train, 2, folder, {"save_strategy": "steps", "save_steps": 2})[0]
    checkpoint = str(tmp_path / "checkpoint-2")
    rest = run_ranks(train, 2, folder, {}, Scripted, False, torch.float64, {}, checkpoint)[0]
    assert len(rest["gradients"]) == 2
    assert largest_difference(rest["weights"], whole["weights"]) < 1e-12


@pytest.mark.slow
def test_longer_than_a_rank(tmp_path: Any) -> None:
    """Pairs of up to four times what a rank can hold are planned by the package's own planner, and learned the same."""
    data = [{**pair, "prompt": pair["prompt"] + 200 * " w3"} if n == 3 else pair for n, pair in enumerate(pairs())]
    expected = train(str(tmp_path / "stock"), {}, trl.DPOTrainer, data=data)
    # the longest pair, of 452 tokens, on the four ranks, or on two of them
    for most, degree in ((120, 4), (230, 2)):
        options = (HeteroDPOTrainer, False, torch.float64, {"max_tokens_per_rank": most}, None, data)
        found = run_ranks(train, 4, str(tmp_path / "planned"), {}, *options)[0]
        compare(found, expected)
        assert max(found["degrees"]) == degree


# ------------------------------------------------------------------------------------------------- what must be noticed


class Parting(Scripted):
    """A negative control: samples are planned as if they were no pairs."""

    def _plan_source(self) -> Any:
        class Planner(PlannerOfItems):
            def plan(self, items: Sequence[int]) -> Any:
                return self._planner.plan(items)

        return scripted(Planner(self.args.world_size))


def test_a_parted_pair_is_refused(tmp_path: Any) -> None:
    """A plan that has half a pair in a group is refused on all ranks, with the row."""
    for error in run_ranks(train, 2, str(tmp_path), {}, Parting, expect_errors=True):
        assert isinstance(error, HeteroError)
        assert "one half of the pair in row" in str(error)


def broken_train(folder: str, name: str, replacement: str) -> dict[str, Any]:
    """Train with one of the sums replaced by a wrong one."""
    from hf_hetero.trainer.pairs import planned, reference

    wrong = {
        "own": lambda context, parts: parts,
        "each": lambda context, loss: loss,
        "all": lambda context, loss: loss / context.layout.degree,
    }
    setattr(reference if hasattr(reference, name) else planned, name, wrong[replacement])
    return train(folder, {})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrong"), [("over_group", "own"), ("counted_once", "each"), ("counted_once", "all")])
def test_wrong_sums_are_caught(name: str, wrong: str, tmp_path: Any) -> None:
    """Log-probabilities of one rank only, a pair that counts on each rank, gradients of a part: none is rounding."""
    expected = train(str(tmp_path / "stock"), {}, trl.DPOTrainer)
    found = run_ranks(broken_train, 4, str(tmp_path / "planned"), name, wrong)[0]
    with pytest.raises(AssertionError):
        compare(found, expected, 1e-3)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_type": ["sigmoid", "aot"]}, "sorts the pairs of a batch"),
        ({"use_weighting": True}, "use_weighting"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5"),
    ],
)
def test_what_depends_on_a_batch_is_refused(changes: dict[str, Any], words: str, tmp_path: Any) -> None:
    """Before anything is computed, with the setting."""
    with pytest.raises(UnsupportedModel, match=words):
        HeteroDPOTrainer(None, args=config(str(tmp_path), **changes))


def test_other_collators_are_refused(tmp_path: Any) -> None:
    """Pairs are packed, by this package's collator."""
    import datasets

    data, own = datasets.Dataset.from_list(pairs()), dict
    with pytest.raises(UnsupportedModel, match="data_collator type does not"):
        HeteroDPOTrainer(
            model_of(0, False),
            model_of(1, False),
            config(str(tmp_path)),
            data_collator=own,
            train_dataset=data,
            processing_class=tokenizer(),
        )


def test_a_loss_of_ones_own_is_refused(tmp_path: Any) -> None:
    """A subclass that brings one is named: nothing shows that it is a sum over pairs."""
    import datasets

    own = type("Own", (HeteroDPOTrainer,), {"compute_loss": lambda self, *_, **__: None})
    with pytest.raises(UnsupportedModel, match=r"Own\.compute_loss is its own"):
        own(
            model_of(0, False),
            model_of(1, False),
            config(str(tmp_path)),
            train_dataset=datasets.Dataset.from_list(pairs()),
            processing_class=tokenizer(),
        )


def test_the_mixin_alone_is_refused() -> None:
    """TRL's own loss knows no plan; the trainer that does is named."""
    with pytest.raises(UnsupportedModel, match=r"Use hf_hetero\.HeteroDPOTrainer"):
        type("Mixed", (HeteroTrainerMixin, trl.DPOTrainer), {})(None)
