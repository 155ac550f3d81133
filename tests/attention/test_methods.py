"""Every method over real ranks equals dense attention on one: output and all gradients, in fp64, to 1e-12."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention.dense_attention import Case, dense
from helpers import every_pair, often, run_ranks

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Scores, Segments
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.methods import attend
from hf_hetero.errors import UnsupportedModel
from hf_hetero.layout import Layout, layout_of
from hf_hetero.plan import Group
from hf_hetero.ranks.groups import GroupPool

PACKS: dict[str, tuple[int, ...]] = {
    "many short": (3, 1, 7, 2, 11, 5, 1, 1, 4, 8, 2, 6),
    "one long": (61,),
    "long and short": (3, 40, 1, 9, 23, 2, 2),
    "empty ranks": (1, 1),
    "one token": (1,),
    "no tokens": (),
}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1), "uneven": (6, 2), "fewer than ranks": (3, 3)}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 3.0},
    "sinks": {"has_sinks": True},
    "all": {"window": 4, "softcap": 3.0, "has_sinks": True},
    "values of another size": {"head_dim": 12, "value_dim": 4},
}
METHODS = {
    2: ["ulysses", "gather", "ring", "token_ring"],
    4: ["ulysses", "gather", "ring", "ulysses_ring", "token_ring"],
}
NAMES = ("out", "dq", "dk", "dv", "dsinks")
Key = tuple[str, str, str, str]


def case_of(pack: str, heads: str, features: str) -> Case:
    return Case(PACKS[pack], HEADS[heads], **FEATURES[features])


def rows_of(layout: Layout, rank: int) -> torch.Tensor:
    """Rows of the pack that a rank holds, in its order."""
    starts = layout.cu_seqlens
    spans = layout.spans[rank]
    parts = [torch.arange(starts[s.sample] + s.start, starts[s.sample] + s.end) for s in spans]
    return torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])


def context_of(
    case: Case, method: str, pool: GroupPool, ulysses_degree: int | None, **changes: Any
) -> AttentionContext:
    """Of all ranks as one group."""
    world, me = dist.get_world_size(), dist.get_rank()
    inner = ulysses_degree if method == "ulysses_ring" else None
    group = Group(tuple(range(world)), tuple(range(len(case.lengths))), method, inner)
    layout = layout_of(group, case.lengths)
    first = me - me % layout.inner
    inner_group = pool.get(tuple(range(first, first + layout.inner)))
    place = (layout, group.ranks, me, pool.get(group.ranks))
    changes = {"mutual": case.stretches, **changes}
    return AttentionContext(*place, method, CPU, torch.device("cpu"), inner_group=inner_group, **changes)


def on_group(case: Case, method: str, pool: GroupPool, ulysses_degree: int | None = None) -> list[torch.Tensor]:
    """This rank's rows of the pack, then its output, dq, dk, dv and dsinks."""
    context = context_of(case, method, pool, ulysses_degree)
    rows = rows_of(context.layout, context.group_rank)
    q, k, v, weights, sinks = (x if x.dim() == 1 else x[rows] for x in case.tensors())
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    features = case.window, case.softcap, sinks if case.has_sinks else None
    scores = Scores(case.scaling, *features, case.causal, mutual=bool(case.mutual))
    out = attend(q, k, v, scores, context.at(0))
    grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    return [rows, out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def on_ranks(cases: list[tuple[str, Case]], ulysses_degree: int) -> list[list[torch.Tensor]]:
    pool = GroupPool({dist.get_world_size(), ulysses_degree}, 30, 30)
    found = [on_group(case, method, pool, ulysses_degree) for method, case in cases]
    pool.close()
    return found


def assembled(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The ranks' rows in the order of the pack; the sinks' gradients summed."""
    order = torch.cat([part[0] for part in parts]).argsort()
    rows = [torch.cat([part[i] for part in parts])[order] for i in range(1, 5)]
    return [*rows, torch.stack([part[5] for part in parts]).sum(0)]


CHOICES = {"any two": every_pair, "any three": product}
"""Which packs, heads and features are tried together."""


def assert_equals_dense(num_ranks: int, cases: list[tuple[str, Case]], ulysses_degree: int) -> None:
    ranks = run_ranks(on_ranks, num_ranks, cases, ulysses_degree)
    expected = {case: dense(case) for _, case in cases}
    for number, (method, case) in enumerate(cases):
        found = assembled([rank[number] for rank in ranks])
        for name, ours, theirs in zip(NAMES, found, expected[case], strict=True):
            assert ours.shape == theirs.shape, (method, case, name)
            error = (ours - theirs).abs().max().item() if theirs.numel() else 0.0
            assert error < 1e-12, (method, case, name, error)


@pytest.mark.parametrize(
    ("num_ranks", "choices"), often([(2, "any three"), (4, "any two"), (4, "any three")], (4, "any two"))
)
def test_equals_dense_attention(num_ranks: int, choices: str) -> None:
    """Every kind of pack, of heads, and of features; ranks without tokens or heads included."""
    cases = [(m, case_of(*key)) for m in METHODS[num_ranks] for key in CHOICES[choices](PACKS, HEADS, FEATURES)]
    assert_equals_dense(num_ranks, cases, 2)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_both_directions_equal_dense_attention(num_ranks: int) -> None:
    """So does Ulysses where tokens see those after them, too; it is not the same as if they did not."""
    keys = list(product(PACKS, HEADS, ("plain", "softcap", "sinks")))
    cases = [("ulysses", replace(case_of(*key), causal=False)) for key in keys]
    assert_equals_dense(num_ranks, cases, 2)
    case = case_of("one long", "gqa", "plain")
    assert (dense(case)[0] - dense(replace(case, causal=False))[0]).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["gather", "ring", "ulysses_ring", "token_ring"])
def test_both_directions_by_other_methods_are_refused(method: str) -> None:
    """They send keys to those that come after them only; a group of one rank sends nothing, whatever its method."""
    x = torch.randn(4, 2, 8)
    scores = Scores(1.0, causal=False)
    layout = layout_of(Group((0, 1), (0,), method, 1 if method == "ulysses_ring" else None), [8])
    two = AttentionContext(layout, (0, 1), 0, None, method, CPU, torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=f"only 'ulysses' is exact across ranks, not '{method}'"):
        attend(x, x, x, scores, two.at(0))
    one = AttentionContext(layout_of(Group((0,), (0,), "gather"), [4]), (0,), 0, None, method, CPU, torch.device("cpu"))
    expected = torch.nn.functional.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3, scale=1.0)
    torch.testing.assert_close(attend(x, x, x, scores, one.at(0)), expected.transpose(0, 1))


@pytest.mark.slow
def test_equals_dense_attention_on_eight_ranks() -> None:
    """Two blocks of four ranks: Ulysses in each, a ring between them; and every other method at degree 8."""
    keys = product(PACKS, ("mha", "gqa", "mqa"), ("plain", "window", "sinks", "all"))
    cases = [(method, case_of(*key)) for key in keys for method in METHODS[4]]
    assert_equals_dense(8, cases, 4)


def doubled_window(cases: list[tuple[str, Case]], ulysses_degree: int) -> list[list[torch.Tensor]]:
    return on_ranks([(method, replace(case, window=2 * (case.window or 1))) for method, case in cases], ulysses_degree)


def test_any_two_choices_are_tried_together() -> None:
    """In the cases of each run: every pack with every kind of heads, with every feature, and these with each other."""
    cases = every_pair(PACKS, HEADS, FEATURES)
    for found, expected in (
        ({(pack, heads) for pack, heads, _ in cases}, product(PACKS, HEADS)),
        ({(pack, features) for pack, _, features in cases}, product(PACKS, FEATURES)),
        ({(heads, features) for _, heads, features in cases}, product(HEADS, FEATURES)),
    ):
        assert found == set(expected)
    assert len(cases) < len(PACKS) * len(HEADS) * len(FEATURES) / 4


def test_a_wrong_window_is_noticed() -> None:
    """The comparison can fail: a window of another size is far outside its tolerance, by every method."""
    case = case_of("long and short", "gqa", "window")
    ranks = run_ranks(doubled_window, 4, [(method, case) for method in METHODS[4]], 2)
    for number in range(len(METHODS[4])):
        assert (assembled([rank[number] for rank in ranks])[0] - dense(case)[0]).abs().max() > 1e-2


def rounded(cases: list[tuple[str, Case]]) -> list[list[torch.Tensor]]:
    return on_ranks(cases, 2)


def test_short_types_err_no_more_than_one_rank() -> None:
    """In bf16, four ranks err no more than 1.5 times what one rank's kernel does, in output and gradients."""
    lengths = (3, 40, 1, 190, 23, 2, 64)
    case = Case(lengths, (4, 2), head_dim=16, value_dim=16, scaling=0.25, dtype=torch.bfloat16)
    exact = dense(case)
    q, k, v, weights, _ = (x.requires_grad_() for x in case.tensors())
    out = CPU(q, k, v, Segments.packed(lengths, torch.device("cpu")), Scores(case.scaling))
    alone = [out.detach(), *torch.autograd.grad((out * weights).sum(), [q, k, v])]
    ranks = run_ranks(rounded, 4, [(method, case) for method in METHODS[4]])
    for number, method in enumerate(METHODS[4]):
        found = assembled([rank[number] for rank in ranks])
        for name, ours, single, reference in zip(NAMES, found, alone, exact, strict=False):
            errors = [(x.double() - reference).norm().item() for x in (ours, single)]
            assert errors[0] <= 1.5 * errors[1], (method, name, errors)
