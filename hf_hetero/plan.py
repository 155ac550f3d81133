"""A plan says what a step does: Plan > MicroBatch > Group; a report says how it went. Standard library only.

A plan is made once, on one rank, and read by everyone: the sampler, the collator, the trainer, the callbacks, the
command line. Its laws are checked here, when it is made, so that no reader checks them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

from hf_hetero.errors import HeteroError

PLAN_FORMAT = "hf-hetero-plan/1"
METHODS = ("ulysses", "gather", "ring", "ulysses_ring", "token_ring")
"""How attention may cross the ranks of a group."""
ACTIVATIONS = ("recompute", "offload")
"""What a group may do to hold more tokens: compute layers again in backward; the same, and keep their inputs in host
memory. Each takes less device memory than the one before, and no less time."""


@dataclass(frozen=True, slots=True)
class Group:
    """A `Group` is ranks that share samples in one micro-batch.

    Args:
        ranks: global ranks, ascending and contiguous, starting at a multiple of their number.
        samples: positions in the global batch, in the order they are packed; may be empty.
        method: how attention crosses the ranks: one of `METHODS`.
        ulysses_degree: for "ulysses_ring", the ranks of a block that share heads; the blocks form the ring. Else None.
        activations: what it does to hold more tokens, one of `ACTIVATIONS`; None: what the whole run does.

    Raises:
        HeteroError: ranks that are no aligned block, an unknown method or way to hold more, or blocks that do not fill
            the group.
    """

    ranks: tuple[int, ...]
    samples: tuple[int, ...]
    method: str = "ulysses"
    ulysses_degree: int | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        if not self.ranks:
            raise HeteroError("A group has no ranks.")
        # aligned blocks are few, so that all process groups can be made before training, and the same on every rank
        first, degree = self.ranks[0], len(self.ranks)
        if self.ranks != tuple(range(first, first + degree)) or first % degree:
            raise HeteroError(
                f"Group of ranks {list(self.ranks)}: ranks must be contiguous and start at a multiple of {degree}."
            )
        if self.method not in METHODS:
            raise HeteroError(f"Group of ranks {list(self.ranks)}: method {self.method!r} is none of {METHODS}.")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise HeteroError(
                f"Group of ranks {list(self.ranks)}: activations {self.activations!r} is none of {ACTIVATIONS}."
            )
        inner = self.ulysses_degree
        if (inner is not None) != (self.method == "ulysses_ring") or (
            inner is not None and (inner < 1 or degree % inner)
        ):
            raise HeteroError(
                f"Group of ranks {list(self.ranks)}, method {self.method!r}: ulysses_degree is {inner!r}. "
                '"ulysses_ring" needs one that divides the number of ranks; the other methods have none.'
            )

    @property
    def degree(self) -> int:
        """Count the ranks."""
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A `MicroBatch` is what all ranks compute in one forward and backward pass: its groups partition the ranks."""

    groups: tuple[Group, ...]

    def group_of(self, rank: int) -> Group:
        """Return the group that this rank belongs to."""
        return next(group for group in self.groups if group.ranks[0] <= rank <= group.ranks[-1])

    @property
    def degrees(self) -> tuple[int, ...]:
        """List the degrees of the groups, largest first."""
        return tuple(sorted((group.degree for group in self.groups), reverse=True))


@dataclass(frozen=True, slots=True)
class Plan:
    """A `Plan` is everything the ranks must agree on for one optimizer step.

    Args:
        num_ranks: ranks of the run; every micro-batch partitions `range(num_ranks)`.
        micro_batches: run one after the other.
        seconds: predicted duration of the step, in seconds.
        lower_bound_s: no plan of these samples is faster, in seconds.
        solver: who found it ("fast", "homogeneous", "mip").
        planning_s: wall time spent to find it, in seconds.

    Raises:
        HeteroError: the groups of a micro-batch do not partition the ranks, or the samples of the plan are not exactly
            0, 1, 2, ... each once.
    """

    num_ranks: int
    micro_batches: tuple[MicroBatch, ...]
    seconds: float = 0.0
    lower_bound_s: float = 0.0
    solver: str = "fast"
    planning_s: float = 0.0

    def __post_init__(self) -> None:
        for index, micro_batch in enumerate(self.micro_batches):
            ranks = sorted(chain.from_iterable(group.ranks for group in micro_batch.groups))
            # counted first, so that a plan from a file with a huge number of ranks makes no huge list
            if len(ranks) != self.num_ranks or ranks != list(range(self.num_ranks)):
                raise HeteroError(
                    f"Micro-batch {index} uses ranks {ranks}: its groups must partition the {self.num_ranks} ranks."
                )
        samples = sorted(chain.from_iterable(group.samples for group in self.groups))
        if samples != list(range(len(samples))):
            wrong = next(s for i, s in enumerate(samples) if s != i)
            raise HeteroError(f"The plan does not hold each sample exactly once: look at sample {wrong}.")

    @property
    def groups(self) -> Iterable[Group]:
        """Return all groups of all micro-batches."""
        return (group for micro_batch in self.micro_batches for group in micro_batch.groups)

    @property
    def num_samples(self) -> int:
        """Count the samples of the step."""
        return sum(len(group.samples) for group in self.groups)

    @property
    def gap(self) -> float:
        """Say how far above the bound the plan may be, as a share: 0.02 is 'within 2 % of optimal'."""
        return self.seconds / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0

    def share(self, rank: int) -> tuple[Group, ...]:
        """Return this rank's group in each micro-batch."""
        return tuple(micro_batch.group_of(rank) for micro_batch in self.micro_batches)

    def digest(self) -> int:
        """Hash what is trained and how into 63 bits; they are equal on all ranks, or the step must not start.

        Predictions are left out: no rank trains otherwise for them, and a tensor of signed 64-bit integers carries 63.
        """
        decisions = [
            [(g.ranks, g.samples, g.method, g.ulysses_degree, g.activations) for g in m.groups]
            for m in self.micro_batches
        ]
        hashed = hashlib.sha256(json.dumps([self.num_ranks, decisions]).encode()).digest()
        return int.from_bytes(hashed[:8], "big") >> 1

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form (format hf-hetero-plan/1)."""
        return {
            "format": PLAN_FORMAT,
            "num_ranks": self.num_ranks,
            "micro_batches": [{"groups": [_group_to_dict(group) for group in m.groups]} for m in self.micro_batches],
            "seconds": self.seconds,
            "lower_bound_s": self.lower_bound_s,
            "solver": self.solver,
            "planning_s": self.planning_s,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Invert `to_dict`.

        Raises:
            HeteroError: another format, or a plan that breaks a law of this module.
        """
        if not isinstance(data, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] (a file may hold anything)
            raise HeteroError(f"A plan is a JSON object, not {data!r:.60}.")
        if data.get("format") != PLAN_FORMAT:
            raise HeteroError(f"Plan format {data.get('format')!r:.60} is unknown: expected {PLAN_FORMAT!r}.")
        try:
            micro_batches = tuple(MicroBatch(tuple(map(_group_from_dict, m["groups"]))) for m in data["micro_batches"])
            (num_ranks,) = _whole([data["num_ranks"]])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HeteroError(f"A plan is not as {PLAN_FORMAT!r} says: {error!r:.100}.") from error
        numbers = {name: data[name] for name in ("seconds", "lower_bound_s", "planning_s") if name in data}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise HeteroError(f"A plan's {name} is {value!r:.60}; it must be a number.")
        return cls(num_ranks=num_ranks, micro_batches=micro_batches, solver=str(data.get("solver", "fast")), **numbers)


def _group_to_dict(group: Group) -> dict[str, Any]:
    """Return a group's JSON-ready form, without what is None."""
    data: dict[str, Any] = {"ranks": list(group.ranks), "samples": list(group.samples), "method": group.method}
    optional = {"ulysses_degree": group.ulysses_degree, "activations": group.activations}
    return data | {name: value for name, value in optional.items() if value is not None}


def _group_from_dict(data: Mapping[str, Any]) -> Group:
    """Invert `_group_to_dict`, and raise whatever a mapping of something else raises."""
    method, inner = data.get("method", "ulysses"), data.get("ulysses_degree")
    if inner is not None:
        _whole([inner])
    return Group(_whole(data["ranks"]), _whole(data["samples"]), method, inner, data.get("activations"))


def _whole(numbers: Sequence[object]) -> tuple[int, ...]:
    """Return numbers from JSON that are all whole.

    Raises:
        TypeError: one of them is not.
    """
    if not set(map(type, numbers)) <= {int}:
        raise TypeError(f"{numbers!r:.60} are not all whole numbers")
    return cast("tuple[int, ...]", tuple(numbers))


@dataclass(frozen=True, slots=True)
class StepReport:
    """A `StepReport` says how one step went, as every rank knows it afterwards.

    Args:
        step: optimizer steps finished, this one included.
        plan: what was planned.
        lengths: tokens of each sample of the global batch.
        num_targets: tokens that had a label, over all samples.
        seconds: measured wall time from the step's first forward pass until its device has all gradients. What a GPU
            still had to do by then, such as the update of weights before, is in it; on a CPU that update is not.
        busy_s: measured seconds of each micro-batch (outer) on each rank (inner), without waiting for other groups.
        wait_s, plan_wait_s: seconds that the step waited for its plan and its data; for its plan alone.
        peak_bytes: peak memory of the fullest rank in forward and backward, in bytes; 0 where it is not measured.
        is_lockstep: all ranks met in every layer to gather its weights, so all of them measured the slowest group.
        expert_load: for each layer with experts, tokens of the busiest one by those of a mean one.
        unused_bytes: most that a rank's allocator held beyond the peak of what it had given out; 0: not measured.
        flops: operations that learning from these samples needs, whatever a plan computes twice; 0: not known.
        peak_flops: operations a second of all ranks' cards together, by their data sheet; None: not known.
        router_loss: of the step, without its coefficient, where a mixture of experts has one.
        repeats: how often the step was planned for less memory, and begun again, because memory had run out.
        forward_only: micro-batches without a backward pass, which take less than is predicted.
        planned_s: what the cost model charges, shaped as `busy_s`; 0 for a group of no samples, or that has no price.
        static_s: seconds of the best plan with one degree, by degree; empty where nobody has looked.
        sent_bytes: that all ranks sent each other inside layers, forward and backward; not gradients of weights.
        by_source: where rows are from -> sum of the losses of its targets, and how many these are.
        as_text: what each sample was planned as, in tokens of text that take as long; (): as its own tokens.
    """

    step: int
    plan: Plan
    lengths: tuple[int, ...]
    num_targets: int
    seconds: float
    busy_s: tuple[tuple[float, ...], ...]
    wait_s: float = 0.0
    plan_wait_s: float = 0.0
    peak_bytes: int = 0
    is_lockstep: bool = False
    expert_load: tuple[float, ...] = ()
    unused_bytes: int = 0
    repeats: int = 0
    router_loss: float | None = None
    flops: float = 0.0
    peak_flops: float | None = None
    forward_only: tuple[int, ...] = ()
    planned_s: tuple[tuple[float, ...], ...] = ()
    static_s: Mapping[int, float] = field(default_factory=dict[int, float])
    sent_bytes: int = 0
    by_source: Mapping[str, tuple[float, int]] = field(default_factory=dict[str, tuple[float, int]])
    as_text: tuple[int, ...] = ()

    @property
    def planned_lengths(self) -> tuple[int, ...]:
        """Return the lengths that the plan was made of, and that a cost model prices."""
        return self.as_text or self.lengths

    @property
    def num_tokens(self) -> int:
        """Count the tokens of the step."""
        return sum(self.lengths)

    @property
    def tokens_per_s(self) -> float:
        """Return tokens a second, over all ranks, waiting included."""
        total = self.seconds + self.wait_s
        return self.num_tokens / total if total > 0 else 0.0

    @property
    def mfu(self) -> float | None:
        """Return what the step needs by what all cards compute in its time at their peak; None: not known."""
        total = self.seconds + self.wait_s
        return self.flops / (total * self.peak_flops) if self.flops and self.peak_flops and total > 0 else None

    @property
    def idle_share(self) -> float | None:
        """Return the share of rank-seconds spent waiting for slowest groups; None where it was not measured."""
        return None if self.is_lockstep else idle_share(self.busy_s)


def idle_share(busy_s: Sequence[Sequence[float]]) -> float:
    """Return the idle share of rank-seconds if each micro-batch (outer) lasts as long as its slowest rank (inner)."""
    total = sum(len(ranks) * max(ranks, default=0.0) for ranks in busy_s)
    return 1 - sum(map(sum, busy_s)) / total if total > 0 else 0.0
