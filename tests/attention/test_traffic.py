"""Exchanges: none is repeated by recompute, and one that fails says where, on every rank that is left."""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention.test_methods import METHODS, case_of, context_of, rows_of
from helpers import come_late, give_up, often, run_ranks
from torch.distributed import _functional_collectives as collectives
from torch.utils.checkpoint import checkpoint

from hf_hetero.attention import traffic
from hf_hetero.attention.kernels.contract import Scores
from hf_hetero.attention.methods import attend
from hf_hetero.errors import CollectiveFailed
from hf_hetero.ranks import groups
from hf_hetero.ranks.groups import GroupPool


def count_exchanges() -> list[str]:
    """From now on, this list grows by the name of each exchange that this rank starts."""
    started: list[str] = []
    originals = {"all-to-all": collectives.all_to_all_single, "shift": dist.batch_isend_irecv}

    def counting(name: str) -> Any:
        def call(*args: Any) -> Any:
            started.append(name)
            return originals[name](*args)

        return call

    collectives.all_to_all_single = counting("all-to-all")
    dist.batch_isend_irecv = counting("shift")
    return started


def two_layers(method: str, pool: GroupPool, how: str, layers: tuple[int, int] = (0, 1)) -> list[torch.Tensor]:
    """Gradients of two layers of attention, one on the other's output, recomputed in backward or not."""
    case = case_of("long and short", "mha", "plain")
    context = context_of(case, method, pool, 2, keeps=how in ("kept", "reentrant"))
    rows = rows_of(context.layout, context.group_rank)
    q, k, v = (x[rows].requires_grad_() for x in case.tensors()[:3])
    x = q
    for layer in layers:

        def attention(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = layer) -> torch.Tensor:
            return attend(x.sin(), k.cos(), v.tan(), Scores(0.3), context.at(layer))

        x = attention(x, k, v) if how == "plain" else checkpoint(attention, x, k, v, use_reentrant=how == "reentrant")
    return list(torch.autograd.grad(x.square().sum(), [q, k, v]) if how != "reentrant" else backward(x, q, k, v))


def backward(x: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    x.square().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def exchanges_of(how: str, layers: tuple[int, int]) -> list[tuple[int, list[torch.Tensor]]]:
    started, pool = count_exchanges(), GroupPool({2, 4}, 30, 30)
    found: list[tuple[int, list[torch.Tensor]]] = []
    for method in METHODS[4]:
        started.clear()
        found.append((0, two_layers(method, pool, how, layers)))
        found[-1] = (len(started), found[-1][1])
    pool.close()
    return found


def test_recompute_repeats_no_exchange() -> None:
    """With gradient checkpointing of either kind, each method exchanges as often as without, to the same gradients.

    Nothing is kept of a layer that is called twice, because its calls look alike: it exchanges again, and is right.
    """
    plain = run_ranks(exchanges_of, 4, "plain", (0, 1))
    twice = run_ranks(exchanges_of, 4, "kept", (0, 0))
    for how, more in (("kept", False), ("reentrant", False), ("forgotten", True)):
        for rank, found in enumerate(run_ranks(exchanges_of, 4, how, (0, 1))):
            for number, (count, gradients) in enumerate(found):
                expected, exact = plain[rank][number]
                assert (count > expected) if more else (count == expected), (how, METHODS[4][number], count, expected)
                assert all(torch.equal(x, y) for x, y in zip(gradients, exact, strict=True))
    for rank, found in enumerate(twice):
        for number, (count, gradients) in enumerate(found):
            expected, exact = plain[rank][number]
            assert count > expected
            assert all(torch.equal(x, y) for x, y in zip(gradients, exact, strict=True))


def fail(method: str, how: str) -> str:
    pool = GroupPool({2, 4}, 3, 600)
    case = case_of("one long", "mha", "plain")
    context = context_of(case, method, pool, 2, step=7, micro_batch=1)
    rows = rows_of(context.layout, context.group_rank)
    q, k, v = (x[rows] for x in case.tensors()[:3])
    if dist.get_rank() == 3:
        if how == "dead":
            os._exit(17)
        come_late(3)
        return "late"
    with pytest.raises(CollectiveFailed) as caught:
        attend(q, k, v, Scores(0.3), context.at(5))
    if how == "late":
        give_up()
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *((method, "dead") for method in METHODS[4]),
        ("ring", "late"),
        *(pytest.param(method, "late", marks=pytest.mark.slow) for method in METHODS[4] if method != "ring"),
    ],
)
def test_a_lost_rank_is_named(method: str, how: str) -> None:
    """A rank that died, or is later than the timeout: the others say in which exchange of which layer they missed it.

    With blocks of ranks, the block without the lost rank notices at its first exchange with the other block.
    """
    words = run_ranks(fail, 4, method, how, expect_errors=True, timeout_s=90)
    for said in words[:3]:
        assert "step 7, micro-batch 1, layer 5, ranks [0, 1, 2, 3]" in str(said), said
        assert any(name in str(said) for name in ("all-to-all", "ring, round")), said


def heard_while_waiting(method: str) -> str:
    """What this rank says while rank 3 is late."""
    heard = io.StringIO()
    logging.getLogger("hf_hetero").addHandler(logging.StreamHandler(heard))
    groups.WORD_AFTER_S = 0.4  # type: ignore[misc]
    pool = GroupPool({2, 4}, 30, 30)
    context = context_of(case_of("one long", "mha", "plain"), method, pool, 2, step=7, micro_batch=1, waits=pool.waits)
    rows = rows_of(context.layout, context.group_rank)
    q, k, v = (x[rows].requires_grad_() for x in case_of("one long", "mha", "plain").tensors()[:3])
    out = attend(q, k, v, Scores(0.3), context.at(5))
    if dist.get_rank() == 3:
        time.sleep(2.5)
    torch.autograd.grad(out.square().sum(), [q, k, v])
    pool.close()
    assert "waits" not in [thread.name for thread in threading.enumerate()]
    return heard.getvalue()


@pytest.mark.parametrize("method", often(METHODS[4], "ulysses", "ring"))
def test_a_long_wait_says_so(method: str) -> None:
    """While a rank is late, two of its group say where they wait, and how long they may."""
    heard = run_ranks(heard_while_waiting, 4, method, timeout_s=60)
    assert heard[2:] == ["", ""]
    for rank, said in enumerate(heard[:2]):
        assert f"Rank {rank} has waited" in said, heard
        assert "of step 7, micro-batch 1, layer 5, ranks [0, 1, 2, 3], and waits on, as long as" in said
        assert "HeteroConfig.group_timeout_s" in said
    assert any(word in heard[0] for word in ("all-to-all", "ring in backward, round"))


class Batching:
    """As a group on NCCL, whose messages torch begins between two calls; its backend may have been broken off."""

    def __init__(self, broken: str | None = None) -> None:
        self.broken, self.num_open = broken, 0

    def _start_coalescing(self, device: torch.device) -> None:
        self.num_open += 1

    def _end_coalescing(self, device: torch.device) -> None:
        self.num_open -= 1
        if self.broken == "the end":
            raise RuntimeError("NCCL communicator was aborted")

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """One message of the batch."""
        if self.broken == "a message":
            raise RuntimeError("NCCL communicator was aborted")


@pytest.mark.parametrize("broken", [None, "a message", "the end"])
def test_no_batch_is_left_open(broken: str | None) -> None:
    """What a thread calls within an open batch is never sent, in any step; torch's own call leaves it open."""
    group: Any = Batching(broken)
    op: Any = SimpleNamespace(group=group, tensor=torch.zeros(1))

    def torchs_own(ops: list[Any]) -> list[Any]:
        with dist.distributed_c10d._coalescing_manager(group, torch.device("cpu"), async_ops=True):
            group.begin()
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", torchs_own)
        for begun in (torchs_own, traffic._begun):
            with nullcontext() if broken is None else pytest.raises(RuntimeError, match="was aborted"):
                begun([op])
            if begun is torchs_own and broken == "a message":
                assert group.num_open == 1
                dist.distributed_c10d._world.pg_coalesce_state.pop(group)
                group.num_open = 0
            assert group.num_open == 0
            assert group not in dist.distributed_c10d._world.pg_coalesce_state
