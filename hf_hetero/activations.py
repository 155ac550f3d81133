"""What a group does to hold more tokens, done to the model: layers recomputed, inputs offloaded, MLPs in chunks.

The switches are attributes of the layers, set for one micro-batch: transformers documents its own
(`GradientCheckpointingLayer`), and `chunked_mlp` has one. They stay set until backward is through, because recomputed
layers must do what they did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_hetero import chunked_mlp
from hf_hetero.chunked_mlp import ChunkedMLP
from hf_hetero.offload import HostStore, stream_for
from hf_hetero.plan import ACTIVATIONS


class Activations:
    """The layers of a model, and what they can do.

    Args:
        model: a model of transformers, before or after it was wrapped.
        recomputes: all layers are recomputed anyway, whoever arranges it.
        in_chunks: MLPs of recomputed layers go chunk by chunk.
        compiled: the model is; a compiler sees through none of this.

    Attributes:
        policies: what groups may do beyond what all of them do; others change nothing.
    """

    def __init__(self, model: torch.nn.Module, recomputes: bool, in_chunks: bool, compiled: bool) -> None:
        modules = () if compiled else model.modules()
        self._layers = [m for m in modules if isinstance(m, GradientCheckpointingLayer)]
        self._recomputes, self._stream = recomputes, None
        found = map(chunked_mlp.install, self._layers) if in_chunks else ()
        self._mlps: list[ChunkedMLP] = [mlp for mlp in found if mlp is not None]
        able = ACTIVATIONS if self._layers else ()
        self.policies = tuple(policy for policy in able if policy != "recompute" or not recomputes)

    @property
    def chunked_mlps(self) -> bool:
        """Whether recomputed layers have MLPs that go chunk by chunk."""
        return bool(self._mlps)

    def recomputed(self, policy: str | None) -> bool:
        """Whether layers are computed again in backward, in a group that does this."""
        return self._recomputes or policy in self.policies

    def store(self, policy: str | None, device: torch.device, num_tokens: int, hidden: int) -> HostStore | None:
        """Where a group that offloads puts what it keeps; None for one that does not."""
        if policy != "offload" or policy not in self.policies:
            return None
        if self._stream is None:
            self._stream = stream_for(device)
        return HostStore(device, num_tokens, hidden, self._stream)

    @contextmanager
    def following(self, policy: str | None, store: HostStore | None) -> Iterator[None]:
        """For forward and backward of one micro-batch."""
        before = [layer.gradient_checkpointing for layer in self._layers]
        try:
            if policy in self.policies and not self._recomputes:
                for layer in self._layers:
                    _recompute(layer)
            for mlp in self._mlps:
                mlp.in_chunks = self.recomputed(policy)
            with nullcontext() if store is None else store.hooks():
                yield
        finally:
            for layer, recomputed in zip(self._layers, before, strict=True):
                layer.gradient_checkpointing = recomputed
            for mlp in self._mlps:
                mlp.in_chunks = False


def _recompute(layer: Any) -> None:
    layer.gradient_checkpointing = True
    if not hasattr(layer, "_gradient_checkpointing_func"):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
