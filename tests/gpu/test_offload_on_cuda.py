"""On a GPU, what is offloaded leaves the device's memory, comes back in time, and nothing waits for the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_hetero.model.offload import HostStore, stream_for

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, LAYERS = 4096, 1024, 8


def layers() -> Any:
    torch.manual_seed(0)
    made = [torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.GELU()) for _ in range(LAYERS)]
    return torch.nn.ModuleList(made).cuda()


def step(model: Any, x: torch.Tensor, store: HostStore | None) -> tuple[list[torch.Tensor], int]:
    """Gradients, and bytes on the device after the forward pass."""
    before = torch.cuda.memory_allocated()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if store is None else store.hooks()
    with hooks:
        out: Any = x
        for layer in model:
            out = checkpoint(layer, out, use_reentrant=False)
    loss = out.sum()
    del out
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(loss, [x, *model.parameters()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return list(found), held


def test_offloaded_inputs_leave_the_device_and_come_back() -> None:
    """The same gradients to the bit; one hidden state for each layer less is on the device; backward never waits."""
    device, model = torch.device("cuda", torch.cuda.current_device()), layers()
    x = torch.randn(1, TOKENS, HIDDEN, device=device, requires_grad=True)
    expected, plain = step(model, x, None)
    store = HostStore(device, TOKENS, HIDDEN, stream_for(device))
    found, held = step(model, x, store)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    state_bytes = TOKENS * HIDDEN * 4
    assert plain - held >= (LAYERS - 2) * state_bytes
