"""The context tells attention about one micro-batch on one rank. It travels as a keyword of the model's forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hf_hetero.attention.kernels.contract import Kernel, Scores
from hf_hetero.layout import NOWHERE, Layout, Mutual
from hf_hetero.model.backward import in_backward
from hf_hetero.model.offload import HostStore, SavedTensor
from hf_hetero.ranks.waits import Waits

Tensors = tuple[torch.Tensor, ...]
SPEAKERS = (0, 1)
"""Positions in a group of the ranks that say what they wait for."""


@dataclass(frozen=True, slots=True)
class Peers:
    """Peers are ranks that exchange with each other inside a layer: a group, a block of it, or one rank of each block.

    Args:
        group: a process group that all of them are in, maybe with others; None for a single rank.
        ranks: their global ranks, in the order of what they hold.
        me: position of this rank among them.
        tokens: that each of them holds; 0 is allowed.
    """

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    me: int
    tokens: tuple[int, ...]


class Sent:
    """`Sent` counts the bytes that this rank has sent to others inside the layers of a micro-batch."""

    def __init__(self) -> None:
        self.num_bytes = 0


class AttentionContext:
    """An `AttentionContext` is one group, one pack, one kernel: what the layers share for a micro-batch.

    It travels as a keyword, not a global: with gradient checkpointing the recompute runs in backward, on CUDA in
    another thread, when a global would already speak of another micro-batch. It is a plain class, not a dataclass:
    FSDP2 takes the dataclasses among a layer's keywords apart and rebuilds them, in every layer.

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
        sent: counts the bytes that leave this rank; None: a new one.
        mutual: of all samples of the group, stretches whose tokens look at each other; the same on all of its ranks.
        mutual_in_windows: only in layers with a sliding window do they; else in all.
        num_passes: of a model that goes over whole samples, on all ranks; 0: as many as there are samples.

    Attributes:
        peers: the ranks of the group.
        group_rank: this rank's position in the group.
        num_tokens: tokens of this rank that belong to a sample.
        reached: layers that attention was called for; shows whether the model hands its keywords down.
        by_source: adds up the loss of each source, where that is asked for; the loss is handed the same keywords.
        looked_ahead: some of them look at tokens after their own.
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
        sent: Sent | None = None,
        mutual: Mutual = NOWHERE,
        mutual_in_windows: bool = False,
        num_passes: int = 0,
    ) -> None:
        self.mutual, self.mutual_in_windows, self.num_passes = mutual, mutual_in_windows, num_passes
        self.sent = Sent() if sent is None else sent
        self.by_source: Any = None
        self.layout, self.inner_group = layout, inner_group
        self.method, self.kernel, self.device, self.keeps = method, kernel, device, keeps
        self.store = store
        self.step, self.micro_batch = step, micro_batch
        self.group_rank = ranks.index(rank)
        self.peers = Peers(process_group, ranks, self.group_rank, layout.rank_tokens)
        self._waits = waits
        self.waits = waits if self.group_rank in SPEAKERS else None
        self.num_tokens = layout.rank_tokens[self.group_rank]
        spans = layout.spans[self.group_rank]
        self.reaches = reaches or tuple(layout.lengths[span.sample] for span in spans)
        self.reached: set[int] = set()
        self.looked_ahead = False
        self._shared: dict[Any, Any] = {}
        self._exchanged: dict[tuple[int, str], tuple[torch.Tensor | SavedTensor, ...] | None] = {}

    def again(self) -> AttentionContext:
        """Return a context for another pass over the same micro-batch, without gradients: it shares nothing kept."""
        return self._like(
            self.layout,
            reaches=self.reaches,
            mutual=self.mutual,
            mutual_in_windows=self.mutual_in_windows,
            num_passes=self.num_passes,
        )

    def at(self, layer: int) -> Place:
        """Return the context as a layer sees it."""
        return Place(self, layer)

    def is_mutual(self, window: int | None) -> bool:
        """Return whether tokens of a stretch look at each other in a layer with such a window, on all ranks alike."""
        return bool(self.mutual) and not (self.mutual_in_windows and window is None)

    def mutual_of(self, scores: Scores) -> Mutual:
        """Return the stretches whose tokens look at each other in a layer."""
        return self.mutual if scores.mutual else NOWHERE

    def in_chunks(self, num_tokens: int) -> AttentionContext:
        """Return the context of layers whose tokens see no further back than their chunk of the sample begins."""

        def make() -> AttentionContext:
            return self._like(self.layout.in_chunks(num_tokens), keeps=self.keeps, store=self.store)

        return self.shared(("chunks", num_tokens), make)

    def _like(self, layout: Layout, **options: Any) -> AttentionContext:
        """Return a context of the same micro-batch, ranks and kernel, whose bytes count as this one's."""
        return AttentionContext(
            layout,
            self.peers.ranks,
            self.peers.ranks[self.group_rank],
            self.peers.group,
            self.method,
            self.kernel,
            self.device,
            self.step,
            self.micro_batch,
            self.inner_group,
            waits=self._waits,
            sent=self.sent,
            **options,
        )

    def where(self, layer: int) -> str:
        """Return step, micro-batch, layer and ranks of an operation, for messages."""
        return f"step {self.step}, micro-batch {self.micro_batch}, layer {layer}, ranks {list(self.peers.ranks)}"

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what all layers share, such as row numbers on the device: the first layer that asks has it made."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def once(self, layer: int, operation: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return what an operation of a layer gives, kept from the forward pass to its recompute in backward.

        A layer that was called twice in the forward pass keeps nothing, since nothing tells its calls apart.
        """
        if not self.keeps:
            return compute()
        # What is kept depends on the calls alone, and these are the same on all ranks of a group. So all of them
        # repeat an exchange in backward, or none does: nobody waits for one that the others leave out.
        key = (layer, operation)
        if in_backward():
            # taken out, so that its memory is free again once this layer's backward is over
            saved = self._exchanged.pop(key, None)
            return compute() if saved is None else tuple(map(self._load, saved))
        results = compute()
        self._exchanged[key] = None if key in self._exchanged else tuple(map(self._save, results))
        return results

    def _save(self, tensor: torch.Tensor) -> torch.Tensor | SavedTensor:
        # detached: the recompute gives it a history of its own, and the first one would keep what led to it alive
        return tensor.detach() if self.store is None else self.store.put(tensor)

    def _load(self, saved: torch.Tensor | SavedTensor) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        assert self.store is not None
        return self.store.get(saved)


@dataclass(frozen=True, slots=True)
class Place:
    """A place is a layer of a micro-batch: all that a method must know besides queries, keys, values and scores."""

    context: AttentionContext
    layer: int

    @property
    def where(self) -> str:
        """Return step, micro-batch, layer and ranks, for messages."""
        return self.context.where(self.layer)

    def once(self, operation: str, compute: Callable[[], Tensors]) -> Tensors:
        """Return what an operation gives, computed once for forward and its recompute (`AttentionContext.once`)."""
        return self.context.once(self.layer, operation, compute)


def planned_mask(num_tokens: int, local_tokens: int) -> torch.Tensor:
    """Make a 4-D mask, which models hand through untouched: they build none, and attention can tell it from a real one.

    Args:
        num_tokens: tokens of this rank that belong to a sample.
        local_tokens: tokens of this rank, one at least.

    Returns:
        Bool, shape (1, 1, 1, n): True for tokens of samples.
    """
    return (torch.arange(local_tokens) < num_tokens).view(1, 1, 1, local_tokens)
