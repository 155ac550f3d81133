"""Which group sizes exist, and which ranks may form a group."""

from __future__ import annotations

import pytest

from hf_hetero import Topology
from hf_hetero.errors import ConfigError
from hf_hetero.topology import aligned_blocks


@pytest.mark.parametrize(
    ("num_ranks", "degrees"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 4)),
        (6, (1, 2, 4, 6)),
        (8, (1, 2, 4, 8)),
        (12, (1, 2, 4, 8, 12)),
    ],
)
def test_degrees(num_ranks: int, degrees: tuple[int, ...]) -> None:
    """Powers of two, and all ranks together, for every number of ranks."""
    assert Topology(num_ranks).degrees == degrees


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6, 8, 12])
def test_blocks_are_aligned_and_disjoint(num_ranks: int) -> None:
    """Blocks of one degree do not overlap, and start at multiples of it."""
    for degree in Topology(num_ranks).degrees:
        blocks = aligned_blocks(num_ranks, degree)
        assert len(blocks) == num_ranks // degree
        assert all(block[0] % degree == 0 and len(block) == degree for block in blocks)
        assert len({rank for block in blocks for rank in block}) == degree * len(blocks)


def test_nodes() -> None:
    """A degree above the ranks of a node crosses nodes."""
    assert Topology(16, 8).crosses_nodes(16)
    assert not Topology(16, 8).crosses_nodes(8)
    assert not Topology(16).crosses_nodes(16)


@pytest.mark.parametrize("num_ranks", [0, -1, 2.5])
def test_bad_counts(num_ranks: int) -> None:
    """A count that is no positive integer is named."""
    with pytest.raises(ConfigError, match=f"num_ranks is {num_ranks}"):
        Topology(num_ranks)
