"""A simulation predicts the seconds of the same batches under different ways to share them. No GPU, model or torch.

adaptive       this package: degrees chosen for every group of every step
by-heads       the same, if attention could cross ranks by exchanging heads only ("ulysses"); where there is a choice
unaware        the same, if it did not know that ranks or links are slower than others; where some are
static         one degree for the whole run, the best of those that hold its context (DeepSpeed-Ulysses with packing)
batch-static   one degree for each batch, the best of them (FlexSP's "BatchAda", arXiv:2412.01523, section 6.1)
dynamic-cp     Megatron's idea, tuned by us for each batch: the faster of our balancing and of what is released
megatron       Megatron's scheduler as it is released, with the best limit of tokens a rank for the run
wlb-llm        one degree a run, packed as WLB-LLM does, without putting off long samples; the best degree for the run
verl           one degree a run, balanced as verl does, by differencing; the best degree for the run
first-come     the smallest degree that holds the context, packed in the order of the batch: as most runs are set today
padded-rows    the same degree, in rows padded to the longest: as runs without packing are set today
padded         data parallel without sharing: each rank pads its samples to the longest of them, sorted by length
bound          no way is faster

The context is the longest sample that the run may meet. A run's one degree is chosen before its data are seen, so it
must hold the context, whether or not such a sample comes; `padded` needs one rank that holds it. Of `static`,
`batch-static`, `dynamic-cp` and `padded`, each packs or pads as well as it can: one degree means the better of best-fit
and balanced packing (`planner.search.homogeneous`). The others do what their sources say, whatever it costs (`rivals`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_hetero.costs import CostModel
from hf_hetero.errors import BadSample, HeteroError, InfeasibleBatch
from hf_hetero.plan import Plan, idle_share
from hf_hetero.planner import Planner
from hf_hetero.what_if.rivals import Rivals

SIMULATION_FORMAT = "hf-hetero-simulation/1"
WAYS = {
    "adaptive": "adaptive",
    "by-heads": "adaptive, by heads only",
    "unaware": "adaptive, speeds unknown",
    "static": "one degree a run",
    "batch-static": "one degree a batch",
    "dynamic-cp": "dynamic CP, tuned",
    "megatron": "dynamic CP, as released",
    "wlb-llm": "one degree, WLB-LLM",
    "verl": "one degree, verl",
    "first-come": "one degree, first come",
    "padded-rows": "one degree, padded rows",
    "padded": "padded, sorted",
}
"""Every way, in the order of tables and pictures, and what a picture calls it."""


@dataclass
class WayTotals:
    """`WayTotals` sum up one way to share batches over the steps.

    Args:
        seconds: of each step.
        num_micro_batches: of all steps.
        idle_s, rank_s: rank-seconds spent waiting, and in all.
        note: for people, such as the degree chosen.
    """

    seconds: list[float] = field(default_factory=list[float])
    num_micro_batches: int = 0
    idle_s: float = 0.0
    rank_s: float = 0.0
    note: str = ""

    @property
    def idle_share(self) -> float:
        """Return the share of the rank-seconds spent waiting."""
        return max(self.idle_s / self.rank_s, 0.0)  # rounding may leave it a hair below

    def add(self, plan: Plan, lengths: Sequence[int], cost: CostModel) -> None:
        """Count one step.

        Raises:
            HeteroError: the plan leaves samples out, so that its seconds would be no seconds of the step.
        """
        if plan.num_samples != len(lengths):
            raise HeteroError(f"A plan of {plan.num_samples} samples is no plan of a step of {len(lengths)}.")
        busy = busy_seconds(plan, lengths, cost)
        step = sum(max(ranks) for ranks in busy)
        self.seconds.append(step)
        self.num_micro_batches += len(busy)
        self.rank_s += step * plan.num_ranks
        self.idle_s += step * plan.num_ranks * idle_share(busy)


@dataclass(frozen=True, slots=True)
class LengthBin:
    """A bin counts samples, and their tokens, that are longer than half of `most_tokens` and at most that long."""

    most_tokens: int
    num_samples: int
    num_tokens: int


@dataclass(frozen=True)
class Simulation:
    """A `Simulation` holds the totals of each way over the same steps.

    Args:
        num_ranks, num_steps: what was simulated.
        context_tokens: the longest sample that the run must be able to take.
        bins: how long the samples were, ascending.
        ways: by name; a way that cannot hold the context is absent.
        static_s: seconds of all steps at each degree that holds the context; the best of them is the way `static`.
        bound_s: certified lower bound of each step, in seconds.
        planning_s: wall time of each adaptive plan.
    """

    num_ranks: int
    num_steps: int
    context_tokens: int
    bins: tuple[LengthBin, ...]
    ways: dict[str, WayTotals]
    static_s: dict[int, float]
    bound_s: list[float]
    planning_s: list[float]

    @property
    def num_samples(self) -> int:
        """Count the samples of all steps."""
        return sum(length_bin.num_samples for length_bin in self.bins)

    @property
    def num_tokens(self) -> int:
        """Count the tokens of all steps."""
        return sum(length_bin.num_tokens for length_bin in self.bins)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form (format hf-hetero-simulation/1)."""
        adaptive = sum(self.ways["adaptive"].seconds)
        return {
            "format": SIMULATION_FORMAT,
            "num_ranks": self.num_ranks,
            "num_steps": self.num_steps,
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "context_tokens": self.context_tokens,
            "bins": [asdict(length_bin) for length_bin in self.bins],
            "lower_bound_s": sum(self.bound_s),
            "planning_s": self.planning_s,
            "static_s": {str(degree): seconds for degree, seconds in self.static_s.items()},
            "ways": {
                name: {
                    "seconds": sum(way.seconds),
                    "step_s": way.seconds,
                    "speedup_of_adaptive": ratio(sum(way.seconds), adaptive),
                    "ratio_to_bound": ratio(sum(way.seconds), sum(self.bound_s)),
                    "micro_batches": way.num_micro_batches,
                    "idle_share": way.idle_share,
                    "note": way.note,
                }
                for name, way in self.ways.items()
            },
        }


def simulate(
    batches: Sequence[Sequence[int]],
    planner: Planner,
    context_tokens: int | None = None,
    progress: Callable[[Sequence[Sequence[int]]], Any] = iter,
) -> Simulation:
    """Plan every batch in every way.

    Args:
        batches: lengths of the samples of each step.
        planner: makes the adaptive plans; machine, model, ranks and degrees of all ways are its own.
        context_tokens: the longest sample that the run must be able to take; None is the longest of the batches.
        progress: wraps the batches, for a progress bar.

    Raises:
        BadSample: nothing to simulate, or a sample longer than the context.
        InfeasibleBatch: a context, or a sample, that no degree can hold.
    """
    if not batches or not all(batches):
        raise BadSample("There is nothing to simulate: give at least one step with one sample.")
    longest = max(map(max, batches))
    context = longest if context_tokens is None else context_tokens
    if longest > context:
        raise BadSample(f"A sample has {longest:,} tokens, more than the context of {context:,}. Raise the context.")
    cost = planner.cost_model
    by_degree = {degree: WayTotals() for degree in _degrees_that_hold(planner, context)}
    has = {"padded": 1 in by_degree, "by-heads": planner.has_choice, "unaware": cost.is_uneven}
    ways = {name: WayTotals() for name in WAYS if has.get(name, True)}
    others = {"by-heads": replace(planner, methods=("ulysses",)), "unaware": replace(planner, cost_model=cost.evened())}
    # groups of `padded` do the least that holds the context, everywhere, as a user would set it for a whole run
    alone = next((under for under in cost.by_activations.values() if _holds(under, 1, context)), cost)
    rivals, by_setting = Rivals(planner, context), dict[tuple[str, int], WayTotals]()
    adaptive: list[Plan] = []
    for lengths in progress(batches):
        adaptive.append(planner.plan(lengths))
        ways["adaptive"].add(adaptive[-1], lengths, cost)
        for name, other in others.items():
            if name in ways:
                ways[name].add(other.plan(lengths), lengths, cost)
        _add_static(by_degree, ways["batch-static"], planner, lengths)
        for priced in rivals.plans(lengths):
            totals = by_setting.setdefault((priced.way, priced.setting), WayTotals(note=priced.note))
            totals.add(priced.plan, priced.lengths, priced.cost)
        if "padded" in ways:
            _add_padded(ways["padded"], lengths, alone, planner.num_ranks)
    ways |= _best_settings(by_setting)
    static_s = {degree: sum(totals.seconds) for degree, totals in by_degree.items()}
    best = min(static_s, key=lambda degree: static_s[degree])
    ways["static"] = replace(by_degree[best], note=f"degree {best}")
    return Simulation(
        num_ranks=planner.num_ranks,
        num_steps=len(batches),
        context_tokens=context,
        bins=_bins(batches),
        ways={name: totals for name, totals in ways.items() if totals.seconds},
        static_s=static_s,
        bound_s=[plan.lower_bound_s for plan in adaptive],
        planning_s=[plan.planning_s for plan in adaptive],
    )


def _best_settings(by_setting: Mapping[tuple[str, int], WayTotals]) -> dict[str, WayTotals]:
    """Choose for each way what a user would set for the whole run: the setting with the fewest seconds."""
    best: dict[str, WayTotals] = {}
    for (way, _), totals in by_setting.items():
        if way not in best or sum(totals.seconds) < sum(best[way].seconds):
            best[way] = totals
    return best


def ratio(seconds: float, to_s: float) -> float:
    """Return how many times as long; 1 where nothing takes time."""
    return seconds / to_s if to_s > 0 else 1.0


def busy_seconds(plan: Plan, lengths: Sequence[int], cost: CostModel) -> list[list[float]]:
    """Predict the seconds of each micro-batch (outer) on each rank (inner)."""
    return [
        [seconds for group in m.groups for seconds in [cost.group_seconds(group, lengths)] * group.degree]
        for m in plan.micro_batches
    ]


def _bins(batches: Sequence[Sequence[int]]) -> tuple[LengthBin, ...]:
    """Sort all samples by the next power of two; bins between the shortest and the longest may be empty."""
    by_power: dict[int, list[int]] = {}
    for length in (length for lengths in batches for length in lengths):
        by_power.setdefault((length - 1).bit_length(), []).append(length)
    lengths_of = {power: by_power.get(power, []) for power in range(min(by_power), max(by_power) + 1)}
    return tuple(LengthBin(1 << power, len(lengths), sum(lengths)) for power, lengths in lengths_of.items())


def _holds(cost: CostModel, degree: int, tokens: int) -> bool:
    """Tell whether groups of this degree hold a sample of so many tokens."""
    return tokens <= degree * cost.capacity_tokens


def _degrees_that_hold(planner: Planner, context: int) -> list[int]:
    """List the degrees that a run may have all the time.

    Raises:
        InfeasibleBatch: no degree holds the context.
    """
    leanest = planner.cost_model.leanest
    if degrees := [degree for degree in planner.degrees if _holds(leanest, degree, context)]:
        return degrees
    most = planner.degrees[-1]
    raise InfeasibleBatch(
        f"A context of {context:,} tokens fits no degree: {most} ranks hold {most * leanest.capacity_tokens:,}. "
        "Leave longer samples out, lower the context, add ranks, or allow a larger degree."
    )


def _add_static(
    by_degree: Mapping[int, WayTotals], batch_static: WayTotals, planner: Planner, lengths: Sequence[int]
) -> None:
    """Count one step at each degree that holds the context; and at the best of those that hold this batch."""
    cost = planner.cost_model
    fixed = {d: planner.static(lengths, d) for d in planner.degrees if _holds(cost.leanest, d, max(lengths))}
    for degree, totals in by_degree.items():
        totals.add(fixed[degree], lengths, cost)
    batch_static.add(min(fixed.values(), key=lambda p: p.seconds), lengths, cost)


def _add_padded(totals: WayTotals, lengths: Sequence[int], cost: CostModel, num_ranks: int) -> None:
    """Deal samples to the ranks, sorted as `group_by_length` does, in blocks that fit when padded; count the step."""
    ordered = sorted(lengths, reverse=True)
    position, step_s = 0, 0.0
    of_rank = [cost.at(cost.places.of((rank,))) for rank in range(num_ranks)]
    while position < len(ordered):
        longest = ordered[position]
        # no more rows than an even share of what is left, else the last block would leave ranks idle
        rows = max(1, min(cost.capacity_tokens // longest, math.ceil((len(ordered) - position) / num_ranks)))
        block = ordered[position : position + rows * num_ranks]
        busy = [under.seconds([longest] * len(block[rank::num_ranks]), 1) for rank, under in enumerate(of_rank)]
        step_s += max(busy)
        totals.idle_s += sum(max(busy) - seconds for seconds in busy)
        totals.num_micro_batches += 1
        position += len(block)
    totals.seconds.append(step_s)
    totals.rank_s += step_s * num_ranks
