"""A group holds more tokens by what is done to the model: layers recomputed, inputs offloaded, MLPs in chunks.

Layers are changed for one micro-batch: by the attributes that transformers documents (`GradientCheckpointingLayer`)
and by the class of their MLPs (`chunked_mlp`). They stay changed until backward is through, because recomputed layers
must do what they did; then they are as they were.

What is on the device when, of a model of three layers. x1: the input of layer 1, with what attention exchanged in it
where that is kept. S1: all tensors that layer 1 saves inside; without the MLP's, where MLPs go in chunks. (x1): a copy
of it on its way to the host, or back.

                 forward                              backward
    layer      | 1         | 2         | 3          | 3           | 2          | 1     |
    None       | S1        | S1 S2     | S1 S2 S3   | S1 S2 S3    | S1 S2      | S1    |
    recompute  | x1        | x1 x2     | x1 x2 x3   | x1 x2 x3 S3 | x1 x2 S2   | x1 S1 |
    offload    | x1        | (x1) x2   | (x2) x3    | (x2) x3 S3  | (x1) x2 S2 | x1 S1 |

So the most, for L layers, is L S, L x + S and 2 x + S.

Why the gradients stay the same. Saved tensors are what they were: S2 is computed again from the same x2 (on the device,
or copied out and back bit by bit), by the same weights (the optimizer steps after backward), with the same random
numbers (`checkpoint` restores their state), in layers that are changed in the same way. What attention exchanges is
kept, or exchanged once more: all ranks of a group follow the group's one policy, so they repeat the same exchanges in
the same order, and none waits for one that the others leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_hetero.model.chunked_mlp import chunked_class, is_hooked
from hf_hetero.model.offload import HostStore, stream_for
from hf_hetero.plan import ACTIVATIONS


class Activations:
    """`Activations` are the layers of a model, and what they can do to hold more tokens.

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
        layers: list[Any] = [layer for layer in self._layers if in_chunks and hasattr(layer, "mlp")]
        pairs = [(layer.mlp, chunked_class(layer)) for layer in layers]
        self._mlps = [(mlp, kind) for mlp, kind in pairs if kind is not None]
        able = ACTIVATIONS if self._layers else ()
        self.policies = tuple(policy for policy in able if policy != "recompute" or not recomputes)

    @property
    def chunked_mlps(self) -> bool:
        """Return whether recomputed layers have MLPs that go chunk by chunk."""
        return bool(self._mlps)

    def recomputed(self, policy: str | None) -> bool:
        """Return whether layers are computed again in backward, in a group that does this."""
        return self._recomputes or policy in self.policies

    def store(self, policy: str | None, device: torch.device, num_tokens: int, hidden: int) -> HostStore | None:
        """Return where a group that offloads puts what it keeps; None for one that does not."""
        if policy != "offload" or policy not in self.policies:
            return None
        if self._stream is None:
            self._stream = stream_for(device)
        return HostStore(device, num_tokens, hidden, self._stream)

    @contextmanager
    def following(self, policy: str | None, store: HostStore | None) -> Iterator[None]:
        """Follow a group's policy in forward and backward of one micro-batch; leave the layers as they were."""
        with ExitStack() as undone:
            if policy in self.policies and not self._recomputes:
                for layer in self._layers:
                    set_until(undone, layer, "gradient_checkpointing", True)
                    set_until(undone, layer, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))
            if self.recomputed(policy):
                for mlp, kind in self._mlps:
                    if not is_hooked(mlp):
                        set_until(undone, mlp, "__class__", kind)
            if store is not None:
                undone.enter_context(store.hooks())
            yield


def set_until(undone: ExitStack, thing: Any, name: str, value: Any) -> None:
    """Set an attribute until a stack is undone; what a thing had from its class it then has from there again."""
    # set anew where the thing has it itself, else removed: an attribute left on a layer would hide its class's for good
    if name in vars(thing) or name == "__class__":
        undone.callback(setattr, thing, name, getattr(thing, name))
    else:
        undone.callback(delattr, thing, name)
    setattr(thing, name, value)
