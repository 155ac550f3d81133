"""A mixer whose samples are shared among ranks gives, and learns, what it does of each sample alone.

The reference is independent of the package: one process, transformers' own module, one sample a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks
from hybrids import HYBRIDS, InFloat64, hybrid_model
from torch.utils.checkpoint import checkpoint

from hf_hetero.attention import traffic
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.layout import Layout, contiguous, two_level, zigzag
from hf_hetero.state_layers import planned
from hf_hetero.state_layers.families import mixers_of
from hf_hetero.state_layers.planned import StateLayers

LENGTHS = [3, 1, 41, 2, 18, 1, 7]
TOLERANCE = 1e-12
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "two_level": lambda lengths, d: two_level(lengths, d, d // 2)}


def mixer_of(family: str) -> Any:
    """The model, so that it stays alive, and its first mixer, with weights that are not at their start."""
    model = hybrid_model(family)
    mixer = next(mixers_of(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model, mixer


def call(mixer: Any, x: torch.Tensor) -> torch.Tensor:
    """A mixer's output, called as its layer does, and computed in fp64 throughout."""
    kwargs: dict[str, Any] = {"attention_mask": None}
    if type(mixer).__name__.endswith("RecurrentBlock"):
        kwargs |= {"position_ids": torch.arange(x.shape[1])[None], "use_cache": False}
    if type(mixer).__name__.endswith("LightningAttention"):
        kwargs |= {"position_embeddings": None}
    with InFloat64():
        output = mixer(x, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def inputs(lengths: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states of each sample, and the gradients of what becomes of them."""
    generator = torch.Generator().manual_seed(2)
    pairs = [[torch.randn(n, 32, generator=generator, dtype=torch.float64) for _ in range(2)] for n in lengths]
    return [x for x, _ in pairs], [g for _, g in pairs]


def expected_of(family: str, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Outputs, and gradients of inputs, by sample; gradients of weights by name."""
    _, mixer = mixer_of(family)
    hidden, gradients = inputs(lengths)
    leaves = [x.clone().requires_grad_() for x in hidden]
    outputs = [call(mixer, x[None])[0] for x in leaves]
    torch.stack([(out * g).sum() for out, g in zip(outputs, gradients, strict=True)]).sum().backward()
    return {
        "outputs": [out.detach() for out in outputs],
        "inputs": [x.grad for x in leaves],
        "weights": {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None},
    }


def mine(values: list[torch.Tensor], layout: Layout, rank: int) -> torch.Tensor:
    parts = [values[span.sample][span.start : span.end] for span in layout.spans[rank]]
    return torch.cat(parts) if parts else torch.zeros(1, 32, dtype=torch.float64)  # one that stands in


def shared(family: str, layout: Layout, rank: int, recompute: bool = False) -> dict[str, Any]:
    """What a rank has of it all when it holds its part of the pack; gradients of weights summed over ranks."""
    model, mixer = mixer_of(family)
    hidden, gradients = inputs(layout.lengths)
    group = dist.group.WORLD if dist.is_initialized() else None
    context = AttentionContext(
        layout, tuple(range(layout.degree)), rank, group, "gather", CPU, torch.device("cpu"), keeps=recompute
    )
    leaf = mine(hidden, layout, rank).requires_grad_()
    with StateLayers(model).planned(context):
        if recompute:
            out = checkpoint(lambda x: call(mixer, x), leaf[None], use_reentrant=False)[0]
        else:
            out = call(mixer, leaf[None])[0]
        weight = mine(gradients, layout, rank) if context.num_tokens else torch.zeros_like(out)
        (out * weight).sum().backward()
    weights = {}
    for name, p in mixer.named_parameters():
        if p.grad is not None:
            if dist.is_initialized():
                dist.all_reduce(p.grad)
            weights[name] = p.grad
    return {"output": out.detach(), "input": leaf.grad, "weights": weights, "reached": context.reached}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; of an empty tensor 0."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9)) if expected.numel() else 0.0


def largest_error(found: dict[str, Any], expected: dict[str, Any], layout: Layout, rank: int) -> float:
    assert found["weights"].keys() == expected["weights"].keys()
    errors = [error(found["weights"][name], x) for name, x in expected["weights"].items()]
    if layout.spans[rank]:
        errors += [
            error(found["output"], mine(expected["outputs"], layout, rank)),
            error(found["input"], mine(expected["inputs"], layout, rank)),
        ]
    return max(errors)


def on_ranks(families: list[str]) -> dict[tuple[str, str, bool], float]:
    """The largest error of each family on this rank, in each layout, with recompute and without."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for family in families:
        expected = expected_of(family)
        for name, make in LAYOUTS.items():
            if world == 2 and name == "two_level":
                continue
            layout = make(LENGTHS, world)
            for recompute in (False, True):
                result = shared(family, layout, rank, recompute)
                found[family, name, recompute] = largest_error(result, expected, layout, rank)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "families"),
    [
        (2, ["qwen3_5", "lfm2"]),
        pytest.param(2, list(HYBRIDS), marks=pytest.mark.slow),
        pytest.param(4, list(HYBRIDS), marks=pytest.mark.slow),
    ],
    ids=["few", "all-2", "all-4"],
)
def test_mixers_on_ranks_are_those_of_each_sample(num_ranks: int, families: list[str]) -> None:
    """Outputs and all gradients, in every layout, with recompute and without, for every family."""
    for errors in run_ranks(on_ranks, num_ranks, families):
        assert {case: error for case, error in errors.items() if not error <= TOLERANCE} == {}


@pytest.mark.parametrize("family", list(HYBRIDS))
def test_a_pack_on_one_rank(family: str) -> None:
    """Samples of a pack do not see each other."""
    layout = contiguous(LENGTHS, 1)
    found = shared(family, layout, 0)
    assert largest_error(found, expected_of(family), layout, 0) <= TOLERANCE
    assert found["reached"] == ({0} if family != "recurrent_gemma" else set())  # whose mixers have no number


def with_empty_ranks(families: list[str]) -> float:
    layout, rank = contiguous([3], 4), dist.get_rank()
    assert layout.rank_tokens == (1, 1, 1, 0)
    return max(largest_error(shared(f, layout, rank), expected_of(f, [3]), layout, rank) for f in families)


def test_ranks_without_tokens() -> None:
    """A rank that holds no token joins every exchange, has a gradient of zeros for each weight, and changes nothing."""
    assert max(run_ranks(with_empty_ranks, 4, ["qwen3_5", "lfm2"])) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_5", "bamba", "mamba", "lfm2"])
def test_without_borders_a_pack_is_caught(family: str) -> None:
    """The comparison can fail: a mixer that goes over the pack as if it were one sample is far off."""
    _, mixer = mixer_of(family)
    hidden, _ = inputs(LENGTHS)
    out = call(mixer, torch.cat(hidden)[None])[0].detach()
    assert error(out, torch.cat(expected_of(family)["outputs"])) > 1e-2


def without_halo(family: str) -> float:
    """Wrong on purpose: a rank's tokens are taken for whole samples."""

    def nothing_fetched(hidden: torch.Tensor, runs: Any, place: Any) -> torch.Tensor:
        arrived = torch.zeros(sum(runs.num_received), hidden.shape[1], dtype=hidden.dtype)
        return torch.cat([hidden[: place.context.num_tokens], arrived, hidden[place.context.num_tokens :]])

    planned._fetched = nothing_fetched
    rank, layout = dist.get_rank(), zigzag(LENGTHS, 2)
    return largest_error(shared(family, layout, rank), expected_of(family), layout, rank)


@pytest.mark.parametrize("family", ["lfm2", "mamba"])
def test_a_missing_halo_is_caught(family: str) -> None:
    """Tokens of other ranks that a convolution, or a state, sees are needed."""
    assert max(run_ranks(without_halo, 2, family)) > 1e-2


def exchanges(family: str, layout: Layout, recompute: bool) -> list[tuple[str, int]]:
    """What a rank exchanges, in order: the operation, and how many numbers it sends."""
    seen: list[tuple[str, int]] = []
    stock = traffic._exchange

    def noted(buffer: torch.Tensor, in_splits: Any, out_splits: Any, peers: Any, name: str, place: Any) -> torch.Tensor:
        seen.append((name, buffer.numel()))
        return stock(buffer, in_splits, out_splits, peers, name, place)

    traffic._exchange = noted
    try:
        shared(family, layout, dist.get_rank(), recompute)
    finally:
        traffic._exchange = stock
    return seen


def all_exchanges() -> dict[str, list[tuple[str, int]]]:
    cut = contiguous([20], 2)
    return {
        "whole": exchanges("qwen3_5", zigzag([5, 5], 2), False),
        "by heads": exchanges("qwen3_5", cut, False),
        "by heads, recomputed": exchanges("qwen3_5", cut, True),
        "prefix": exchanges("mamba", cut, False),
        "halo": exchanges("lfm2", cut, False),
    }


def test_what_travels() -> None:
    """Nothing of whole samples; by heads, all rows there and back, once more in backward; else what is seen alone."""
    first, second = run_ranks(all_exchanges, 2)
    there, back = "all-to-all of hidden states", "all-to-all of mixed states"
    assert first["whole"] == second["whole"] == []
    rows = 10 * 32
    by_heads = [(there, rows), (back, rows), (f"{back} of gradients", rows), (f"{there} of gradients", rows)]
    assert first["by heads"] == second["by heads"] == by_heads
    assert first["by heads, recomputed"] == by_heads, "a recompute repeats no exchange"
    assert first["prefix"] == [(there, rows), (f"{there} of gradients", 0)]
    assert second["prefix"] == [(there, 0), (f"{there} of gradients", rows)]
    assert first["halo"] == [(there, 2 * 32), (f"{there} of gradients", 0)]  # a kernel of 3 sees two tokens before
