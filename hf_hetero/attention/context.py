"""What attention must know about one micro-batch on one rank. Travels as a keyword of the model's forward."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hf_hetero.attention.kernels import Kernel, Pack
from hf_hetero.layout import Layout


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
        kernel: computes attention of packed samples on one device.
        device: where the sample boundaries go, once and not in every layer.
        step, micro_batch: for messages only.

    Attributes:
        pack: sample boundaries of the whole group, for the kernel.
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
    ) -> None:
        self.layout, self.ranks, self.process_group = layout, ranks, process_group
        self.method, self.kernel, self.step, self.micro_batch = method, kernel, step, micro_batch
        self.group_rank = ranks.index(rank)
        self.num_tokens = layout.rank_tokens[self.group_rank]
        cu_seqlens = torch.tensor(layout.cu_seqlens, dtype=torch.int32, device=device)
        self.pack = Pack(layout.lengths, cu_seqlens, layout.max_seqlen)
        self.reached: set[int] = set()

    def where(self, layer: int) -> str:
        """Place of an operation, for messages."""
        return f"step {self.step}, micro-batch {self.micro_batch}, layer {layer}, ranks {list(self.ranks)}"
