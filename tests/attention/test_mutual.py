"""Where tokens look at each other, every method over real ranks equals dense attention on one, in fp64, to 1e-12."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention.dense_attention import Case, dense
from attention.test_methods import CHOICES, FEATURES, HEADS, METHODS, assert_equals_dense
from helpers import often

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Ahead, Kernel, Scores, Segments
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.attention.methods import attend
from hf_hetero.attention.routes import gather_route
from hf_hetero.errors import UnsupportedModel
from hf_hetero.layout import contiguous, needed, zigzag

PACKS: dict[str, dict[str, Any]] = {
    "one long": {"lengths": (61,), "mutual": ((0, 0, 7), (0, 9, 10), (0, 20, 45), (0, 59, 61))},
    "long and short": {
        "lengths": (3, 40, 1, 9, 23, 2, 2),
        "mutual": ((1, 1, 39), (3, 0, 9), (4, 3, 5), (4, 5, 12), (6, 0, 2)),
    },
    "all of it": {"lengths": (17, 6), "mutual": ((0, 0, 17), (1, 0, 6))},
    "empty ranks": {"lengths": (2, 1), "mutual": ((0, 0, 2),)},
}
HOST = torch.device("cpu")


def case_of(pack: str, heads: str, features: str) -> Case:
    return Case(**PACKS[pack], heads=HEADS[heads], **FEATURES[features])


@pytest.mark.parametrize(
    ("num_ranks", "choices"), often([(2, "any three"), (4, "any two"), (4, "any three")], (4, "any two"))
)
def test_equals_dense_attention(num_ranks: int, choices: str) -> None:
    """Stretches within a rank and over several, longer than windows and shorter; ranks without tokens or heads."""
    cases = [(m, case_of(*key)) for m in METHODS[num_ranks] for key in CHOICES[choices](PACKS, HEADS, FEATURES)]
    assert_equals_dense(num_ranks, cases, 2)


def alone(case: Case, kernel: Kernel = CPU, **changes: Any) -> list[torch.Tensor]:
    """Output, and the gradients of q, k, v and the sinks, on one rank."""
    q, k, v, weights, sinks = (x.requires_grad_() for x in case.tensors())
    features = case.window, case.softcap, sinks if case.has_sinks else None
    layout = contiguous(case.lengths, 1)
    context = AttentionContext(layout, (0,), 0, None, "ring", kernel, HOST, mutual=case.stretches)
    out = attend(q, k, v, Scores(case.scaling, *features, **{"mutual": True, **changes}), context.at(0))
    grads = torch.autograd.grad((out * weights).sum(), [q, k, v, sinks], allow_unused=True)
    return [out.detach(), *(torch.zeros_like(sinks) if g is None else g for g in grads)]


@pytest.mark.parametrize("kernel", [CPU, PLAIN], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("features", FEATURES)
def test_on_one_rank(kernel: Kernel, features: str) -> None:
    """Of a pack, each sample has its own stretches."""
    case = case_of("long and short", "gqa", features)
    for ours, theirs in zip(alone(case, kernel), dense(case), strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_looking_back_only_is_caught() -> None:
    """The comparison can fail: without keys ahead, outputs and gradients are far off; where none are, they are not."""
    case = case_of("long and short", "gqa", "window")
    errors = [(x - y).abs().max() for x, y in zip(alone(case, mutual=False)[:4], dense(case), strict=False)]
    assert min(errors) > 1e-2
    plain = dense(replace(case, mutual=()))
    assert max((x - y).abs().max() for x, y in zip(alone(case, mutual=False), plain, strict=True)) < 1e-12


def test_half_types_are_rounded_twice() -> None:
    """In bf16, whose numbers are off by 2 ** -8 at most: each of the two parts, and what they merge to."""
    case = replace(case_of("one long", "gqa", "plain"), dtype=torch.bfloat16)
    largest = float(case.tensors()[2].abs().max())  # no output is larger than a value
    assert (alone(case, PLAIN)[0].double() - dense(case)[0]).abs().max() < 2 * 2**-8 * largest


def test_only_layers_with_a_window_may_look_ahead() -> None:
    """As in Gemma 4; where no token does, no layer does."""
    layout = contiguous([4], 1)
    for mutual, in_windows, expected in (
        ({0: ((0, 4),)}, False, [True, True]),
        ({0: ((0, 4),)}, True, [False, True]),
        ({}, False, [False, False]),
    ):
        context = AttentionContext(
            layout, (0,), 0, None, "ring", CPU, HOST, mutual=mutual, mutual_in_windows=in_windows
        )
        assert [context.is_mutual(window) for window in (None, 3)] == expected
        assert context.again().is_mutual(None) == expected[0]


def test_no_key_travels_twice_or_without_need() -> None:
    """Each key goes, once, to each rank that holds a query which meets it, be it for what is before or ahead."""
    mutual, layout = {0: ((10, 30),)}, zigzag([40], 4)
    for me in range(4):
        spans = layout.spans[me]
        for other in set(range(4)) - {me}:
            found = [(s.start, s.end) for s in needed(layout, me, other, 3, mutual)]
            tokens = [token for start, end in found for token in range(start, end)]
            assert len(tokens) == len(set(tokens))
            held = {token for s in layout.spans[other] for token in range(s.start, s.end)}
            met = {t for s in spans for q in range(s.start, s.end) for t in range(max(q - 2, 0), q + 1)}
            met |= {t for s in spans for q in range(s.start, s.end) if 10 <= q < 30 for t in range(q, 30)}
            assert set(tokens) == met & held
    plain = gather_route(layout, 0, None, HOST)
    assert plain.ahead is None
    assert sum(gather_route(layout, 0, None, HOST, mutual).num_received) >= sum(plain.num_received)


def test_a_kernel_without_a_log_sum_exp_refuses() -> None:
    """Instead of leaving the keys out."""
    kernel = Kernel("bare", None, frozenset({torch.float64}), frozenset(), attend=lambda q, k, v, s, c: q)
    q, rows = torch.randn(3, 1, 8, dtype=torch.float64), torch.tensor([1, 0])
    ahead = Ahead(rows, q[:2], q[:2], Segments.packed([2], HOST))
    assert kernel(q, q, q, Segments.packed([3], HOST), Scores(1.0)) is not None
    with pytest.raises(UnsupportedModel, match="'bare' gives no log-sum-exp"):
        kernel(q, q, q, Segments.packed([3], HOST), Scores(1.0), ahead)
