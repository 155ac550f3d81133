"""Differencing splits numbers into parts of about equal sums: Karmarkar and Karp's method, for any number of parts.

Two partial splits are joined largest part to smallest, those of the widest spread first, until one is left (Karmarkar
and Karp, "The differencing method of set partitioning", 1982; Michiels, Korst, Aarts and van Leeuwen, 2003, for more
than two parts).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

Part = tuple[float, list[int]]
"""A sum, and the positions of the numbers that it is of."""


def split(numbers: Sequence[float], num_parts: int, equal_counts: bool = False) -> list[list[int]]:
    """Split numbers into parts of about equal sums.

    Args:
        numbers: what is split, none below 0.
        num_parts: at least 1.
        equal_counts: whether parts have as many numbers as one another, or one more where that does not divide.

    Returns:
        The positions of each part's numbers, ascending; the largest sum first.
    """
    order = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))
    width = num_parts if equal_counts else 1
    heap: list[tuple[float, int, list[Part]]] = []
    for start in range(0, len(order), width):
        parts: list[Part] = [(numbers[i], [i]) for i in order[start : start + width]]
        parts += [(0.0, []) for _ in range(num_parts - len(parts))]
        heap.append((parts[-1][0] - parts[0][0], start, parts))  # the widest spread is the least of these
    heapify(heap)
    while len(heap) > 1:
        _, number, first = heappop(heap)
        _, _, second = heappop(heap)
        joined = [(a + b, held + others) for (a, held), (b, others) in zip(first, reversed(second), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    return [sorted(held) for _, held in heap[0][2]] if heap else [[] for _ in range(num_parts)]
