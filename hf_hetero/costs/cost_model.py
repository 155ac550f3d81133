"""A cost model says how long a group takes and how much memory it needs: one small formula, one JSON file.

For a group of degree d that holds samples of s tokens (FlexSP, arXiv:2412.01523, eq. 11-14):

    seconds = micro_batch_s + sum(attention_s_per_token2 * s**2 + linear_s_per_token * s) / d
              + [d > 1] * (sum(all_to_all_bytes_per_token * s) / d / all_to_all_bytes_per_s[d]
                           + all_to_all_latency_s[d] + sum(s) * (1 - 1/d) * state_s_per_token[d])
    bytes   = model_state_bytes_per_rank + activation_bytes_per_token * sum(s) / d

A micro-batch lasts as long as its slowest group; a step is the sum of its micro-batches. A group may also hold more
tokens and take longer (`Group.activations`): each such way is an `ActivationPolicy`.

That is a group whose ranks exchange heads ("ulysses"). With `kv_bytes_per_token` the model also knows the other methods
(`crossings`): what they exchange follows from where the samples are cut, and so does how evenly attention is shared.
Layers that carry state (`state_s_per_token`) need, of a sample that is shared, the tokens of other ranks too: what that
takes is not divided by the degree.

All this is said of ranks and links of full speed. Where some are slower, what a group takes depends on where it
stands, too (`places`); `seconds`, `work` and their like are those of full speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_hetero.costs.activation_policy import ActivationPolicy, check_policies, prices_under
from hf_hetero.costs.crossings import Charges, Crossings
from hf_hetero.costs.files import as_json, read_json, values_of, write_json
from hf_hetero.costs.places import Place, Places, prices_at
from hf_hetero.costs.ranges import check_values
from hf_hetero.errors import ConfigError
from hf_hetero.plan import ACTIVATIONS, Group, Plan


@dataclass(frozen=True)
class CostModel:
    """A `CostModel` tells the seconds and bytes of a group on one machine, for one model.

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
        ranks_per_node: ranks that share fast links.
        kv_bytes_per_token: keys and values of a token in all layers, one way; None leaves "ulysses" as the only method.
        num_heads: of the model's queries; where a degree does not divide them, the rank with most of them is waited for
            when heads are exchanged. None, or without `kv_bytes_per_token`: they count as divisible.
        num_kv_heads: of the model; with fewer of them than ranks in a block, "ulysses_ring" sends copies.
        network_bytes_per_s: what one rank sends across nodes when all do; None leaves "ulysses_ring" out.
        ring_overlap: share of a ring's attention behind which its exchange hides, 0 to 1.
        query_bytes_per_token: queries of a token in all layers, and 4 bytes a head, one way; None: no "token_ring".
        both_ways_overlap: share of what comes home in it that hides behind what goes out, 0 to 1; None: nothing.
        activation_policies: what groups may do to hold more tokens; keys are of `plan.ACTIVATIONS`.
        host_memory_bytes_per_rank: of the host, for activations; None: no limit.
        ran_out: 1: its memory is what was tried next after a rank had run out of it; None: none has.
        state_s_per_token: of layers with state, for another rank's token, fetched, in part computed anew; by degree.
        rank_speeds, link_speeds: rank -> its share, and its link's to the rank before, of the rest; 1 where absent.
        name, source: what was measured, where, and how.
        provenance: where the seconds come from, one of `ranges.PROVENANCES`; None: whoever wrote the file knows.
        model: which model it was made for, in words (`estimate.subject`); None: any.

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
    kv_bytes_per_token: float | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    network_bytes_per_s: float | None = None
    ring_overlap: float = 0.0
    query_bytes_per_token: float | None = None
    both_ways_overlap: float | None = None
    activation_policies: Mapping[str, ActivationPolicy] = field(default_factory=dict[str, ActivationPolicy])
    host_memory_bytes_per_rank: float | None = None
    ran_out: int | None = None
    state_s_per_token: Mapping[int, float] = field(default_factory=dict[int, float])
    rank_speeds: Mapping[int, float] = field(default_factory=dict[int, float])
    link_speeds: Mapping[int, float] = field(default_factory=dict[int, float])
    name: str = ""
    source: str = ""
    provenance: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        check_values(vars(self))
        check_policies(self.activation_policies, self.attention_s_per_token2, self.linear_s_per_token, self.name)
        if self.capacity_tokens < 1:
            raise ConfigError(
                f"Cost model {self.name!r}: {self._free_bytes / 2**30:.2f} GiB is left beside the model, which "
                "holds no token. Use more ranks, a smaller model, or sharded training."
            )

    @property
    def _free_bytes(self) -> float:
        return self.memory_bytes_per_rank - self.model_state_bytes_per_rank

    @property
    def capacity_tokens(self) -> int:
        """Count the tokens that one rank can hold in a micro-batch if its group does nothing to hold more."""
        return int(self._free_bytes // self.activation_bytes_per_token)

    @cached_property
    def by_activations(self) -> Mapping[str | None, CostModel]:
        """Map each `Group.activations` to the cost model of such groups, which has no policies to choose from.

        Policies that hold no more tokens than a faster one are left out.
        """
        models: dict[str | None, CostModel] = {None: replace(self, activation_policies={})}
        for name in ACTIVATIONS:
            if (policy := self.activation_policies.get(name)) is None:
                continue
            most = max(model.capacity_tokens for model in models.values())
            # compared before the cost model is built: one that holds no token is refused
            room = policy.room_bytes(self._free_bytes, self.host_memory_bytes_per_rank)
            if room // policy.activation_bytes_per_token > most:
                models[name] = replace(self, **prices_under(policy, room, vars(self)))
        return models

    @property
    def leanest(self) -> CostModel:
        """Return the cost model of groups that do everything they may to hold more tokens."""
        return list(self.by_activations.values())[-1]  # each holds more than those before it

    def of_group(self, group: Group) -> CostModel:
        """Return the cost model that a plan's group costs by.

        Raises:
            ConfigError: the group follows a policy that this cost model lacks.
        """
        if group.activations not in self.by_activations:
            raise ConfigError(
                f"A plan's group of ranks {list(group.ranks)} has activations {group.activations!r}, about which cost "
                f"model {self.name!r} says nothing. Plan again with this cost model."
            )
        under = self.by_activations[group.activations]
        return under.at(self.places.of(group.ranks)) if self.is_uneven else under

    @property
    def is_uneven(self) -> bool:
        """Tell whether what a group takes depends on where it stands."""
        return bool(self.rank_speeds or self.link_speeds)

    @cached_property
    def places(self) -> Places:
        """Tell how fast contiguous ranks are as a group."""
        return Places(self.rank_speeds, self.link_speeds)

    @cached_property
    def _at(self) -> dict[Place, CostModel]:
        return {}

    def at(self, place: Place) -> CostModel:
        """Return the cost model of groups at a place, which is the same wherever they stand."""
        if place not in self._at:
            self._at[place] = replace(self, **prices_at(place, vars(self)))
        return self._at[place]

    def evened(self) -> CostModel:
        """Return the machine if all its ranks and links had full speed: no plan is faster than one on it."""
        return replace(self, rank_speeds={}, link_speeds={})

    def with_free_memory(self) -> CostModel:
        """Return the same machine if no way to hold more tokens took time: no plan is faster than one on it."""
        most = self.leanest
        return replace(
            self.by_activations[None],
            activation_bytes_per_token=most.activation_bytes_per_token,
            memory_bytes_per_rank=most.memory_bytes_per_rank,
        )

    def degrees(self, num_ranks: int) -> tuple[int, ...]:
        """List the degrees offered on this many ranks, ascending: 1, and those with a bandwidth."""
        return tuple(d for d in sorted({1, *self.all_to_all_bytes_per_s}) if d <= num_ranks)

    def linear_s(self, degree: int) -> float:
        """Return the rank-seconds of a token at this degree, its exchange included."""
        exchange = self.all_to_all_bytes_per_token / self.all_to_all_bytes_per_s[degree] if degree > 1 else 0.0
        # without such layers nothing is added: plans keep the seconds that are on record, to the last bit
        return self.linear_s_per_token + exchange + (degree - 1) * self.state_s_per_token.get(degree, 0.0)

    def fixed_s(self, degree: int) -> float:
        """Return the seconds that a group of this degree takes before its first token."""
        return self.micro_batch_s + (self.all_to_all_latency_s.get(degree, 0.0) if degree > 1 else 0.0)

    def work(self, length: int, degree: int) -> float:
        """Return the rank-seconds of one sample: divided by the degree, they are what it adds to its group."""
        return self.attention_s_per_token2 * length * length + self.linear_s(degree) * length

    def seconds(self, lengths: Iterable[int], degree: int) -> float:
        """Predict the seconds of a group that holds these samples and exchanges heads."""
        attention, linear = self.attention_s_per_token2, self.linear_s(degree)  # `work`, written out: asked for most
        return self.fixed_s(degree) + sum(attention * n * n + linear * n for n in lengths) / degree

    def num_bytes(self, lengths: Iterable[int], degree: int) -> float:
        """Predict the memory of one rank of a group that holds these samples."""
        return self.model_state_bytes_per_rank + self.activation_bytes_per_token * sum(lengths) / degree

    def group_seconds(self, group: Group, lengths: Sequence[int]) -> float:
        """Predict the seconds of a plan's group, given the lengths of the global batch."""
        if group.activations is not None or self.is_uneven:
            return self.of_group(group).group_seconds(replace(group, activations=None), lengths)
        # as searches compute it, to the last bit: the sum of charges is rounded otherwise
        if self.exchanges_heads(group) and self.head_imbalance(group.degree) == 1:
            return self.seconds((lengths[sample] for sample in group.samples), group.degree)
        return sum(self.charges(group, lengths))

    @cached_property
    def _crossings(self) -> Crossings:
        return Crossings(**{item.name: getattr(self, item.name) for item in fields(Crossings)})

    def head_imbalance(self, degree: int) -> float:
        """Return the heads of the rank that has most, by the mean; 1 where they divide, or nobody knows."""
        return self._crossings.head_imbalance(degree)

    def exchanges_heads(self, group: Group) -> bool:
        """Tell whether a group costs by the first formula: it exchanges heads, or nothing else is known."""
        return group.degree == 1 or group.method == "ulysses" or self.kv_bytes_per_token is None

    def charges(self, group: Group, lengths: Sequence[int]) -> Charges:
        """Split the seconds of a plan's group by what they are for; `group_seconds` is their sum."""
        if group.activations is not None or self.is_uneven:
            return self.of_group(group).charges(replace(group, activations=None), lengths)
        if not self.exchanges_heads(group):
            return self._crossings.charges(group, lengths)
        packed, degree = [lengths[sample] for sample in group.samples], group.degree
        tokens, squares = sum(packed) / degree, sum(length * length for length in packed)
        return Charges(
            attention_s=self.attention_s_per_token2 * squares / degree * self.head_imbalance(degree),
            linear_s=self.linear_s_per_token * tokens,
            exchange_s=(self.linear_s(degree) - self.linear_s_per_token) * tokens,
            fixed_s=self.fixed_s(degree),
        )

    def methods(self, group: Group, lengths: Sequence[int]) -> tuple[Group, ...]:
        """List a group in each way that this model knows and that fits the memory; the first exchanges heads."""
        ways, most = self._crossings.ways(group), self.memory_bytes_per_rank
        if len(ways) == 1:
            return ways
        other_bytes = self.num_bytes((lengths[sample] for sample in group.samples), group.degree)
        return tuple(
            way
            for way in ways
            if way.method != "gather" or other_bytes + self._crossings.bytes_gathered(way, lengths) <= most
        )

    def with_free_exchange(self) -> CostModel:
        """Return the same machine if no exchange took time: no plan by any method is faster than one on it."""
        return replace(
            self,
            all_to_all_bytes_per_token=0.0,
            all_to_all_latency_s=dict.fromkeys(self.all_to_all_latency_s, 0.0),
            kv_bytes_per_token=None,
            num_heads=None,
            state_s_per_token={},
            link_speeds={},
        )

    def plan_seconds(self, plan: Plan, lengths: Sequence[int]) -> float:
        """Predict the seconds of a step: the slowest group of each micro-batch, summed."""
        return sum(max(self.group_seconds(g, lengths) for g in m.groups) for m in plan.micro_batches)

    def with_capacity(self, tokens: int) -> CostModel:
        """Return the same machine with room for this many tokens on a rank, whatever its group does."""
        memory = self.model_state_bytes_per_rank + tokens * self.activation_bytes_per_token
        return replace(self, memory_bytes_per_rank=math.ceil(memory), activation_policies={})

    def with_degrees(self, degrees: Iterable[int]) -> CostModel:
        """Return the same machine, offering only these degrees (and 1)."""
        speeds, offered = self.all_to_all_bytes_per_s, set(degrees)
        return replace(self, all_to_all_bytes_per_s={d: v for d, v in speeds.items() if d in offered})

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form (format hf-hetero-cost/1)."""
        return as_json(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "cost model") -> CostModel:
        """Invert `to_dict`; fields this version does not know are left aside.

        Raises:
            ConfigError: another format, a missing field, or a value of the wrong kind.
        """
        values = values_of(fields(cls), data, where)
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON file."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read the JSON file, or the shipped cost model of this name (`shipped_names`).

        Raises:
            ConfigError: no such file or name, not JSON, or not a cost model.
        """
        return cls.from_dict(read_json(path), where=str(path))
