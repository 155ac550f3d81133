"""Llama 4's chunks and temperatures are counted within each sample, whatever a rank holds of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers import TINY

from hf_hetero.attention import chunks
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.checks.probe import probe
from hf_hetero.checks.tiny import build, shrunk
from hf_hetero.layout import Layout, contiguous, zigzag

LENGTHS = [11, 1, 6, 23, 8, 16]


def places(layout: Layout) -> list[list[tuple[int, int]]]:
    """Of each token of each rank: its sample, and its position in it."""
    return [[(s.sample, at) for s in spans for at in range(s.start, s.end)] for spans in layout.spans]


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("layout_of", [contiguous, zigzag])
@pytest.mark.parametrize("size", [1, 5, 8, 100])
def test_a_chunk_is_a_sample_of_its_own(layout_of: Any, degree: int, size: int) -> None:
    """Each token stays where it is, and its chunk holds those of its sample with the same position // size."""
    layout = layout_of(LENGTHS, degree)
    cut = layout.in_chunks(size)
    chunk_of: dict[tuple[int, int], int] = {}  # by a table that knows nothing of spans
    for sample, length in enumerate(LENGTHS):
        for start in range(0, length, size):
            number = len(set(chunk_of.values()))
            chunk_of |= {(sample, at): number for at in range(start, min(start + size, length))}
    expected = [[(chunk_of[sample, at], at % size) for sample, at in rank] for rank in places(layout)]
    assert places(cut) == expected
    assert cut.rank_tokens == layout.rank_tokens
    assert list(cut.lengths) == [list(chunk_of.values()).count(n) for n in range(len(cut.lengths))]


def llama4() -> Any:
    return transformers.Llama4TextConfig(
        **{**TINY, "num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 48},
        attention_chunk_size=8,
        floor_scale=4,
        no_rope_layers=[1, 1, 1, 0],
    )


def tried() -> Any:
    return probe(build(shrunk(llama4()), "cpu", transformers.Llama4ForCausalLM))


@pytest.mark.parametrize("part", ["place_of", "at_own_positions"])
def test_without_it_samples_of_a_pack_differ(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are needed: without the one or the other a tiny Llama 4 learns something else when samples are packed."""
    assert tried().ok
    stock = {"place_of": lambda _, context, layer: context.at(layer), "at_own_positions": lambda _, query, __: query}
    monkeypatch.setattr(chunks, part, stock[part])
    assert "learns differently" in tried().manner.whole


def test_queries_are_scaled_for_their_sample() -> None:
    """On a rank that holds the second half of a sample, and on one without tokens."""
    module = transformers.models.llama4.modeling_llama4.Llama4TextAttention(llama4(), 3)
    context = AttentionContext(contiguous([10], 2), (0, 1), 1, None, "gather", CPU, torch.device("cpu"))

    def factor(positions: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.floor((positions.double() + 1) / 4)) * module.attn_scale + 1

    query = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    scaled = query * factor(torch.arange(5)).view(1, 1, 5, 1)
    found = chunks.at_own_positions(module, scaled, context)
    assert torch.allclose(found, query * factor(torch.arange(5, 10)).view(1, 1, 5, 1), rtol=1e-14)
    empty = AttentionContext(Layout((), ((), ())), (0, 1), 1, None, "gather", CPU, torch.device("cpu"))
    assert torch.equal(chunks.at_own_positions(module, query[:, :, :1], empty), query[:, :, :1])
