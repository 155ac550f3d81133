"""A setting says how a run would be trained that nobody has started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_hetero.errors import ConfigError
from hf_hetero.estimate.shares import ATTENTION

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
MOST_RANK = 4096


@dataclass(frozen=True, slots=True)
class Setting:
    """A `Setting` is how a run would be trained.

    Args:
        lora_r: rank of adapters on all linear layers but the head; None: all weights are trained.
        checkpointing: every group recomputes its layers; else those that gain by it.
        offload: groups may also wait for copies to the host's memory, where they gain by it.
        dtype: that training computes in; frozen weights lie in it, too.
        sharded: weights in parts over ranks (FSDP2), or all of them on each (DDP); None: in parts if there are several
            ranks, and weights are trained, or take more than half of what a rank has.
        network_gbps: line rate of a node, in gigabits a second; None: what a trainer takes that knows of none.
        kernel: of attention, one of `shares.ATTENTION`; fa2 is as fast as the one that comes with torch.
        shards: ranks over which weights lie in parts, so that several such groups are replicas (HSDP); None: all.

    Raises:
        ConfigError: a value is out of range.
    """

    lora_r: int | None = None
    checkpointing: bool = False
    offload: bool = False
    dtype: str = "bfloat16"
    sharded: bool | None = None
    network_gbps: float | None = None
    kernel: str = "fa2"
    shards: int | None = None

    def __post_init__(self) -> None:
        if self.lora_r is not None and not 1 <= self.lora_r <= MOST_RANK:
            raise ConfigError(f"A rank of adapters of {self.lora_r}: it must be from 1 to {MOST_RANK}.")
        if self.network_gbps is not None and not 0 < self.network_gbps <= 1e6:
            raise ConfigError(f"A network of {self.network_gbps:g} Gb/s: it must be above 0, and at most a million.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        if self.kernel not in ATTENTION:
            raise ConfigError(f"kernel {self.kernel!r}: choose one of {', '.join(ATTENTION)}.")
        if self.shards is not None and (self.shards < 2 or self.sharded is False):
            raise ConfigError(f"Weights over {self.shards} ranks: 2 at least; --ddp alone leaves all of them on each.")


def setting_of(args: Any) -> Setting:
    """Read what `arguments.add_setting` adds to a command line."""
    return Setting(
        args.lora_r,
        args.checkpointing,
        args.offload,
        args.dtype,
        args.sharded,
        args.network,
        args.attention,
        args.shards,
    )
