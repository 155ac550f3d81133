"""Layers that run in the backward pass run for the second time: they are recomputed. Here one can ask for it."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Return whether autograd is at work in this thread, as torch.utils.checkpoint itself asks."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
