"""However ranks are grouped: random groups, random masks, idle ranks, each fixed split; the gradients are the same.

What slime, Automodel and others test for equal groups (loss and gradients under every data x context-parallel split,
packed samples that do not see each other, ranks without tokens or targets), here for unequal ones. And all ranks of a
group meet in the same exchanges in the same order, or they would wait for each other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    IGNORE,
    crossing,
    largest_difference,
    often,
    reference_steps,
    run_ranks,
    scripted,
    tiny_model,
    trained,
    trainer_order,
)

from hf_hetero import Group, HeteroTrainer, MicroBatch, Plan
from hf_hetero.attention import traffic
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.plan import METHODS

NUM_ROWS, BATCH, NUM_STEPS = 36, 12, 12
Shape = list[tuple[int, ...]]


def masked_samples() -> list[dict[str, list[int]]]:
    """Random lengths; labels masked at the front, in stretches, not at all, or all of them."""
    chance, found = random.Random(11), []
    for _ in range(NUM_ROWS):
        length = 1 + int(50 * chance.random() ** 2)
        ids = [chance.randrange(3, 97) for _ in range(length)]
        kind = chance.randrange(4)
        hidden = {0: lambda t, n=length: t < n // 2, 1: lambda t: t // 3 % 2, 2: lambda _: False, 3: lambda _: True}[
            kind
        ]
        found.append({"input_ids": ids, "labels": [IGNORE if hidden(t) else x for t, x in enumerate(ids)]})
    return found


def random_shape(chance: random.Random, first: int, size: int) -> Shape:
    """Aligned blocks that cover so many ranks."""
    if size == 1 or chance.random() < 0.4:
        return [tuple(range(first, first + size))]
    half = size // 2
    return [*random_shape(chance, first, half), *random_shape(chance, first + half, half)]


class AnyGrouping:
    """Plans with random groups, methods and micro-batches; samples anywhere, so that some groups have none.

    Args:
        shape: the groups of every micro-batch; None: random ones.
    """

    def __init__(self, shape: Shape | None = None) -> None:
        self.shape = shape

    def plan(self, lengths: Sequence[int]) -> Plan:
        chance = random.Random(sum(lengths) * 31 + lengths[0])
        num_micro_batches = chance.randrange(1, 5)
        homes = [chance.randrange(num_micro_batches) for _ in lengths]
        micro_batches = []
        for m in range(num_micro_batches):
            mine = [sample for sample, home in enumerate(homes) if home == m]
            shape = self.shape or random_shape(chance, 0, 4)
            if not mine:
                continue
            filled = [chance.randrange(len(shape)) for _ in mine]
            groups = [
                Group(
                    ranks,
                    tuple(sample for sample, n in zip(mine, filled, strict=True) if n == number),
                    *crossing(ranks, chance.randrange(12)),
                )
                for number, ranks in enumerate(shape)
            ]
            micro_batches.append(MicroBatch(tuple(groups)))
        return Plan(4, tuple(micro_batches), seconds=1.0, lower_bound_s=1.0)


FIXED: dict[str, Shape | None] = {
    "random": None,
    "4 x 1": [(0,), (1,), (2,), (3,)],
    "2 x 2": [(0, 1), (2, 3)],
    "1 x 4": [(0, 1, 2, 3)],
}


def train(name: str) -> dict[str, Any]:
    class Trainer(HeteroTrainer):
        def _plan_source(self) -> PlanSource:
            return scripted(AnyGrouping(FIXED[name]))

    exchanges: list[tuple[str, str]] = []
    named = traffic.named

    @contextmanager
    def recorded(operation: str, where: Any, **options: Any) -> Iterator[None]:
        exchanges.append((operation, where))
        with named(operation, where, **options):
            yield

    traffic.named = recorded
    options = {"max_steps": NUM_STEPS, "per_device_train_batch_size": BATCH // dist.get_world_size()}
    found = trained(tiny_model(dtype=torch.float64), masked_samples(), Trainer, **options)
    return {**found, "exchanges": exchanges}


@pytest.mark.parametrize("name", often(FIXED, "random"))
def test_gradients_are_the_same(name: str) -> None:
    """Twelve steps under random groupings, or under a fixed split: gradients of each are the per-sample reference's."""
    steps = trainer_order(NUM_ROWS, BATCH, 7, NUM_STEPS)
    expected = reference_steps(tiny_model(dtype=torch.float64), masked_samples(), steps)
    ranks = run_ranks(train, 4, name)
    for rank in ranks:
        for ours, theirs in zip(rank["gradients"], expected["gradients"], strict=True):
            assert largest_difference(ours, theirs) < 1e-11
        assert largest_difference(rank["weights"], expected["weights"]) < 1e-11
    check_exchanges([rank["exchanges"] for rank in ranks], expect_some=name != "4 x 1")


def check_exchanges(ranks: list[list[tuple[str, str]]], expect_some: bool) -> None:
    """Of the exchanges that name a group, each member has the same, in the same order."""
    groups = {where.rpartition("ranks ")[2] for exchanges in ranks for _, where in exchanges}
    assert bool(groups) == expect_some
    for group in groups:
        members = [rank for rank in range(4) if str(rank) in group]
        assert len(members) > 1
        orders = [[one for one in ranks[rank] if one[1].endswith(f"ranks {group}")] for rank in members]
        assert all(order == orders[0] for order in orders)
        outside = [rank for rank in range(4) if rank not in members]
        assert not any(one[1].endswith(f"ranks {group}") for rank in outside for one in ranks[rank])


def test_random_groupings_are_many() -> None:
    """Every degree, every method, groups without samples, and samples without targets are among them."""
    data, plans = masked_samples(), []
    for rows in trainer_order(NUM_ROWS, BATCH, 7, NUM_STEPS):
        plans.append(AnyGrouping().plan([len(data[row]["input_ids"]) for row in rows]))
    groups = [group for plan in plans for group in plan.groups]
    assert {group.degree for group in groups} == {1, 2, 4}
    assert {group.method for group in groups if group.degree > 1} == set(METHODS)
    assert any(not group.samples for group in groups)
    assert len({len(plan.micro_batches) for plan in plans}) >= 3
    assert any(all(label == IGNORE for label in row["labels"][1:]) for row in data)
