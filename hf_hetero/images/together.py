"""Where any rank has an image in a step, all ranks call the tower in each of its micro-batches, be it on a stand-in.

Under FSDP2 a layer of the tower is gathered from all ranks as it is called, so that who did not call it would leave the
others waiting. DDP, too, wants the gradients of a weight from all ranks. None of the features of an image that stands
in is kept, so that its gradient is zero. In a step without images nobody calls the tower, and its weights get no
gradient, as under plain Trainer.
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from hf_hetero.images.pictures import IMAGE_ROWS
from hf_hetero.images.sight import Sight
from hf_hetero.ranks.agreement import any_of
from hf_hetero.step import StepBatch


def seeing_together(batch: StepBatch, sight: Sight | None, control: dist.ProcessGroup | None) -> StepBatch:
    """Return a step in which all ranks call the tower equally often. A collective of all ranks for a model that sees.

    Args:
        batch: of this rank.
        sight: of the model; None on all ranks, or on none.
        control: group of all ranks; None for a single process.
    """
    if sight is None or control is None:
        return batch
    sees = [IMAGE_ROWS in micro_batch.inputs for micro_batch in batch.micro_batches]
    [anyone_sees] = any_of([any(sees)], control)
    if not anyone_sees:
        return batch
    micro_batches = tuple(
        micro_batch if sees_one else replace(micro_batch, inputs={**micro_batch.inputs, **sight.stand_in})
        for micro_batch, sees_one in zip(batch.micro_batches, sees, strict=True)
    )
    return replace(batch, micro_batches=micro_batches)
