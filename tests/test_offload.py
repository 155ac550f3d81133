"""Tensors that wait in host memory come back as they were, in bundles, the next one on its way before it is asked for.

What a GPU adds, copies beside the computation, is in `tests/gpu`.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from hf_hetero.offload import HostStore, stream_for

CPU = torch.device("cpu")


class Watched(HostStore):
    """Notes which bundles are brought."""

    def __init__(self) -> None:
        super().__init__(CPU, 3, 4)
        self.brought: list[int] = []

    def _bring(self, parcel: object) -> None:
        self.brought.append(parcel.bundle)  # type: ignore[attr-defined]
        super()._bring(parcel)  # type: ignore[arg-type]


def test_what_is_put_comes_back() -> None:
    """A copy, equal to what was put whatever became of that; as often as it is asked for."""
    store, x = HostStore(CPU, 3, 4), torch.arange(12.0).view(1, 3, 4)
    parcel, expected = store.put(x), x.clone()
    x.zero_()
    for _ in range(2):
        assert torch.equal(store.get(parcel), expected)
    assert store.get(parcel).data_ptr() != store.get(parcel).data_ptr()
    assert stream_for(CPU) is None


def test_the_bundle_before_is_on_its_way() -> None:
    """With the first tensor of a bundle come the others of it, and those of the bundle before."""
    store = Watched()
    bundles = [[store.put(torch.full((2,), 1.0 * n), opens=True), store.put(torch.ones(1))] for n in range(4)]
    assert [store.get(bundles[3][0]).tolist(), store.brought] == [[3.0, 3.0], [3, 3, 2, 2]]
    store.get(bundles[3][1])
    assert store.brought == [3, 3, 2, 2, 3]  # what was given away is not there any more, and not waited for
    assert store.get(bundles[2][0]).tolist() == [2.0, 2.0]
    assert store.brought[5:] == [1, 1]
    store.get(bundles[0][0])
    assert store.brought[-1] == 0


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
