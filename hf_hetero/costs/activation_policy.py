"""An activation policy says what a group costs that does something to hold more tokens (`plan.ACTIVATIONS`).

Some samples of a run are too long, or a micro-batch too full, for the memory that all saved tensors take. To
recompute layers everywhere makes every sample pay a third more. A plan decides for each group: ByteScale offloads by
need (arXiv:2502.21231), MEMO by how much a long sample's attention hides (arXiv:2407.12117).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_hetero.errors import ConfigError
from hf_hetero.plan import ACTIVATIONS

LEAST_NUMBER, MOST_NUMBER = 1e-30, 1e30
"""Least of what is divided by, and most of all: with others, sums of seconds and bytes would overflow."""


@dataclass(frozen=True)
class ActivationPolicy:
    """An `ActivationPolicy` holds the costs in which a group that follows it differs from the rest of the run.

    Args:
        activation_bytes_per_token: memory of a token on the device.
        attention_s_per_token2, linear_s_per_token: as in `CostModel`.
        exchanges: bytes that ranks exchange, by what they exchange otherwise.
        host_bytes_per_token: memory of a token in the host.

    Raises:
        ConfigError: a number is negative, not finite, or 0 where there must be memory.
    """

    activation_bytes_per_token: float
    attention_s_per_token2: float
    linear_s_per_token: float
    exchanges: float = 1.0
    host_bytes_per_token: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= MOST_NUMBER:  # written so that NaN is refused, too
                raise ConfigError(f"An activation policy's {name} is {value!r}; it must be 0 or more.")
        if not self.activation_bytes_per_token >= LEAST_NUMBER:
            raise ConfigError("An activation policy's activation_bytes_per_token must be above 0.")

    def room_bytes(self, free_bytes: float, host_bytes: float | None) -> float:
        """Count the device's bytes for activations: of those that are free, as many as the host's bytes go with.

        Args:
            free_bytes: of the device, beside the model.
            host_bytes: of the host, for activations; None: no limit.
        """
        if host_bytes is None or self.host_bytes_per_token <= 0:
            return free_bytes
        tokens = max(1.0, host_bytes / self.host_bytes_per_token)
        return min(free_bytes, tokens * self.activation_bytes_per_token)


def prices_under(policy: ActivationPolicy, room_bytes: float, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of a cost model that are other ones for groups that follow a policy; they have no other.

    Args:
        policy: that they follow.
        room_bytes: of the device, for their activations.
        values: of the fields of `CostModel`, by name.
    """
    kv_bytes, query_bytes = values["kv_bytes_per_token"], values["query_bytes_per_token"]
    return {
        "activation_policies": {},
        "activation_bytes_per_token": policy.activation_bytes_per_token,
        "attention_s_per_token2": policy.attention_s_per_token2,
        "linear_s_per_token": policy.linear_s_per_token,
        "all_to_all_bytes_per_token": values["all_to_all_bytes_per_token"] * policy.exchanges,
        "kv_bytes_per_token": None if kv_bytes is None else kv_bytes * policy.exchanges,
        "query_bytes_per_token": None if query_bytes is None else query_bytes * policy.exchanges,
        "memory_bytes_per_rank": values["model_state_bytes_per_rank"] + room_bytes,
    }


def check_policies(policies: Mapping[str, ActivationPolicy], attention_s: float, linear_s: float, name: str) -> None:
    """Refuse policies that no group can follow, or that take less time than to follow none.

    Args:
        policies: of a cost model, by name.
        attention_s, linear_s: of groups that follow none, as in `CostModel`.
        name: of the cost model, for messages.

    Raises:
        ConfigError: with the policy's name.
    """
    if unknown := sorted(set(policies) - set(ACTIVATIONS)):
        raise ConfigError(
            f"Cost model {name!r}: activation_policies has {unknown}; there are {', '.join(ACTIVATIONS)}."
        )
    for policy_name, policy in policies.items():
        attention, linear = policy.attention_s_per_token2, policy.linear_s_per_token
        if attention < attention_s or linear < linear_s or policy.exchanges < 1:
            raise ConfigError(
                f"Cost model {name!r}: activation policy {policy_name!r} takes less time than none. "
                "Make what it does the rule of the run, and measure that."
            )
