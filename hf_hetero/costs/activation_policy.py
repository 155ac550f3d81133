"""An activation policy says what a group costs that does something to hold more tokens (`plan.ACTIVATIONS`).

Some samples of a run are too long, or a micro-batch too full, for the memory that all saved tensors take. To
recompute layers everywhere makes every sample pay a third more. A plan decides for each group: ByteScale offloads by
need (arXiv:2502.21231), MEMO by how much a long sample's attention hides (arXiv:2407.12117).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hf_hetero.errors import ConfigError

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
