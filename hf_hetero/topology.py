"""This module describes the ranks of a run: how many, how they sit on nodes, and which of them may form a group."""

from __future__ import annotations

from dataclasses import dataclass

from hf_hetero.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """A `Topology` is the ranks of a run, and the memory that each may use.

    Args:
        num_ranks: ranks of the whole run (torch's world size).
        ranks_per_node: ranks that share one node's fast links; None means all of them.
        memory_bytes: memory that one rank may use, in bytes; None means unknown.
        host_memory_bytes: memory of the host that one rank may use beside, in bytes; None means unknown.

    Raises:
        ConfigError: a count is not a positive integer.
    """

    num_ranks: int
    ranks_per_node: int | None = None
    memory_bytes: int | None = None
    host_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_ranks", "ranks_per_node", "memory_bytes", "host_memory_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"Topology.{name} is {value!r}: it must be a positive integer.")

    @property
    def degrees(self) -> tuple[int, ...]:
        """Return the group sizes worth offering, ascending: the powers of two, and all ranks together."""
        powers = [1 << i for i in range(self.num_ranks.bit_length()) if 1 << i <= self.num_ranks]
        return tuple(sorted({*powers, self.num_ranks}))

    def crosses_nodes(self, degree: int) -> bool:
        """Return whether a group of this degree spans more than one node."""
        # a block starts at a multiple of its degree: where that divides a node's ranks, it does not straddle two nodes
        return self.ranks_per_node is not None and degree > self.ranks_per_node


def aligned_blocks(num_ranks: int, degree: int) -> list[tuple[int, ...]]:
    """Return all groups of one degree: contiguous ranks that start at a multiple of the degree.

    >>> aligned_blocks(6, 2)
    [(0, 1), (2, 3), (4, 5)]
    >>> aligned_blocks(6, 4)
    [(0, 1, 2, 3)]
    """
    starts = range(0, num_ranks - degree + 1, degree)
    return [tuple(range(start, start + degree)) for start in starts]
