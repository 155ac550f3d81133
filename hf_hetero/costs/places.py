"""Places tell how fast a group's ranks are on a machine whose ranks or links are not alike.

A cost model says what groups take on ranks of full speed. Of others it knows shares of that: `rank_speeds`, how fast a
rank computes, and `link_speeds`, how fast bytes pass between a rank and the one before it. Groups are contiguous ranks,
so a line of links is enough: where a node's network is slow, it is its first link and the one behind its last rank;
where two halves are far from each other, it is the one between them. (That mixed clusters call for plans that know who
stands where: Holmes, arXiv:2312.03549; that single ranks of large runs are slow, by some 10 %, and hold all others up:
MegaScale, arXiv:2402.15627; that such are to be found and acted upon while a run goes on: C4,
arXiv:2406.04594.)

A group waits for its slowest rank, and its exchange for its slowest link. What a micro-batch costs whatever it holds,
and the latency of messages, is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hf_hetero.costs.activation_policy import ActivationPolicy
from hf_hetero.errors import ConfigError

LEAST_SPEED = 1e-3
"""Least share of the full speed: what is slower has failed."""


class Place(NamedTuple):
    """A `Place` is how fast the ranks of a group are, as shares of what the cost model says.

    Args:
        rank_speed: of the rank that computes slowest.
        link_speed: of the slowest link between two of them; 1 for a rank alone.
    """

    rank_speed: float
    link_speed: float


@dataclass(frozen=True, slots=True)
class Places:
    """`Places` find the place of a group, and remember it.

    Args:
        rank_speeds: rank -> share of the full speed at which it computes; 1 where absent.
        link_speeds: rank -> share of the full bandwidth between it and the rank before it; 1 where absent.
    """

    rank_speeds: Mapping[int, float]
    link_speeds: Mapping[int, float]
    known: dict[tuple[int, int], Place] = field(default_factory=dict[tuple[int, int], Place])

    def of(self, ranks: Sequence[int]) -> Place:
        """Return the place of contiguous ranks."""
        first, degree = ranks[0], len(ranks)
        if (place := self.known.get((first, degree))) is None:
            last = first + degree - 1
            place = Place(_slowest(self.rank_speeds, first, last), _slowest(self.link_speeds, first + 1, last))
            self.known[first, degree] = place
        return place


def _slowest(speeds: Mapping[int, float], first: int, last: int) -> float:
    """Return the least of the speeds from one number to another; 1 where none is listed."""
    if last - first < len(speeds):  # whichever is shorter, the span or the list
        return min((speeds.get(number, 1.0) for number in range(first, last + 1)), default=1.0)
    return min((speed for number, speed in speeds.items() if first <= number <= last), default=1.0)


def prices_at(place: Place, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of a cost model that are other ones for the groups of a place.

    Args:
        place: of the groups.
        values: of the fields of `CostModel`, by name.
    """
    rank, link = place
    policies: Mapping[str, ActivationPolicy] = values["activation_policies"]
    network = values["network_bytes_per_s"]
    return {
        "rank_speeds": {},
        "link_speeds": {},
        "attention_s_per_token2": values["attention_s_per_token2"] / rank,
        "linear_s_per_token": values["linear_s_per_token"] / rank,
        "all_to_all_bytes_per_s": {d: v * link for d, v in values["all_to_all_bytes_per_s"].items()},
        "network_bytes_per_s": network and network * link,
        # of these seconds a part is computed and a part exchanged, nobody knows how much
        "state_s_per_token": {d: v / min(rank, link) for d, v in values["state_s_per_token"].items()},
        "activation_policies": {
            name: replace(
                policy,
                attention_s_per_token2=policy.attention_s_per_token2 / rank,
                linear_s_per_token=policy.linear_s_per_token / rank,
            )
            for name, policy in policies.items()
        },
    }


def check_speeds(name: str, field_name: str, speeds: Mapping[int, float]) -> None:
    """Refuse speeds that cannot be.

    Args:
        name: of the cost model.
        field_name: "rank_speeds" or "link_speeds".
        speeds: by rank.

    Raises:
        ConfigError: a rank below 0, or a speed that is no share of the full one.
    """
    for rank, speed in speeds.items():
        if rank < 0 or not LEAST_SPEED <= speed <= 1:
            raise ConfigError(
                f"Cost model {name!r}: {field_name} of rank {rank} is {speed!r:.60}; a speed is a share of what the "
                f"cost model says, {LEAST_SPEED:g} to 1. Make it a cost model of the fastest ranks and links."
            )
