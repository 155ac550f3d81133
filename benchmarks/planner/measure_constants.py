"""What half and double of each constant of the planner do to plans and to planning time.

`python benchmarks/planner/measure_constants.py` measures all; names after it, only those. Each batch is planned with
the constant as it is, halved and doubled, one after the other, so that the ratios are of one machine at one time. Plans
of the search do not depend on the machine; CPU time does, and so does what an improvement finds within its limit.

A row is of one constant: geometric means, over its batches, of the seconds of the plan, of its bound, and of the CPU
time of planning, each as a change against the constant as it is. The best and the worst batch stand beside the mean.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from statistics import geometric_mean
from typing import Any

from hf_hetero.costs import ActivationPolicy, CostModel
from hf_hetero.plan import Plan
from hf_hetero.planner import Planner
from hf_hetero.what_if.mixes import MIXES, draw_lengths

Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Batch:
    """Lengths, and who plans them how."""

    planner: Planner
    lengths: list[int]
    improves: bool = False

    def plan(self) -> Plan:
        """The batch's plan."""
        plan = self.planner.plan(self.lengths)
        return self.planner.improve(plan, self.lengths) if self.improves else plan


@dataclass(frozen=True)
class Constant:
    """A name in a module, and the batches that tell what it does.

    Args:
        module: below `hf_hetero.planner`.
        batches: a name of `SETS`.
        is_excess: whether what lies above 1 is halved and doubled.
    """

    module: str
    name: str
    batches: str = "all"
    is_excess: bool = False

    def scaled(self, factor: float) -> Value:
        """Half or double: whole numbers stay whole, and at least 1."""
        now: Value = getattr(import_module(f"hf_hetero.planner.{self.module}"), self.name)
        return tuple(self._scaled(v, factor) for v in now) if isinstance(now, tuple) else self._scaled(now, factor)

    def _scaled(self, now: float, factor: float) -> float:
        if self.is_excess:
            return 1 + (now - 1) * factor
        return max(1, int(now * factor)) if isinstance(now, int) else now * factor

    @contextmanager
    def set_to(self, value: Value) -> Iterator[None]:
        """The planner with another value."""
        module = import_module(f"hf_hetero.planner.{self.module}")
        now: Any = getattr(module, self.name)
        setattr(module, self.name, value)
        try:
            yield
        finally:
            setattr(module, self.name, now)


CONSTANTS = (
    Constant("bound", "MOST_DURATIONS"),
    Constant("search.cuts", "NUM_DURATIONS"),
    Constant("search.cuts", "MOST_CUTS", "large"),
    Constant("search.cuts", "LONGEST_APART", "large"),
    Constant("search.cuts", "LONGEST_ALONE"),
    Constant("search.cuts", "PATIENCE"),
    Constant("search.cuts", "MOST_EXTRA"),
    Constant("search.cuts", "MOST_CAREFUL"),
    Constant("search.joining", "JOINS"),
    Constant("search.descent", "STRETCH"),
    Constant("search.descent", "CLOSE"),
    Constant("search.descent", "KICKED_STEP"),
    Constant("search.descent", "LAST_GAIN"),
    Constant("search.descent", "KICKS"),
    Constant("search.fast", "MOST_TRIES"),
    Constant("search.fast", "FEWEST_TRIES", "huge"),
    Constant("search.fast", "TRIED_SAMPLES", "large"),
    Constant("search.fast", "TRIES_A_GUESS"),
    Constant("search.fast", "TRIES_WHEN_FULL"),
    Constant("search.fast", "TRIES_A_RIVAL"),
    Constant("search.fast", "FIRST_STEP"),
    Constant("search.fast", "FULL_STEP"),
    Constant("search.fast", "WORTH_TRYING", is_excess=True),
    Constant("search.fast", "WORTH_SQUEEZING", is_excess=True),
    Constant("search.fast", "MUCH_LONGER", is_excess=True),
    Constant("search.parts", "MOST_RANKS_A_PART", "large"),
    Constant("search.parts", "STRETCHES", "large", is_excess=True),
    Constant("policies", "MOST_SPLITS", "policies"),
    Constant("improve.improve", "TRIES_A_STEP", "improved"),
    Constant("improve.improve", "STEP", "improved"),
    Constant("improve.improve", "WANDERS", "improved", is_excess=True),
    Constant("improve.milp", "MOST_WHOLE_VARIABLES", "small"),
    Constant("improve.annealing", "POWERS", "improved"),
    Constant("improve.annealing", "WARMEST", "improved"),
    Constant("improve.annealing", "COLDEST", "improved"),
    Constant("improve.annealing", "MOVES_A_TEMPERATURE", "improved"),
    Constant("improve.annealing", "NEAR", "improved"),
    Constant("improve.improve", "MOST_WALKS", "improved"),
    Constant("improve.improve", "MOVES_A_SECOND", "improved"),
    Constant("improve.relaxation", "NUM_CLASSES", "improved"),
    Constant("improve.relaxation", "NUM_KINDS", "improved"),
    Constant("improve.relaxation", "LEAST_SHARE", "improved"),
    Constant("improve.relaxation", "NARROWEST", "improved", is_excess=True),
    Constant("improve.relaxation", "LONGEST_LADDER", "improved"),
    Constant("improve.group_rows", "MOST_WHOLE", "improved"),
)
COSTS = {8: ("llama-8b_8xh100_nvlink", "llama-8b_8xa100_pcie"), 64: ("gpt-7b_64xa100_192k", "llama-8b_64xh100_ib")}
MIX_NAMES = ("wiki-192k", "github", "prolong", "long-sft")
IMPROVE_S = 4.0


def drawn(mix: str, num_samples: int, seed: int, planner: Planner) -> list[int]:
    """Lengths that the planner's ranks can hold."""
    most = planner.degrees[-1] * planner.cost_model.leanest.capacity_tokens
    return draw_lengths(MIXES[mix], num_samples, seed=seed, max_tokens=most)[0].tolist()


def all_batches(num_seeds: int) -> Iterator[Batch]:
    """8 and 64 ranks, two cost models each, all mixes; 16 and 8 samples a rank."""
    for num_ranks, names in COSTS.items():
        for name in names:
            planner = Planner(CostModel.load(name), num_ranks)
            for mix in MIX_NAMES:
                for seed in range(num_seeds):
                    yield Batch(planner, drawn(mix, 128 if num_ranks == 8 else 512, seed, planner))


def large_batches(num_seeds: int) -> Iterator[Batch]:
    """More ranks than are planned as one, and more samples than all tries can be spent on."""
    cost = CostModel.load("gpt-7b_64xa100_192k")
    for num_ranks, num_samples in ((2048, 4096), (128, 24_576)):
        planner = Planner(cost, num_ranks)
        for mix in MIX_NAMES[: 2 * num_seeds]:
            yield Batch(planner, drawn(mix, num_samples, 0, planner))


def huge_batches(num_seeds: int) -> Iterator[Batch]:
    """So many samples that no fewer packings are tried."""
    planner = Planner(CostModel.load("gpt-7b_64xa100_192k"), 64)
    for mix in MIX_NAMES[: 2 * num_seeds]:
        yield Batch(planner, drawn(mix, 65_536, 0, planner))


def policy_batches(num_seeds: int) -> Iterator[Batch]:
    """8 ranks with room for few tokens, whose groups may recompute or offload."""
    cost = CostModel.load(COSTS[8][1]).with_capacity(2048)
    stored = cost.activation_bytes_per_token
    attention, linear = cost.attention_s_per_token2, cost.linear_s_per_token
    policies = {
        "recompute": ActivationPolicy(stored / 4, attention * 4 / 3, linear * 4 / 3, exchanges=1.5),
        "offload": ActivationPolicy(stored / 8, attention, linear * 1.1, host_bytes_per_token=stored),
    }
    planner = Planner(replace(cost, activation_policies=policies, host_memory_bytes_per_rank=256e9), 8)
    for mix in MIX_NAMES:
        for seed in range(num_seeds):
            yield Batch(planner, drawn(mix, 48, seed, planner))


def improved_batches(num_seeds: int) -> Iterator[Batch]:
    """Few batches, heads exchanged only, each improved within its limit."""
    for num_ranks, names in COSTS.items():
        planner = Planner(CostModel.load(names[0]), num_ranks, methods=("ulysses",), mip_time_limit_s=IMPROVE_S)
        for mix in MIX_NAMES[: 2 * num_seeds]:
            yield Batch(planner, drawn(mix, 16 * num_ranks if num_ranks == 8 else 512, 0, planner), improves=True)


def small_batches(num_seeds: int) -> Iterator[Batch]:
    """Batches that are about small enough to be solved whole."""
    cost = CostModel.load(COSTS[8][1])
    for num_ranks, num_samples in ((2, 12), (4, 16), (8, 12), (8, 20)):
        planner = Planner(cost, num_ranks, methods=("ulysses",), mip_time_limit_s=IMPROVE_S)
        for seed in range(num_seeds):
            yield Batch(planner, drawn("prolong", num_samples, seed, planner), improves=True)


SETS: dict[str, Callable[[int], Iterator[Batch]]] = {
    "all": all_batches,
    "large": large_batches,
    "huge": huge_batches,
    "policies": policy_batches,
    "improved": improved_batches,
    "small": small_batches,
}


def measured(batch: Batch) -> tuple[float, float, float]:
    """Seconds and bound of the batch's plan, and CPU seconds of making it."""
    started = time.process_time()
    plan = batch.plan()
    return plan.seconds, plan.lower_bound_s, time.process_time() - started


def row(constant: Constant, batches: list[Batch]) -> str:
    """One line of the table: for half and double, changes of seconds, bound and CPU time."""
    cells: list[str] = []
    ratios: dict[float, list[tuple[float, ...]]] = {0.5: [], 2.0: []}
    for batch in batches:
        now = measured(batch)
        for factor, so_far in ratios.items():
            with constant.set_to(constant.scaled(factor)):
                so_far.append(tuple(a / b for a, b in zip(measured(batch), now, strict=True)))
    for so_far in ratios.values():
        seconds, bound, cpu = (geometric_mean(column) for column in zip(*so_far, strict=True))
        worst, best = max(r[0] for r in so_far), min(r[0] for r in so_far)
        cells.append(f"{seconds - 1:+.2%} ({best - 1:+.1%} to {worst - 1:+.1%}) | {bound - 1:+.2%} | {cpu - 1:+.0%}")
    now = getattr(import_module(f"hf_hetero.planner.{constant.module}"), constant.name)
    return f"| {constant.module} | {constant.name} | {now} | {constant.batches}, {len(batches)} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table, line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    titles = [
        f"{which}: {what}" for which in ("half", "double") for what in ("seconds (best to worst)", "bound", "CPU")
    ]
    print(f"| module | constant | now | batches | {' | '.join(titles)} |")
    print("|" + "---|" * (4 + len(titles)))
    for constant in CONSTANTS:
        if not arguments.names or constant.name in arguments.names:
            print(row(constant, list(SETS[constant.batches](arguments.seeds))), flush=True)


if __name__ == "__main__":
    main()
