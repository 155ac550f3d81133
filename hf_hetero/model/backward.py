"""Is this the backward pass? What runs in it runs for the second time: layers that are recomputed."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Whether autograd is at work in this thread, as torch.utils.checkpoint itself asks."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
