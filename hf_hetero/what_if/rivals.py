"""Rivals are the other ways to share a batch, each with what its users would set for the whole run.

All of them are priced by the cost model that prices ours, and keep its memory. Groups of those that are built on
Megatron-Core, which offers several ways to cross ranks, take the fastest that fits, each its own; the others exchange
heads (Ulysses). Where groups may do something to hold more tokens, they do the least that holds the context,
everywhere, as a user would set it for a whole run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hf_hetero.costs import CostModel
from hf_hetero.plan import Plan
from hf_hetero.planner import Planner
from hf_hetero.planner.methods import with_methods
from hf_hetero.what_if.dynamic_cp import dynamic_cp
from hf_hetero.what_if.megatron import megatron, sizes_of
from hf_hetero.what_if.one_degree import first_come, in_rows, verl, wlb_llm

LIMITS = (1, 2, 4, 8)
"""Parts of a rank's memory that Megatron's limit of tokens a rank may be set to."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A `Priced` plan is one of a rival's for a batch, with what says how long it takes.

    Args:
        way: the rival's name.
        setting: what a user of it sets for a run; of all settings, the fastest is the rival's.
        note: the setting, for people.
        plan: who shares what.
        lengths: tokens of each sample, padding included.
        cost: machine and model, under what groups do to hold more tokens.
    """

    way: str
    setting: int
    note: str
    plan: Plan
    lengths: Sequence[int]
    cost: CostModel


@dataclass(frozen=True, slots=True)
class Rivals:
    """`Rivals` plan each batch in every other way.

    Args:
        planner: machine, model, ranks, degrees and methods.
        context_tokens: the longest sample that the run must be able to take.
    """

    planner: Planner
    context_tokens: int

    def plans(self, lengths: Sequence[int]) -> Iterator[Priced]:
        """Plan a batch; a rival that has settings to choose among gives a plan for each."""
        yield from self._dynamic(lengths)
        yield from self._balanced(lengths)
        num_ranks, context = self.planner.num_ranks, self.context_tokens
        degree, under = next(iter(self._held()))
        note = f"degree {degree}"
        plan = first_come(lengths, under, num_ranks, degree)
        yield Priced("first-come", degree, note, plan, lengths, under)
        plan, padded = in_rows(lengths, under, num_ranks, degree, context)
        yield Priced("padded-rows", degree, note, plan, padded, under)

    def _dynamic(self, lengths: Sequence[int]) -> Iterator[Priced]:
        """Plan as Megatron: as released, for each limit of tokens a rank; and tuned by us for each batch.

        What is tuned is the fastest of our own balancing and of the release's at any limit, so that it is the stronger.
        """
        num_ranks, degrees = self.planner.num_ranks, self.planner.degrees
        *_, (_, under) = self._held()
        tuned = [self._crossing(dynamic_cp(lengths, under, num_ranks, degrees), lengths, under)]
        largest = sizes_of(num_ranks, degrees)[-1]
        for limit in (under.capacity_tokens // part for part in LIMITS):
            if limit * largest >= self.context_tokens:
                plan = self._crossing(megatron(lengths, num_ranks, degrees, limit), lengths, under)
                yield Priced("megatron", limit, f"as released, {limit:,} tokens a rank", plan, lengths, under)
                tuned.append(plan)
        best = min(tuned, key=lambda plan: plan.seconds)
        yield Priced("dynamic-cp", 0, "tuned by us for each batch", best, lengths, under)

    def _balanced(self, lengths: Sequence[int]) -> Iterator[Priced]:
        """Plan with each degree that holds the context as those do who balance the work of its groups."""
        num_ranks = self.planner.num_ranks
        for degree, under in self._held():
            note = f"as released, degree {degree}"
            plan = self._crossing(wlb_llm(lengths, under, num_ranks, degree), lengths, under)
            yield Priced("wlb-llm", degree, note, plan, lengths, under)
            yield Priced("verl", degree, note, verl(lengths, under, num_ranks, degree), lengths, under)

    def _held(self) -> Iterator[tuple[int, CostModel]]:
        """List the degrees that hold the context, and the cost model of groups that do the least for it at each."""
        models = self.planner.cost_model.by_activations.values()
        for degree in self.planner.degrees:
            under = next((model for model in models if self.context_tokens <= degree * model.capacity_tokens), None)
            if under is not None:
                yield degree, under

    def _crossing(self, plan: Plan, lengths: Sequence[int], cost: CostModel) -> Plan:
        """Let each group cross its ranks in the fastest way that the planner may choose, too."""
        return with_methods(cost, plan, lengths, self.planner.methods)
