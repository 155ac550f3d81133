"""Crossings price that the ranks of a group share samples, by method: where samples are cut, and over which links.

For a group of d ranks, in blocks of n that exchange heads (n = 1 but for "ulysses_ring"), whose busiest block computes
with `causal_pairs` and moves `travelling_tokens` (see `volume`), in seconds:

    attention = attention_s_per_token2 * causal_pairs / n * head_imbalance(n)
    once      = kv_bytes_per_token * max(1, n / num_kv_heads) / n * travelling_tokens / bandwidth
    exchange  = 2 * once                                                            gather
              = max(0, 3 * once + messages - ring_overlap * attention)              ring, ulysses_ring
    messages  = RING_MESSAGES * all_to_all_latency_s[d] * (d / n - 1)
    exchange  = max(0, (5 - 2 * both_ways_overlap) * lent + batches - ring_overlap * attention)         token_ring
    lent      = query_bytes_per_token * travelling_queries / bandwidth
    batches   = TOKEN_RING_BATCHES * all_to_all_latency_s[d] * min(d + 1, 2 d - 2)

Keys that are needed elsewhere go there once and their gradients come back; a ring sends them once more in backward, in
messages of their own, and hides part of that behind attention. What a block exchanges within itself comes on top, and
so do layers with state, for each token that travels over the whole group.

In a token ring queries go out and outputs come home, once each; in backward queries and gradients go out, and gradients
come home. Where links carry both ways at once, what comes home, once a pass, hides in part behind what goes out. There
`causal_pairs` are those of the keys that a rank holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hf_hetero.costs.volume import meeting_of
from hf_hetero.plan import Group

GATHER_MESSAGES = 2 / 4
"""Latency of a layer that gathers, by that of one which exchanges heads: two collectives instead of four."""
RING_MESSAGES = 3 / 4
"""The same for each other rank of a ring: one message in forward, two in backward (`hf_hetero.attention`)."""
TOKEN_RING_BATCHES = 2 / 4
"""The same for each batch of messages of a token ring: one in forward, one in backward."""


class Charges(NamedTuple):
    """`Charges` are the seconds of a group, in the parts that add up to them.

    Args:
        attention_s: for what grows with the square of a sample's tokens.
        linear_s: for what grows with the tokens and stays on a rank.
        exchange_s: for the bytes that ranks exchange, as far as nothing hides it.
        fixed_s: for what a micro-batch and its messages take, whatever they hold.
    """

    attention_s: float
    linear_s: float
    exchange_s: float
    fixed_s: float


@dataclass(frozen=True)
class Crossings:
    """`Crossings` hold what a cost model knows of ranks that share samples: its fields of the same names."""

    attention_s_per_token2: float
    linear_s_per_token: float
    micro_batch_s: float
    all_to_all_bytes_per_token: float
    all_to_all_bytes_per_s: Mapping[int, float]
    all_to_all_latency_s: Mapping[int, float]
    ranks_per_node: int | None
    kv_bytes_per_token: float | None
    num_heads: int | None
    num_kv_heads: int | None
    network_bytes_per_s: float | None
    ring_overlap: float
    query_bytes_per_token: float | None
    both_ways_overlap: float | None
    state_s_per_token: Mapping[int, float]

    def head_imbalance(self, degree: int) -> float:
        """Return the heads of the rank that has most, by the mean; 1 where they divide, or nobody knows."""
        if self.num_heads is None or self.kv_bytes_per_token is None:
            return 1.0
        return degree * -(-self.num_heads // degree) / self.num_heads

    def ways(self, group: Group) -> tuple[Group, ...]:
        """List a group in each way that attention can cross its ranks, in any memory; the first exchanges heads."""
        heads = Group(group.ranks, group.samples)
        if group.degree == 1 or self.kv_bytes_per_token is None or not group.samples:
            return (heads,)
        ways = [heads, Group(group.ranks, group.samples, "ring"), Group(group.ranks, group.samples, "gather")]
        # blocks are whole nodes, so that heads stay on fast links: the group must start at a node and end with one
        inner = self.ranks_per_node or group.degree
        blocks = 1 < inner < group.degree and group.degree % inner == 0 and group.ranks[0] % inner == 0
        if blocks and self.network_bytes_per_s and inner in self.all_to_all_bytes_per_s:
            ways.append(Group(group.ranks, group.samples, "ulysses_ring", inner))
        if self.query_bytes_per_token is not None:
            ways.append(Group(group.ranks, group.samples, "token_ring"))
        return tuple(ways)

    def bytes_gathered(self, group: Group, lengths: Sequence[int]) -> float:
        """Count the bytes, on the busiest rank, that a group which gathers fetches and keeps until backward."""
        assert self.kv_bytes_per_token is not None
        return self.kv_bytes_per_token * meeting_of(group, lengths).moved

    def charges(self, group: Group, lengths: Sequence[int]) -> Charges:
        """Split the seconds of a group whose ranks share tokens, not heads only; the busiest rank counts.

        Args:
            group: of a plan; its method is any but "ulysses".
            lengths: tokens of each sample of the global batch.
        """
        degree, inner = group.degree, group.ulysses_degree or 1
        tokens = sum(lengths[sample] for sample in group.samples) / degree
        met = meeting_of(group, lengths)
        attention_s = self.attention_s_per_token2 * met.pairs / inner * self.head_imbalance(inner)
        exchange_s, fixed_s = 0.0, self.micro_batch_s
        if state_s := self.state_s_per_token.get(degree):
            exchange_s += state_s * met.fetched
        if inner > 1:
            exchange_s += self.all_to_all_bytes_per_token * tokens / self.all_to_all_bytes_per_s[inner]
            fixed_s += self.all_to_all_latency_s.get(inner, 0.0)
        if met.is_cut:
            assert self.kv_bytes_per_token is not None
            # a rank of a block sends its share of the heads, and no less than one: fewer heads than ranks are copied
            copies = max(1 / inner, 1 / (self.num_kv_heads or inner))
            # a ring of blocks crosses nodes, because a block is a node
            speed = self.all_to_all_bytes_per_s[degree] if inner == 1 else self.network_bytes_per_s
            assert speed is not None
            once_s = self.kv_bytes_per_token * copies * met.moved / speed
            # the difference of two sums, so that plans keep the seconds that are on record, to the last bit
            latency_s = self.micro_batch_s + self.all_to_all_latency_s.get(degree, 0.0) - self.micro_batch_s
            if group.method == "gather":
                exchange_s, fixed_s = exchange_s + 2 * once_s, fixed_s + latency_s * GATHER_MESSAGES
            elif group.method == "token_ring":
                exchange_s += self._lent_s(degree, met.moved, latency_s, attention_s)
            else:
                messages_s = latency_s * RING_MESSAGES * (degree // inner - 1)
                exchange_s += max(0.0, 3 * once_s + messages_s - self.ring_overlap * attention_s)
        return Charges(attention_s, self.linear_s_per_token * tokens, exchange_s, fixed_s)

    def _lent_s(self, degree: int, moved: int, latency_s: float, attention_s: float) -> float:
        """Return the seconds in which queries go out and answers come home, as far as attention does not hide them."""
        assert self.query_bytes_per_token is not None
        once_s = self.query_bytes_per_token * moved / self.all_to_all_bytes_per_s[degree]
        batches_s = latency_s * TOKEN_RING_BATCHES * min(degree + 1, 2 * degree - 2)
        trips = 5 - 2 * (self.both_ways_overlap or 0.0)
        return max(0.0, trips * once_s + batches_s - self.ring_overlap * attention_s)
