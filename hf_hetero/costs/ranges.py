"""This module says what the values of a cost model may be, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_hetero.costs.activation_policy import LEAST_NUMBER, MOST_NUMBER
from hf_hetero.costs.places import check_speeds
from hf_hetero.errors import ConfigError

PROVENANCES = ("estimated", "measured", "refitted")
"""Where seconds come from: counted, timed by `hf-hetero profile`, or corrected by measured steps."""


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse a value that cannot be.

    Args:
        values: of the fields of `CostModel`, by name.

    Raises:
        ConfigError: a number is negative or not finite, a bandwidth is 0, a speed is no share, or a name is unknown.
    """
    name: str = values["name"]
    for field, value in values.items():
        for number in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(number, int | float) and not 0 <= number <= MOST_NUMBER:
                raise ConfigError(
                    f"Cost model {name!r:.60}: {field} is {value!r:.60}; it must be 0 or more, and "
                    f"at most {MOST_NUMBER:.0e}."
                )
    bandwidths: Mapping[int, float] = values["all_to_all_bytes_per_s"]
    if any(degree < 1 for degree in bandwidths):
        raise ConfigError(f"Cost model {name!r}: all_to_all_bytes_per_s has a degree below 1.")
    if any(not bandwidth >= LEAST_NUMBER for bandwidth in bandwidths.values()):
        raise ConfigError(f"Cost model {name!r}: all_to_all_bytes_per_s must be above 0 at every degree.")
    network, overlap = values["network_bytes_per_s"], values["ring_overlap"]
    if (network is not None and network < LEAST_NUMBER) or overlap > 1:
        raise ConfigError(
            f"Cost model {name!r}: network_bytes_per_s is {network} and ring_overlap is "
            f"{overlap}; a bandwidth is above 0, and a share at most 1."
        )
    if (both_ways := values["both_ways_overlap"]) is not None and both_ways > 1:
        raise ConfigError(f"Cost model {name!r}: both_ways_overlap is {both_ways}; it is a share, so at most 1.")
    if not values["activation_bytes_per_token"] >= LEAST_NUMBER:
        raise ConfigError(f"Cost model {name!r}: activation_bytes_per_token must be above 0.")
    for field in ("rank_speeds", "link_speeds"):
        check_speeds(name, field, values[field])
    if (provenance := values["provenance"]) not in (None, *PROVENANCES):
        raise ConfigError(
            f"Cost model {name!r}: provenance is {provenance!r:.60}; choose one of {', '.join(PROVENANCES)}, or leave "
            "it out."
        )
