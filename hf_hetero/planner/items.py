"""Items are sequences that belong together, such as a pair: all of them go to one group of one micro-batch.

An item takes the memory of one sample with all its tokens, but its sequences do not attend to each other, so that its
squares are fewer. Plans are searched for as if each item were one sample, on a machine whose attention is as much
cheaper as those squares are fewer over the whole batch; then its groups are named by sequences, priced as what they
are, and given their methods. A bound takes the sequences apart: whatever keeps them together makes no plan faster.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from hf_hetero.costs import CostModel
from hf_hetero.errors import BadSample
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.planner import methods, policies
from hf_hetero.planner.basic import Search
from hf_hetero.planner.draft import with_each_group
from hf_hetero.planner.problem import Problem, checked_length, make_problem

Lengths = Sequence[int | Sequence[int]]
"""Tokens of each sample of a global batch; of an item, those of each of its sequences."""


def has_items(lengths: Lengths) -> bool:
    """Tell whether some entry is an item; a batch of numbers alone is one of samples."""
    return any(isinstance(entry, Sequence) for entry in lengths)


def sequences_of(plan: Plan, lengths: Lengths) -> Plan:
    """Name the samples of a plan by sequence: item after item, those of an item in their order, side by side.

    Args:
        plan: a sample is an item's position in `lengths`.
        lengths: of the global batch.
    """
    counts = [len(_sequences(entry)) for entry in lengths]
    first = list(accumulate(counts, initial=0))

    def of(group: Group) -> Group:
        numbers = (n for item in group.samples for n in range(first[item], first[item + 1]))
        return replace(group, samples=tuple(numbers))

    return with_each_group(plan, of)


def flat(lengths: Lengths) -> list[int]:
    """List the tokens of each sequence, item after item."""
    return [n for entry in lengths for n in _sequences(entry)]


def _sequences(entry: int | Sequence[int]) -> Sequence[int]:
    return entry if isinstance(entry, Sequence) else (entry,)


@dataclass(frozen=True)
class Items:
    """`Items` are a global batch of items, ready to be planned.

    Args:
        lengths: tokens of the sequences of each item.
        as_samples: each item as one sample, where attention costs as much less as there are fewer squares.
        as_sequences: each sequence as a sample of its own, at its true cost.
    """

    lengths: tuple[tuple[int, ...], ...]
    as_samples: Problem
    as_sequences: Problem

    def priced(self, plan: Plan, allowed: Collection[str]) -> Plan:
        """Give the groups of a plan of `as_samples` their fastest methods, and the plan its true seconds."""
        cost = self.as_sequences.cost
        by_sequence = methods.with_methods(cost, sequences_of(plan, self.lengths), self.as_sequences.batch, allowed)
        return self._named_by_item(by_sequence, plan)

    def kept(self, plan: Plan) -> Plan:
        """Give a plan its true seconds, and leave its groups alone."""
        seconds = self.as_sequences.cost.plan_seconds(sequences_of(plan, self.lengths), self.as_sequences.batch)
        return replace(plan, seconds=seconds)

    def _named_by_item(self, by_sequence: Plan, by_item: Plan) -> Plan:
        micro_batches = tuple(
            MicroBatch(tuple(replace(ours, samples=g.samples) for ours, g in zip(m.groups, n.groups, strict=True)))
            for m, n in zip(by_sequence.micro_batches, by_item.micro_batches, strict=True)
        )
        return replace(by_sequence, micro_batches=micro_batches)


def make_items(cost: CostModel, num_ranks: int, max_degree: int | None, lengths: Lengths) -> Items:
    """Check a batch of items.

    Raises:
        BadSample: an item without a sequence, or a length that is not a whole number from 1 to 2**40.
        InfeasibleBatch: an item whose tokens no degree can hold.
    """
    items: list[tuple[int, ...]] = []
    for number, entry in enumerate(lengths):
        sequences = _sequences(entry)
        if not sequences:
            raise BadSample(f"sample {number} is an item without a sequence. Drop it.")
        items.append(tuple(checked_length(number, length) for length in sequences))
    tokens = [sum(item) for item in items]
    squares = sum(n * n for item in items for n in item)
    share = squares / sum(n * n for n in tokens) if tokens else 1.0
    as_samples = make_problem(_with_attention(cost, share), num_ranks, max_degree, tokens)
    return Items(tuple(items), as_samples, make_problem(cost, num_ranks, max_degree, flat(items)))


def plan(items: Items, search: Search, allowed: Collection[str]) -> Plan:
    """Choose the fastest of several plans by item, none slower than one degree for all, and bound them by sequence."""
    found = policies.plan(items.as_samples, search, allowed)
    candidates = [items.priced(way, allowed) for way in (found, *policies.statics(items.as_samples).values())]
    return _bounded(items, min(candidates, key=lambda way: way.seconds), allowed)


def static(items: Items, degree: int | None, allowed: Collection[str]) -> Plan:
    """Find the best plan in which all groups have one degree, exchange heads, and do the same to hold their tokens.

    Args:
        degree: of all groups; None: whichever is fastest.
        allowed: methods that other plans may choose from; the bound holds for all of them.

    Raises:
        InfeasibleBatch: an item that groups of this degree cannot hold, whatever they do.
    """
    if degree is None:
        alike = static_plans(items).values()
        return _bounded(items, min(alike, key=lambda way: way.seconds), allowed)
    return _bounded(items, items.kept(policies.static(items.as_samples, degree, allowed)), allowed)


def static_plans(items: Items) -> dict[int, Plan]:
    """Return the best plan with each degree that holds the longest item, ascending: those of `static`, unbounded."""
    return {degree: items.kept(way) for degree, way in policies.statics(items.as_samples).items()}


def improve(items: Items, plan: Plan, search: Search, allowed: Collection[str]) -> Plan:
    """Make a plan faster within the limit, or leave it as it is; its bound stays."""
    cost, tokens = items.as_samples.cost, items.as_samples.batch
    as_samples = replace(plan, seconds=cost.plan_seconds(plan, tokens), lower_bound_s=0.0)
    better = items.priced(policies.improve(items.as_samples, as_samples, search, allowed), allowed)
    return replace(better, lower_bound_s=plan.lower_bound_s) if better.seconds < plan.seconds else plan


def _bounded(items: Items, plan: Plan, allowed: Collection[str]) -> Plan:
    return replace(plan, lower_bound_s=min(policies.bound(items.as_sequences, allowed), plan.seconds))


def _with_attention(cost: CostModel, share: float) -> CostModel:
    """Return the same machine, where attention takes only a share of its time."""
    activation_policies = {
        name: replace(policy, attention_s_per_token2=policy.attention_s_per_token2 * share)
        for name, policy in cost.activation_policies.items()
    }
    attention = cost.attention_s_per_token2 * share
    return replace(cost, attention_s_per_token2=attention, activation_policies=activation_policies)
