"""Free ranks go to the smallest groups."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hf_hetero.what_if.groups import Open, doubled


def doubled_one_by_one(groups: Open, num_ranks: int, degrees: tuple[int, ...]) -> Open:
    """By the definition: as long as any group can double, the first of the smallest of those does."""
    groups = list(groups)
    while True:
        free = num_ranks - sum(degree for degree, _ in groups)
        able = [place for place, (degree, _) in enumerate(groups) if degree <= free and 2 * degree in degrees]
        if not able:
            return groups
        place = min(able, key=lambda place: (groups[place][0], place))
        groups[place] = (2 * groups[place][0], groups[place][1])


@given(
    st.lists(st.sampled_from([1, 2, 4, 8, 12]), max_size=12),
    st.integers(0, 80),
    st.sets(st.sampled_from([1, 2, 4, 8, 12, 16, 24])),
)
def test_the_smallest_double_first(sizes: list[int], num_free: int, degrees: set[int]) -> None:
    """As by the definition, whatever there is to start with."""
    groups: Open = [(size, [number]) for number, size in enumerate(sizes)]
    offered = tuple(sorted(degrees))
    ranks = sum(sizes) + num_free
    assert doubled(groups, ranks, offered) == doubled_one_by_one(groups, ranks, offered)
