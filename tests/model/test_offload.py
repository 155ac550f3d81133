"""Tensors that wait in host memory come back as they were, in bundles, the next one on its way before it is asked for.

What a GPU adds, copies beside the computation, is in `tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import pytest
import torch
from helpers import LENGTHS, ScriptedTrainer, run_ranks, samples, scripted, tiny_model, trained
from torch.utils.checkpoint import checkpoint

from hf_hetero import Group, MicroBatch, Plan
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.model.offload import HostStore, stream_for

CPU = torch.device("cpu")


class Watched(HostStore):
    """Notes which bundles are brought."""

    def __init__(self) -> None:
        super().__init__(CPU, 3, 4)
        self.brought: list[int] = []

    def _copy_back(self, saved: object) -> None:
        self.brought.append(saved.bundle)  # type: ignore[attr-defined]
        super()._copy_back(saved)  # type: ignore[arg-type]


def test_what_is_put_comes_back() -> None:
    """A copy, equal to what was put whatever became of that; as often as it is asked for."""
    store, x = HostStore(CPU, 3, 4), torch.arange(12.0).view(1, 3, 4)
    saved, expected = store.put(x), x.clone()
    x.zero_()
    for _ in range(2):
        assert torch.equal(store.get(saved), expected)
    assert store.get(saved).data_ptr() != store.get(saved).data_ptr()
    assert stream_for(CPU) is None


def test_the_bundle_before_is_on_its_way() -> None:
    """With the first tensor of a bundle come the others of it, and those of the bundle before; each of them once."""
    store = Watched()
    bundles = [[store.put(torch.full((2,), 1.0 * n), opens=True), *map(store.put, torch.eye(2))] for n in range(4)]
    assert store.get(bundles[3][0]).tolist() == [3.0, 3.0]
    assert store.brought == [3, 3, 3, 2, 2, 2]
    assert [store.get(saved).tolist() for saved in bundles[3][1:]] == [[1.0, 0.0], [0.0, 1.0]]
    assert store.brought == [3, 3, 3, 2, 2, 2]
    assert store.get(bundles[2][0]).tolist() == [2.0, 2.0]
    assert store.brought[6:] == [1, 1, 1]
    store.get(bundles[0][0])
    assert store.brought[9:] == [0, 0, 0]
    assert [saved.on_device is None for saved in bundles[3] + bundles[0]] == [True] * 4 + [False] * 2


def test_what_nobody_can_ask_for_is_not_brought() -> None:
    """A saved tensor that its owner let go of stays away, and its memory is free."""
    store = Watched()
    first, second = store.put(torch.ones(2), opens=True), store.put(torch.ones(2))
    last, host = store.put(torch.ones(2), opens=True), ref(second.host)
    del second
    assert host() is None
    store.get(last)
    assert store.brought == [1, 0]
    store.get(first)
    assert store.brought == [1, 0]


def test_hidden_states_that_autograd_keeps() -> None:
    """Inputs of recomputed layers are put away, each in its bundle; other shapes are not; gradients stay."""
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.GELU(), torch.nn.Linear(9, 4)) for _ in range(3)]
    x = torch.randn(1, 3, 4, requires_grad=True)

    def run() -> torch.Tensor:
        out: torch.Tensor = x
        for layer in layers:
            out = checkpoint(layer, out, use_reentrant=False)  # type: ignore[assignment]
        return out.square().sum()

    expected = torch.autograd.grad(run(), [x, *layers[0].parameters()])
    store = Watched()
    with store.hooks():
        loss = run()
    found = torch.autograd.grad(loss, [x, *layers[0].parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    # the last layer's output, kept by the square, and each layer's input
    assert sorted(set(store.brought), reverse=True) == [3, 2, 1, 0]
    assert len(store.brought) == 4


class Planner:
    """All samples to one group of two ranks that offloads."""

    def __init__(self, method: str) -> None:
        self._method = method

    def plan(self, lengths: Sequence[int]) -> Plan:
        halves = [tuple(range(len(lengths)))[n::2] for n in range(2)]
        groups = [Group((0, 1), half, self._method, activations="offload") for half in halves]
        return Plan(2, tuple(MicroBatch((group,)) for group in groups), seconds=1.0, lower_bound_s=1.0)


def offloading(method: str) -> dict[str, int]:
    """In a real step: tensors put away, copies back, tensors given, and tensors on the device beyond their turn."""
    counts = {"put": 0, "brought": 0, "given": 0, "left": 0, "most in a bundle": 0}
    stores: set[HostStore] = set()

    class Trainer(ScriptedTrainer):
        def _plan_source(self) -> PlanSource:
            return scripted(Planner(method))

    def on_device(store: HostStore, first: int) -> int:
        known = [reference() for bundle in store._bundles[first:] for reference in bundle]  # pyright: ignore[reportPrivateUsage]
        return sum(saved is not None and saved.on_device is not None for saved in known)

    def counting(name: str, count: str) -> Any:
        call = getattr(HostStore, name)

        def counted(store: HostStore, *args: Any, **options: Any) -> Any:
            stores.add(store)
            counts[count] += 1
            if name == "get":
                counts["left"] += on_device(store, args[0].bundle + 1)
                counts["most in a bundle"] = max(counts["most in a bundle"], len(store._bundles[args[0].bundle]))  # pyright: ignore[reportPrivateUsage]
            return call(store, *args, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("put", "put"), ("get", "given"), ("_copy_back", "brought")):
            patch.setattr(HostStore, name, counting(name, count))
        trained(tiny_model(), samples(LENGTHS), Trainer, max_steps=1)
    counts["left"] += sum(on_device(store, 0) for store in stores)
    return counts


def offloading_by_each_method() -> dict[str, dict[str, int]]:
    return {method: offloading(method) for method in ("ulysses", "gather", "ring")}


def test_each_tensor_comes_back_once() -> None:
    """In training: as many copies back as tensors put away, and none on the device after its layer's turn."""
    for rank in run_ranks(offloading_by_each_method, 2):
        for method, found in rank.items():
            assert found["put"] == found["brought"] == found["given"] > 0, (method, found)
            assert found["left"] == 0, (method, found)
        assert rank["ulysses"]["most in a bundle"] == 3, rank
