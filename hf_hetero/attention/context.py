"""What attention must know about one micro-batch on one rank. Travels as a keyword of the model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from hf_hetero.attention.contract import Kernel
from hf_hetero.backward import in_backward
from hf_hetero.layout import Layout
from hf_hetero.offload import HostStore, Parcel
from hf_hetero.waits import Waits

Tensors = tuple[torch.Tensor, ...]
SPEAKERS = (0, 1)
"""Positions in a group of the ranks that say what they wait for."""


class AttentionContext:
    """One group, one pack, one kernel.

    A keyword, not a global: with gradient checkpointing the recompute runs in backward, on CUDA in another thread, when
    a global would already speak of another micro-batch. A plain class, not a dataclass: FSDP2 takes the dataclasses
    among a layer's keywords apart and rebuilds them, in every layer.

    Args:
        layout: which tokens each rank of the group holds.
        ranks: global ranks of the group.
        rank: this rank.
        process_group: None for a single rank.
        method: how attention crosses the ranks.
        kernel: computes attention on one device.
        device: where sample boundaries and row numbers go, once and not in every layer.
        step, micro_batch: for messages only.
        inner_group: process group of this rank's block, where the layout has blocks.
        keeps: layers are computed again in backward (gradient checkpointing): keep what was exchanged until then.
        store: keep it there; None: on the device.
        reaches: for each span of this rank, one more than the last position of its whole sample; None: its tokens.
        waits: says so where an exchange takes long; two ranks of a group are enough, one of which may be who is late.

    Attributes:
        group_rank: this rank's position in the group.
        num_tokens: tokens of this rank that belong to a sample.
        reached: layers that attention was called for; shows whether the model hands its keywords down.
    """

    def __init__(
        self,
        layout: Layout,
        ranks: tuple[int, ...],
        rank: int,
        process_group: dist.ProcessGroup | None,
        method: str,
        kernel: Kernel,
        device: torch.device,
        step: int = 0,
        micro_batch: int = 0,
        inner_group: dist.ProcessGroup | None = None,
        keeps: bool = False,
        store: HostStore | None = None,
        reaches: tuple[int, ...] | None = None,
        waits: Waits | None = None,
    ) -> None:
        self.layout, self.ranks, self.process_group, self.inner_group = layout, ranks, process_group, inner_group
        self.method, self.kernel, self.device, self.keeps = method, kernel, device, keeps
        self.store = store
        self.step, self.micro_batch = step, micro_batch
        self.group_rank = ranks.index(rank)
        self.waits = waits if self.group_rank in SPEAKERS else None
        self.num_tokens = layout.rank_tokens[self.group_rank]
        spans = layout.spans[self.group_rank]
        self.reaches = reaches or tuple(layout.lengths[span.sample] for span in spans)
        self.reached: set[int] = set()
        self._made: dict[Any, Any] = {}
        self._kept: dict[tuple[int, str], tuple[torch.Tensor | Parcel, ...] | None] = {}

    def where(self, layer: int) -> str:
        """Place of an operation, for messages."""
        return f"step {self.step}, micro-batch {self.micro_batch}, layer {layer}, ranks {list(self.ranks)}"

    def made(self, key: Any, make: Callable[[], Any]) -> Any:
        """Something all layers share, such as row numbers on the device: made by the first layer that asks."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def once(self, layer: int, operation: str, compute: Callable[[], Tensors]) -> Tensors:
        """What an operation of a layer gives, kept from the forward pass to its recompute in backward.

        A layer that was called twice in the forward pass keeps nothing, since nothing tells its calls apart.
        """
        if not self.keeps:
            return compute()
        key = (layer, operation)
        if in_backward():
            kept = self._kept.pop(key, None)
            return compute() if kept is None else tuple(map(self._fetched, kept))
        found = compute()
        self._kept[key] = None if key in self._kept else tuple(map(self._put_away, found))
        return found

    def _put_away(self, tensor: torch.Tensor) -> torch.Tensor | Parcel:
        return tensor.detach() if self.store is None else self.store.put(tensor)

    def _fetched(self, kept: torch.Tensor | Parcel) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        assert self.store is not None
        return self.store.get(kept)
