"""Speed and share of the peak of a real run are those of a count that asks nothing of the package."""

from __future__ import annotations

import time
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import LENGTHS, ScriptedTrainer, often, run_ranks, samples, tiny_model, trained, trainer_order, with_lora
from hybrids import hybrid_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from hf_hetero.callbacks import StepReportCallback
from hf_hetero.model.timing import StepClock

HYBRID = "granitemoehybrid"
STEPS = trainer_order(len(LENGTHS), 12, 7, 2)
PEAK = 1e10
"""Operations a second of a card that no table has: those of two ranks are twice as many."""
BEHIND_S = 0.2
"""How far a device that is made up computes behind its host."""
A_STATE = 18 * 8 * 8 * 8
"""Of a Mamba layer of 8 heads with 8 by 8 numbers, a token: each decays, takes in and is read, and three times that."""
A_CONVOLUTION = 6 * 4 * (64 + 2 * 8)
"""Of it, too: 4 weights for each of 64 inner channels, and of 8 for what is taken in and what is read."""


def model_named(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    if name == HYBRID:
        return hybrid_model(name, torch.float32, **changes)
    if name == "lora":
        return with_lora(tiny_model("llama", attention), ("q_proj", "v_proj", "down_proj"))
    # torch does not count experts that are grouped
    if attention == "eager":
        return tiny_model(name, attention, experts_implementation="eager", **changes)
    return tiny_model(name, attention, **changes)


@cache
def counted(name: str, length: int) -> float:
    """Count the operations of one sample alone, forward and backward, as torch does; then by hand what torch cannot.

    Eager attention multiplies all L^2 pairs, of which L (L + 1) / 2 are of a token and one that it may see. A state is
    kept up to date by operations that are not all products of matrices, and a convolution's count is not per token: of
    the hybrid, pairs are those of its attending layer without the other.
    """
    products, pairs = torch_counts(name, length)
    by_hand = 0
    if name == HYBRID:
        _, pairs = torch_counts(name, length, num_hidden_layers=1, layer_types=["attention"])
        by_hand = A_STATE + A_CONVOLUTION
    return products + pairs * (length + 1) / (2 * length) + by_hand * length


def torch_counts(name: str, length: int, **changes: Any) -> tuple[int, int]:
    """Operations of products with weights, and of batched products."""
    model = model_named(name, **changes, attention="eager")
    if name == "lora":
        model.enable_input_require_grads()  # else torch leaves out what nobody needs of the first layer
    ids = torch.arange(length)[None] % 97
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    return found["aten.mm"], found["aten.bmm"]


class Outside(TrainerCallback):
    """Notes the seconds from before a step's first micro-batch to after its last."""

    def __init__(self) -> None:
        self.began_s, self.seconds = 0.0, list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began_s = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began_s)


def logged(name: str) -> list[dict[str, float]]:
    outside = Outside()
    with mock.patch("hf_hetero.trainer.reporting._peak_flops", return_value=2 * PEAK):
        run = trained(model_named(name), samples(LENGTHS), ScriptedTrainer, callbacks=[outside], max_steps=2)
    entries = [entry for entry in run["logs"] if "loss" in entry]
    return [{**entry, "outside": seconds} for entry, seconds in zip(entries, outside.seconds, strict=True)]


@pytest.mark.parametrize("name", often(["llama", "qwen3-moe", HYBRID, "lora"], "llama"))
def test_a_run_logs_what_torch_counts(name: str) -> None:
    """Dense, experts, layers with state, adapters: two ranks, mixed plans; speed and share follow from their seconds.

    The seconds themselves are no more than the clock on the wall shows around a step.
    """
    for entry, rows in zip(run_ranks(logged, 2, name)[0], STEPS, strict=True):
        lengths, seconds = [LENGTHS[row] for row in rows], entry["hetero/step_s"]
        assert entry["hetero/tokens_per_s"] * seconds == pytest.approx(sum(lengths))
        assert entry["hetero/tokens_per_s_per_rank"] * seconds == pytest.approx(sum(lengths) / 2)
        needed = sum(counted(name, length) for length in lengths)
        assert entry["hetero/mfu"] * seconds * 2 * PEAK == pytest.approx(needed, rel=1e-9), name
        assert 0 < seconds - entry["hetero/wait_s"] <= entry["outside"]


def test_all_pairs_or_one_padded_row_would_be_noticed() -> None:
    """A negative control: pairs that nobody may see, or samples as long as the longest, are other counts."""
    lengths = [LENGTHS[row] for row in STEPS[0]]
    needed = sum(counted("llama", length) for length in lengths)
    scores = 3 * 2 * 2 * 4 * (8 + 8)  # of a pair, in two layers of 4 heads of 8
    assert sum(scores * length * (length - 1) / 2 for length in lengths) > 0.01 * needed
    assert len(lengths) * counted("llama", max(lengths)) > 2 * needed


class Reports(StepReportCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_report(self, args: Any, state: Any, report: Any) -> None:
        self.seconds.append(report.seconds)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_lasts_until_its_device_is_done(accumulation: int) -> None:
    """All is launched at once, and the device computes on: its seconds count, not those of launching alone."""
    reports, read = Reports(), StepClock.read

    def behind(clock: StepClock) -> list[float]:
        time.sleep(BEHIND_S)
        return read(clock)

    with mock.patch.object(StepClock, "read", behind):
        trained(
            tiny_model(),
            samples(LENGTHS),
            ScriptedTrainer,
            callbacks=[reports],
            max_steps=2,
            per_device_train_batch_size=12 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
    assert min(reports.seconds) >= BEHIND_S
