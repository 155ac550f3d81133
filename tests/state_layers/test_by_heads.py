"""Ranks that share a mixer by heads give, and learn, what the mixer does of each sample alone.

`test_planned` compares every family with each sample alone, those that are cut by heads among them; here is which they
are, what a part holds, and that what could go wrong is seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks, with_lora
from hybrids import HYBRIDS, hybrid_model
from state_layers.test_planned import LENGTHS, TOLERANCE, expected_of, largest_error, shared

from hf_hetero.layout import contiguous, zigzag
from hf_hetero.state_layers import by_heads
from hf_hetero.state_layers.by_heads import head_runs_of
from hf_hetero.state_layers.cuts import CUTS, cut_of, has_one_group, part_of
from hf_hetero.state_layers.families import mixers_of

WHOLE = {"falcon_h1", "jamba", "mamba", "falcon_mamba", "lfm2", "recurrent_gemma", "minimax"}
"""Families whose mixers each rank of a sample goes over whole."""


def mixer_of(family: str, **changes: Any) -> torch.nn.Module:
    return next(mixers_of(hybrid_model(family, **changes)))


@pytest.mark.parametrize("family", list(HYBRIDS))
@pytest.mark.parametrize("parts", [2, 4])
def test_which_are_cut(family: str, parts: int) -> None:
    """Gated and Kimi delta nets and Mamba 2 are; the parts' weights are together the whole one's, and no more."""
    mixer = mixer_of(family)
    cut = cut_of(mixer, parts)
    assert (cut is None) == (family in WHOLE)
    if cut is None:
        return
    parts_of = [part_of(mixer, type(mixer), cut, n, parts) for n in range(parts)]
    for name, weight in mixer.named_parameters():
        owner, _, attribute = name.rpartition(".")
        views = [getattr(part.get_submodule(owner), attribute) for part in parts_of]
        numbers = sum(view.numel() for view in views)
        if name in cut.whole or name in cut.once:
            assert numbers == parts * weight.numel()
        elif not has_one_group(mixer, cut):  # else every part has the group's inputs
            assert numbers == weight.numel()


@pytest.mark.parametrize("family", sorted({*HYBRIDS} - WHOLE - {"granitemoehybrid"}))
def test_parts_add_up(family: str) -> None:
    """In one process outputs of four parts add up to the mixer's, but for a norm over ranks, which takes ranks."""
    mixer = mixer_of(family)
    cut = cut_of(mixer, 4)
    assert cut is not None
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    parts = [part_of(mixer, type(mixer), cut, n, 4)(x) for n in range(4)]
    whole = mixer(x)
    assert float(((sum(parts) - whole).abs().max() / whole.abs().max()).detach()) < 1e-6  # of states in fp32


def test_more_ranks_than_heads() -> None:
    """Where the degree does not divide the heads, or the groups, ranks go over whole samples."""
    assert cut_of(mixer_of("qwen3_5"), 8) is None  # 4 key heads
    assert cut_of(mixer_of("bamba"), 8) is None  # 4 groups
    assert cut_of(mixer_of("granitemoehybrid"), 8) is not None  # 8 heads of one group
    assert cut_of(mixer_of("granitemoehybrid"), 16) is None


def test_adapters_within_are_not_cut() -> None:
    """LoRA gives a mixer weights that no cut speaks of."""
    model = with_lora(hybrid_model("qwen3_5", torch.float32), ("in_proj_qkv", "out_proj"))
    assert cut_of(next(mixers_of(model)), 2) is None


def test_every_cut_is_tried() -> None:
    """A class that is cut is one of those that are compared."""
    assert {type(mixer_of(family)).__name__ for family in HYBRIDS if family not in WHOLE} == set(CUTS)


def test_which_samples_are_shared() -> None:
    """A sample that is whole on a rank stays; rows of others come in the order of samples, and go back."""
    layout = contiguous([2, 4, 2], 2)  # ranks hold 2 + 2 and 2 + 2 tokens
    runs = head_runs_of(layout, 1, 0, torch.device("cpu"))
    assert runs.whole_rows.tolist() == [2, 3]
    assert runs.cut_rows.tolist() == [0, 1]
    assert (runs.num_rows, runs.lengths, runs.whole_lengths) == ((2, 2), (4,), (2,))
    assert runs.order.tolist() == runs.back.tolist() == [0, 1, 2, 3]
    assert runs.merged.tolist() == [2, 3, 0, 1]


class LocalNorm(by_heads.NormOverRanks):
    """Wrong on purpose: each rank norms over its own channels."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        x = hidden_states * torch.nn.functional.silu(gate)
        mean = x.pow(2).mean(-1, keepdim=True)
        return self._norm.weight * x * torch.rsqrt(mean + self._norm.variance_epsilon)


def with_norm_error(is_wrong: bool) -> float:
    from hf_hetero.state_layers import planned

    if is_wrong:
        planned.NormOverRanks = LocalNorm
    rank, layout, family = dist.get_rank(), zigzag(LENGTHS, 2), "granitemoehybrid"
    return largest_error(shared(family, layout, rank), expected_of(family), layout, rank)


def test_a_norm_over_local_channels_is_caught() -> None:
    """The comparison can fail: a norm over a rank's own channels is far off, and the one over all of them is not."""
    assert max(run_ranks(with_norm_error, 2, False)) <= TOLERANCE
    assert max(run_ranks(with_norm_error, 2, True)) > 1e-2
