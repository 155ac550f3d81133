"""A layer that runs in the backward pass runs for the second time: it is recomputed. This tells when that is so."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Return whether autograd is at work in this thread, as torch.utils.checkpoint itself asks."""
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]
