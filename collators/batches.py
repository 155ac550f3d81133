"""A collator is asked for one row at a time here, so what it makes of a row must not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch

from hf_hetero.collators.packed import PackedCollator
from hf_hetero.collators.sample import Example
from hf_hetero.errors import BadSample

LOOKED_AT = 4
"""Rows of the batch that is made to see it."""
JOINED = ("position_ids", "cu_seq_lens_q", "seq_idx")
"""By which rows that are joined to one are told from each other."""


def check_batches(packer: PackedCollator, rows: Iterable[Example]) -> None:
    """Refuse a collator that makes other rows of a batch than of each of its examples.

    Args:
        packer: has the collator.
        rows: of the dataset; the first few are looked at.

    Raises:
        BadSample: it leaves rows out, makes more of them, joins them, or cuts them to what others have.
    """
    examples = list(islice(rows, LOOKED_AT))
    # one that makes chats and images into rows is promised one row at a time, and need not know how to take several
    if packer.example_collator is None or packer.sight is not None or len(examples) < 2:
        return
    batch = packer.example_collator([packer.looked_at(example) for example in examples])
    if "input_ids" not in batch or (len(batch["input_ids"]) == 1 and any(name in batch for name in JOINED)):
        return
    collator = getattr(packer.example_collator, "__qualname__", type(packer.example_collator).__qualname__)
    remedy = (
        "Each row is collated by itself, because plans decide which rows are computed together: filter, join or cut "
        "rows in the dataset, or use plain Trainer."
    )
    if (number := len(batch["input_ids"])) != len(examples):
        raise BadSample(f"The data_collator {collator} makes {number} rows of {len(examples)}. {remedy}")
    if (masks := batch.get("attention_mask")) is None or torch.as_tensor(masks).ndim != 2:
        return
    for position, (example, mask) in enumerate(zip(examples, masks, strict=True)):
        alone, together = packer.num_tokens(example, f"row {position}"), int(torch.as_tensor(mask).bool().sum())
        if alone != together:
            raise BadSample(
                f"The data_collator {collator} makes {together} tokens of row {position} in a batch of {number}, and "
                f"not the {alone} which it makes of it alone. {remedy}"
            )
