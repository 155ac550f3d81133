"""Samples that share a pack do not see each other."""

from __future__ import annotations

from typing import Any

import torch
from helpers import LENGTHS, run_ranks, samples, tiny_model, trained

CHANGED = 7  # the longest sample, which is spread over ranks


def data_where_only(learning: list[int], changed: bool) -> list[dict[str, Any]]:
    """All samples in one batch, but only some have targets; one that has none may get another first token."""
    data = samples(LENGTHS)
    for row, sample in enumerate(data):
        if row not in learning:
            sample["labels"] = [-100] * len(sample["labels"])
    if changed:
        tokens = data[CHANGED]["input_ids"]
        tokens[0] = 3 + (tokens[0] + 1) % 90
    return data


def gradients(learning: list[int], changed: bool) -> dict[str, torch.Tensor]:
    data = data_where_only(learning, changed)
    result = trained(tiny_model(dtype=torch.float64), data, per_device_train_batch_size=6, max_steps=1)
    return result["gradients"][0]


def test_a_changed_token_moves_no_other_sample() -> None:
    """Changing a token of one sample leaves the gradients of all the others bit-equal."""
    others = [row for row in range(len(LENGTHS)) if row != CHANGED]
    before = run_ranks(gradients, 4, others, False)[0]
    after = run_ranks(gradients, 4, others, True)[0]
    # the changed token's own embedding row has no gradient either way: nothing is learnt from its sample
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_changed_token_moves_its_own_sample() -> None:
    """The comparison above can fail: the sample's own gradients do change."""
    before = run_ranks(gradients, 4, [CHANGED], False)[0]
    after = run_ranks(gradients, 4, [CHANGED], True)[0]
    assert not torch.allclose(before["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"])
