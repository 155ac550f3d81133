"""What attention moves is what the formula says: counted on real ranks, element by element."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention.test_methods import METHODS, case_of, on_group
from helpers import often, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import _functional_collectives as collectives

from hf_hetero.costs.volume import Heads, Volume, causal_pairs, travelling_queries, travelling_tokens, volume
from hf_hetero.layout import asking, contiguous, layout_of, needed, zigzag
from hf_hetero.plan import Group
from hf_hetero.ranks.groups import GroupPool

PACK = tuple(10 + (97 * sample) % 254 for sample in range(60))  # 8192 tokens or so, in 60 samples
KEYS = list(product(["many short", "one long", "long and short", "one token"], ["mha", "gqa", "mqa", "uneven"]))
FEATURES = ("plain", "window", "values of another size")


class Counter:
    """Counts the elements that leave this rank, while the real collectives run."""

    def __init__(self) -> None:
        self.elements = 0
        self._all_to_all, self._shift = collectives.all_to_all_single, dist.batch_isend_irecv

    def all_to_all(self, buffer: torch.Tensor, out_splits: Any, in_splits: list[int], group: Any) -> torch.Tensor:
        mine = dist.get_rank(group)
        self.elements += sum(num for rank, num in enumerate(in_splits) if rank != mine)
        return self._all_to_all(buffer, out_splits, in_splits, group)

    def shift(self, ops: list[dist.P2POp]) -> Any:
        self.elements += sum(op.tensor.numel() for op in ops if op.op is dist.isend)
        return self._shift(ops)


def counted(cases: list[tuple[str, tuple[str, str, str]]], dtype: torch.dtype = torch.float64) -> list[int]:
    """Elements that this rank sends in a forward and a backward pass of each case."""
    counter = Counter()
    collectives.all_to_all_single = counter.all_to_all  # type: ignore[assignment]
    dist.batch_isend_irecv = counter.shift
    pool = GroupPool({dist.get_world_size(), 2}, 30, 30)
    found: list[int] = []
    for method, key in cases:
        counter.elements = 0
        on_group(replace(case_of(*key), dtype=dtype), method, pool, 2)
        found.append(counter.elements)
    pool.close()
    return found


@pytest.mark.parametrize("num_ranks", often([2, 4], 4))
def test_each_method_moves_what_its_formula_says(num_ranks: int) -> None:
    """Every method, pack, kind of heads and window; on every rank."""
    cases = [(m, (*key, features)) for m in METHODS[num_ranks] for key in KEYS for features in FEATURES]
    ranks = run_ranks(counted, num_ranks, cases)
    for number, (method, key) in enumerate(cases):
        case = case_of(*key)
        inner = 2 if method == "ulysses_ring" else None
        group = Group(tuple(range(num_ranks)), tuple(range(len(case.lengths))), method, inner)
        layout, heads = layout_of(group, case.lengths), Heads(*case.heads, case.head_dim, case.value_dim)
        expected = [volume(layout, method, heads, rank, case.window).total for rank in range(num_ranks)]
        assert [rank[number] for rank in ranks] == expected, (method, key)


def test_a_log_sum_exp_takes_two_elements_of_half_the_size() -> None:
    """In bf16 a token ring moves what the formula says for such; a formula of one element would be noticed."""
    keys = [(pack, heads, FEATURES[2]) for pack in ("one long", "long and short") for heads in ("mha", "gqa")]
    ranks = run_ranks(counted, 4, [("token_ring", key) for key in keys], torch.bfloat16)
    for number, key in enumerate(keys):
        case = case_of(*key)
        layout = zigzag(case.lengths, 4)
        one = Heads(*case.heads, case.head_dim, case.value_dim)
        expected = [volume(layout, "token_ring", replace(one, lse_elements=2), rank).total for rank in range(4)]
        assert [rank[number] for rank in ranks] == expected
        assert expected > [volume(layout, "token_ring", one, rank).total for rank in range(4)]


def test_closed_forms() -> None:
    """The table of the module: Ulysses at its formula; one long sample gathers all keys that lie before a query."""
    heads, degree, tokens = Heads(8, 2, 64, 64), 4, 4096
    each = [volume(contiguous([tokens], degree), "ulysses", heads, rank) for rank in range(degree)]
    assert {v.forward for v in each} == {tokens // degree * 3 // 4 * 64 * (2 * 8 + 2 * degree)}
    assert sum(v.backward for v in each) == sum(v.forward for v in each)
    long = zigzag([tokens], degree)
    rows = sum(volume(long, "gather", heads, rank).forward for rank in range(degree)) / (2 * 2 * 64)
    piece = tokens // 8  # rank r meets all pieces up to number 7 - r, of which it has two, or one where they touch
    assert rows == piece * sum(8 - r - 2 for r in range(degree))
    ring, gather = (volume(long, method, heads, 1) for method in ("ring", "gather"))
    assert ring == Volume(gather.forward, gather.forward + gather.backward)
    # queries travel as far as keys; 5 tensors of their heads for 6 of the keys' heads, and 3 numbers a head
    lent = [volume(long, "token_ring", Heads(8, 8, 64, 64), rank) for rank in range(degree)]
    fetched = [volume(long, "ring", Heads(8, 8, 64, 64), rank) for rank in range(degree)]
    assert sum(v.total for v in lent) * 6 * 64 == sum(v.total for v in fetched) * (5 * 64 + 3)
    assert sum(v.forward for v in lent) == rows * 8 * (64 + 64 + 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 60) | st.just(900), max_size=12), st.integers(1, 8), st.booleans())
def test_travelling_tokens(lengths: list[int], degree: int, slices: bool) -> None:
    """The busiest rank's, as counted pair by pair."""
    layout = (contiguous if slices else zigzag)(lengths, degree)
    ranks = range(degree)
    sent = [[sum(s.num_tokens for s in needed(layout, to, me)) if to != me else 0 for to in ranks] for me in ranks]
    assert travelling_tokens(layout) == max([*map(sum, sent), *map(sum, zip(*sent, strict=True))])


@settings(deadline=None)
@given(st.lists(st.integers(1, 60) | st.just(900), max_size=12), st.integers(1, 8), st.booleans())
def test_travelling_queries(lengths: list[int], degree: int, slices: bool) -> None:
    """The busiest rank's, as counted pair by pair."""
    layout = (contiguous if slices else zigzag)(lengths, degree)
    ranks = range(degree)
    sent = [[sum(s.num_tokens for s in asking(layout, me, to)) if to != me else 0 for to in ranks] for me in ranks]
    assert travelling_queries(layout) == max([*map(sum, sent), *map(sum, zip(*sent, strict=True))])


def test_short_samples_cost_next_to_nothing() -> None:
    """60 samples, 8192 tokens, degree 4: gathering moves less than an eighth of what Ulysses does, also in slices."""
    heads = Heads(8, 8, 64, 64)
    ulysses = max(volume(contiguous(PACK, 4), "ulysses", heads, rank).total for rank in range(4))
    for layout in (contiguous(PACK, 4), zigzag(PACK, 4)):
        assert max(volume(layout, "gather", heads, rank).total for rank in range(4)) <= ulysses / 8
    assert abs(sum(PACK) - 8192) < 300


def test_pairs_of_the_busiest_rank() -> None:
    """A zigzag leaves nobody much more than a share of the pairs; slices leave the last rank nearly twice that."""
    lengths = [4000]
    share = sum(length**2 for length in lengths) / 4
    assert causal_pairs(zigzag(lengths, 4)) < 1.01 * share
    assert causal_pairs(contiguous(lengths, 4)) > 1.7 * share


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 4))
def test_pairs_by_who_holds_the_key(lengths: list[int], degree: int) -> None:
    """Counted pair by pair, a token with itself by half; all ranks together have those of all samples."""
    layout = zigzag(lengths, degree)
    keys = [[(lengths[s.sample], t) for s in spans for t in range(s.start, s.end)] for spans in layout.spans]
    pairs = [sum(2 * (length - t) - 1 for length, t in of_rank) for of_rank in keys]
    assert causal_pairs(layout, by_keys=True) == max(pairs)
    assert sum(pairs) == sum(length**2 for length in lengths)
