"""What one rank has to tell reaches all, wherever they are; and nothing is taken for agreement that is none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch.distributed as dist
from helpers import run_ranks

from hf_hetero import HeteroError
from hf_hetero.errors import BadSample
from hf_hetero.ranks.agreement import any_of, broadcast, confirm_rows, confirm_step, gather, gather_objects, scatter
from hf_hetero.ranks.groups import GroupPool

ELSEWHERE = {
    "plan": lambda control: broadcast(lambda: 1, control),
    "step": lambda control: confirm_step(4, 123, 10, None, control),
    "report": lambda control: gather(range(20), control),
    "decision": lambda control: any_of([True], control),
    "results": lambda control: gather_objects("x", control),
    "dealing": lambda control: scatter([1, 2, 3] if dist.get_rank() == 0 else None, control),
}


class OwnError(HeteroError):
    """Cannot be made from its text alone."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row} is {why}")


class Mute(Exception):
    """Has no words."""

    def __str__(self) -> str:
        raise ValueError("no words")


def odd_error(kind: str) -> Exception:
    class ShardError(Exception):
        pass

    return {
        "local": ShardError("shard 3 is rotten"),
        "own": OwnError(8, "rotten"),
        "key": KeyError("tokens"),
        "memory": MemoryError(),
        "mute": Mute(),
        "long": ValueError("x" * 10**6),
    }[kind]


def fails_on_rank_1(elsewhere: str, kind: str = "own") -> None:
    control = GroupPool((), 20, 20).control
    if dist.get_rank() == 1:
        confirm_step(4, 0, 0, odd_error(kind), control)
    ELSEWHERE[elsewhere](control)


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_an_error_reaches_ranks_that_are_elsewhere(elsewhere: str) -> None:
    """A rank that fails while it reads a step is heard by those that wait for something else: one error on all."""
    errors = run_ranks(fails_on_rank_1, 3, elsewhere, expect_errors=True, timeout_s=60)
    assert [str(error) for error in errors] == ["Rank 1: OwnError: row 8 is rotten"] * 3
    assert {type(error) for error in errors} == {HeteroError}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("local", "Rank 1: ShardError: shard 3 is rotten"),
        ("key", "Rank 1: KeyError: 'tokens'"),
        ("memory", "Rank 1: MemoryError"),
        ("mute", r"Rank 1: Mute: \(its text cannot be read: ValueError\)"),
        ("long", r"Rank 1: ValueError: x{19000,20000}\.\.\. \(1,000,012 characters\)"),
    ],
)
def test_any_error_can_be_told(kind: str, words: str) -> None:
    """Whatever a dataset raises: its kind and its words, on all ranks."""
    for error in run_ranks(fails_on_rank_1, 2, "step", kind, expect_errors=True, timeout_s=60):
        assert type(error) is HeteroError
        assert re.match(words, str(error)), str(error)[:200]


def come_apart() -> None:
    control = GroupPool((), 20, 20).control
    if dist.get_rank() == 1:
        any_of([False], control)
    confirm_step(4, 123, 10, None, control)


def test_ranks_that_come_apart() -> None:
    """Ranks that are at different places say so, instead of taking one message for another."""
    for error in run_ranks(come_apart, 2, expect_errors=True, timeout_s=60):
        words = "apart: rank 0 at the exchange before a step, rank 1 at the exchange of what comes next"
        assert words in str(error), error


def known_to_all() -> str:
    """An error that all ranks raised is not told again: others may have ended."""
    control = GroupPool((), 20, 20).control
    with pytest.raises(HeteroError) as caught:
        broadcast(lambda: 1 // 0, control)
    if dist.get_rank() == 1:
        return "gone"
    with pytest.raises(HeteroError) as again:
        confirm_step(4, 0, 0, caught.value, control)
    return "same" if again.value is caught.value else str(again.value)


def test_an_error_is_told_once() -> None:
    """Each rank raises it where it stands."""
    assert run_ranks(known_to_all, 2, timeout_s=60) == ["same", "gone"]


ROWS = {
    "same": [{3: 5, 7: 0}, {3: 5}, {7: 0}],
    "one reader": [{3: 5}, {}, {}],
    "nobody": [{}, {}, {}],
    "differs": [{3: 5, 7: 2**63 - 1}, {3: 5}, {7: 0}],
    "all differ": [{3: 1, 7: 1}, {3: 2, 7: 2}, {3: 1}],
}


def compare_rows(case: str) -> None:
    confirm_rows(6, (3, 7), ROWS[case][dist.get_rank()], GroupPool((), 20, 20).control)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("same", None),
        ("one reader", None),
        ("nobody", None),
        ("differs", r"Step 6: row 7 differs .*: ranks \[0\] and ranks \[2\] read other tokens or labels\. .*seed"),
        ("all differ", r"row 3 differs .*: ranks \[0, 2\] and ranks \[1\] .*\(1 more rows differ, too\)"),
    ],
)
def test_rows_are_compared(case: str, words: str | None) -> None:
    """Ranks that share a row must have read the same; who did not, and what to do, is said on all ranks."""
    found = run_ranks(compare_rows, 3, case, expect_errors=True, timeout_s=60)
    if words is None:
        assert found == [None] * 3
        return
    for error in found:
        assert type(error) is BadSample
        assert re.search(words, str(error)), str(error)


def exchanges() -> Any:
    control = GroupPool((), 20, 20).control
    rank = dist.get_rank()
    values = list(range(rank, rank + 9))
    parts = [{"for": r} for r in range(2)] if rank == 0 else None
    return any_of([rank == 1, False, True], control), gather(values, control), scatter(parts, control)


def test_what_is_exchanged() -> None:
    """Flags are joined; integers may be more than the first message holds; each rank gets its own part."""
    for rank, (flags, rows, part) in enumerate(run_ranks(exchanges, 2, timeout_s=60)):
        assert flags == [True, False, True]
        assert rows == [list(range(9)), list(range(1, 10))]
        assert part == {"for": rank}


def deal_what_cannot_be_sent() -> None:
    scatter([1, lambda: 1] if dist.get_rank() == 0 else None, GroupPool((), 20, 20).control)


def test_examples_that_cannot_be_sent() -> None:
    """The reason is said on every rank."""
    for error in run_ranks(deal_what_cannot_be_sent, 2, expect_errors=True, timeout_s=60):
        assert "Examples cannot be sent to other ranks: " in str(error), error
