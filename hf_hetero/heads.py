"""This module says which heads each rank of a group computes, where ranks exchange heads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from hf_hetero.layout import equal_splits


@dataclass(frozen=True, slots=True)
class HeadShare:
    """A `HeadShare` is what one rank computes: query heads `[q_start, q_end)`, key-value heads `[kv_start, kv_end)`.

    `kv_of_q` names, for each query head, its key-value head counted from `kv_start`.
    """

    q_start: int
    q_end: int
    kv_start: int
    kv_end: int
    kv_of_q: tuple[int, ...]

    @property
    def num_q(self) -> int:
        """Count the query heads."""
        return self.q_end - self.q_start

    @property
    def num_kv(self) -> int:
        """Count the key-value heads."""
        return self.kv_end - self.kv_start

    @property
    def is_grouped(self) -> bool:
        """Tell whether the key-value heads serve equal runs of query heads, as kernels expect."""
        if not self.num_kv or self.num_q % self.num_kv:
            return self.num_q == 0
        run = self.num_q // self.num_kv
        return self.kv_of_q == tuple(head // run for head in range(self.num_q))


def share_heads(num_heads: int, num_kv_heads: int, degree: int) -> tuple[HeadShare, ...]:
    """Share query heads in near-equal runs; a rank gets every key-value head its run needs, so some travel twice."""
    group_size = num_heads // num_kv_heads
    bounds = (0, *accumulate(equal_splits(num_heads, degree)))
    shares: list[HeadShare] = []
    for start, end in pairwise(bounds):
        kv_start = start // group_size if end > start else 0
        kv_end = (end - 1) // group_size + 1 if end > start else 0
        kv_of_q = tuple(head // group_size - kv_start for head in range(start, end))
        shares.append(HeadShare(start, end, kv_start, kv_end, kv_of_q))
    return tuple(shares)
