"""How long a group takes and how much memory it needs: one small formula, one JSON file.

For a group of degree d that holds samples of s tokens (FlexSP, arXiv:2412.01523, eq. 11-14):

    seconds = micro_batch_s + sum(attention_s_per_token2 * s**2 + linear_s_per_token * s) / d
              + [d > 1] * (sum(all_to_all_bytes_per_token * s) / d / all_to_all_bytes_per_s[d]
                           + all_to_all_latency_s[d])
    bytes   = model_state_bytes_per_rank + activation_bytes_per_token * sum(s) / d

A micro-batch lasts as long as its slowest group; a step is its micro-batches, one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_hetero.errors import ConfigError
from hf_hetero.plan import Group, Plan

COST_FORMAT = "hf-hetero-cost/1"


@dataclass(frozen=True)
class CostModel:
    """Seconds and bytes of a group on one machine, for one model.

    Args:
        attention_s_per_token2: seconds of one rank for the part that grows with the square of a sample's tokens.
        linear_s_per_token: seconds of one rank for the part that grows with the tokens.
        micro_batch_s: seconds that every micro-batch costs, whatever it holds.
        all_to_all_bytes_per_token: bytes a token moves through one rank's link in a forward and a backward pass.
        all_to_all_bytes_per_s: bandwidth of one rank inside a group, by degree; its keys are the degrees offered.
        all_to_all_latency_s: fixed seconds of the exchanges of one micro-batch, by degree; 0 where absent.
        activation_bytes_per_token: memory of a token in a forward and a backward pass.
        model_state_bytes_per_rank: memory of weights, gradients and optimizer.
        memory_bytes_per_rank: memory that a rank may use.
        ranks_per_node: ranks that share fast links; information only.
        name, source: what was measured, where, and how.

    Raises:
        ConfigError: a number is negative or not finite, or the memory leaves room for no token.
    """

    attention_s_per_token2: float
    linear_s_per_token: float
    micro_batch_s: float
    all_to_all_bytes_per_token: float
    all_to_all_bytes_per_s: Mapping[int, float]
    activation_bytes_per_token: float
    model_state_bytes_per_rank: float
    memory_bytes_per_rank: float
    all_to_all_latency_s: Mapping[int, float] = field(default_factory=dict[int, float])
    ranks_per_node: int | None = None
    name: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            for number in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(number, int | float) and not (math.isfinite(number) and number >= 0):
                    raise ConfigError(f"Cost model {self.name!r}: {item.name} is {value!r}; it must be 0 or more.")
        if any(degree < 1 for degree in self.all_to_all_bytes_per_s):
            raise ConfigError(f"Cost model {self.name!r}: all_to_all_bytes_per_s has a degree below 1.")
        if any(not bandwidth > 0 for bandwidth in self.all_to_all_bytes_per_s.values()):
            raise ConfigError(f"Cost model {self.name!r}: all_to_all_bytes_per_s must be above 0 at every degree.")
        if not self.activation_bytes_per_token > 0:
            raise ConfigError(f"Cost model {self.name!r}: activation_bytes_per_token must be above 0.")
        if self.capacity_tokens < 1:
            free = self.memory_bytes_per_rank - self.model_state_bytes_per_rank
            raise ConfigError(
                f"Cost model {self.name!r}: {free / 2**30:.2f} GiB is left beside the model, which holds no token. "
                "Use more ranks, a smaller model, or sharded training."
            )

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one rank can hold in a micro-batch."""
        free = self.memory_bytes_per_rank - self.model_state_bytes_per_rank
        return int(free // self.activation_bytes_per_token)

    def degrees(self, num_ranks: int) -> tuple[int, ...]:
        """Degrees offered on this many ranks, ascending: 1, and those with a bandwidth."""
        return tuple(d for d in sorted({1, *self.all_to_all_bytes_per_s}) if d <= num_ranks)

    def linear_s(self, degree: int) -> float:
        """Rank-seconds of a token at this degree, its exchange included."""
        exchange = self.all_to_all_bytes_per_token / self.all_to_all_bytes_per_s[degree] if degree > 1 else 0.0
        return self.linear_s_per_token + exchange

    def fixed_s(self, degree: int) -> float:
        """Seconds that a group of this degree takes before its first token."""
        return self.micro_batch_s + (self.all_to_all_latency_s.get(degree, 0.0) if degree > 1 else 0.0)

    def work(self, length: int, degree: int) -> float:
        """Rank-seconds of one sample: divided by the degree, it is what the sample adds to its group."""
        return self.attention_s_per_token2 * length * length + self.linear_s(degree) * length

    def seconds(self, lengths: Iterable[int], degree: int) -> float:
        """Seconds of a group that holds these samples."""
        return self.fixed_s(degree) + sum(self.work(length, degree) for length in lengths) / degree

    def num_bytes(self, lengths: Iterable[int], degree: int) -> float:
        """Memory of one rank of a group that holds these samples."""
        return self.model_state_bytes_per_rank + self.activation_bytes_per_token * sum(lengths) / degree

    def group_seconds(self, group: Group, lengths: Sequence[int]) -> float:
        """Seconds of a plan's group, given the lengths of the global batch."""
        return self.seconds((lengths[sample] for sample in group.samples), group.degree)

    def plan_seconds(self, plan: Plan, lengths: Sequence[int]) -> float:
        """Seconds of a step: the slowest group of each micro-batch, summed."""
        return sum(max(self.group_seconds(g, lengths) for g in m.groups) for m in plan.micro_batches)

    def with_capacity(self, tokens: int) -> CostModel:
        """The same machine with room for this many tokens on a rank."""
        memory = self.model_state_bytes_per_rank + tokens * self.activation_bytes_per_token
        return replace(self, memory_bytes_per_rank=math.ceil(memory))

    def with_degrees(self, degrees: Iterable[int]) -> CostModel:
        """The same machine, offering only these degrees (and 1)."""
        offered = set(degrees)
        kept = {d: v for d, v in self.all_to_all_bytes_per_s.items() if d in offered}
        return replace(self, all_to_all_bytes_per_s=kept)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form (format hf-hetero-cost/1)."""
        data = asdict(self)
        for name in ("all_to_all_bytes_per_s", "all_to_all_latency_s"):
            data[name] = {str(degree): value for degree, value in data[name].items()}
        return {"format": COST_FORMAT, **{key: value for key, value in data.items() if value is not None}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "cost model") -> CostModel:
        """Inverse of `to_dict`; fields this version does not know are left aside.

        Raises:
            ConfigError: another format, a missing field, or a value of the wrong kind.
        """
        if data.get("format") != COST_FORMAT:
            raise ConfigError(f"{where}: format {data.get('format')!r} is unknown; expected {COST_FORMAT!r}.")
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        try:
            for name in ("all_to_all_bytes_per_s", "all_to_all_latency_s"):
                known[name] = {int(degree): float(value) for degree, value in known.get(name, {}).items()}
            return cls(**known)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{where}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read the JSON file.

        Raises:
            ConfigError: no such file, not JSON, or not a cost model.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Cannot read the cost model {str(path)!r}: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}.") from error
        return cls.from_dict(data, where=str(path))
