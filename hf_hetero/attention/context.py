"""What attention must know about one micro-batch on one rank. Travels as a keyword of the model's forward."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from hf_hetero.attention.kernels import Kernel, Pack
from hf_hetero.layout import Layout


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """One group, one pack, one kernel.

    A keyword, not a global: with gradient checkpointing the recompute runs in backward, on CUDA in another thread, when
    a global would already speak of another micro-batch.

    Args:
        layout: which tokens each rank of the group holds.
        ranks: global ranks of the group.
        group_rank: this rank's position among them.
        process_group: None for a single rank.
        method: how attention crosses the ranks.
        kernel: computes attention of packed samples on one device.
        pack: sample boundaries of the whole group, for the kernel.
        step, micro_batch: for messages only.
        reached: layers that attention was called for; shows whether the model hands its keywords down.
    """

    layout: Layout
    ranks: tuple[int, ...]
    group_rank: int
    process_group: dist.ProcessGroup | None
    method: str
    kernel: Kernel
    pack: Pack
    step: int = 0
    micro_batch: int = 0
    reached: set[int] = field(default_factory=set[int], compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank that belong to a sample."""
        return self.layout.rank_tokens[self.group_rank]

    def where(self, layer: int) -> str:
        """Place of an operation, for messages."""
        return f"step {self.step}, micro-batch {self.micro_batch}, layer {layer}, ranks {list(self.ranks)}"


def make_context(
    layout: Layout,
    ranks: tuple[int, ...],
    rank: int,
    process_group: dist.ProcessGroup | None,
    method: str,
    kernel: Kernel,
    device: torch.device,
    step: int = 0,
    micro_batch: int = 0,
) -> AttentionContext:
    """Context of one micro-batch; sample boundaries go to the device here, once, not in every layer."""
    cu_seqlens = torch.tensor(layout.cu_seqlens, dtype=torch.int32, device=device)
    pack = Pack(layout.lengths, cu_seqlens, layout.max_seqlen)
    return AttentionContext(
        layout, ranks, ranks.index(rank), process_group, method, kernel, pack, step=step, micro_batch=micro_batch
    )
