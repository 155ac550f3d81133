"""Where any rank has an image in a step, all ranks call the tower in each of its micro-batches, be it on a stand-in.

Under FSDP2 a layer of the tower is gathered from all ranks as it is called, so that who did not call it would leave the
others waiting. DDP, too, wants the gradients of a weight from all ranks. None of the features of an image that stands
in is kept, so that its gradient is zero. In a step without images nobody calls the tower, and its weights get no
gradient, as under plain Trainer.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch.distributed as dist

from hf_hetero.images.pictures import IMAGE_ROWS
from hf_hetero.images.sight import Sight
from hf_hetero.ranks.agreement import any_of, gather_objects
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
    is_mutual = any(micro_batch.mutual for micro_batch in batch.micro_batches)
    anyone_sees, any_is_mutual = any_of([any(sees), is_mutual], control)
    if any_is_mutual:
        batch = _told_of_all(batch, control)
    if not anyone_sees:
        return batch
    micro_batches = tuple(
        micro_batch if sees_one else replace(micro_batch, inputs={**micro_batch.inputs, **sight.stand_in})
        for micro_batch, sees_one in zip(batch.micro_batches, sees, strict=True)
    )
    return replace(batch, micro_batches=micro_batches)


def _told_of_all(batch: StepBatch, control: dist.ProcessGroup) -> StepBatch:
    """Return a step in which each rank knows, of all samples of its groups, which tokens look at each other.

    A rank has read the samples of its own tokens, and may compute some heads of others'. A collective of all ranks.
    """
    own = {m.group.samples[n]: stretches for m in batch.micro_batches for n, stretches in m.mutual.items()}
    found = dict(chain.from_iterable(one.items() for one in gather_objects(own, control)))
    micro_batches = tuple(
        replace(m, mutual={n: found[sample] for n, sample in enumerate(m.group.samples) if sample in found})
        for m in batch.micro_batches
    )
    return replace(batch, micro_batches=micro_batches)
