"""Machines are the GPUs of a run that nobody has started, by what a person calls them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hf_hetero.errors import ConfigError
from hf_hetero.estimate.devices import Device, device_named
from hf_hetero.estimate.memory import usable_bytes
from hf_hetero.topology import Topology

MOST_GPUS, MOST_PER_NODE = 65_536, 8


@dataclass(frozen=True, slots=True)
class Machines:
    """`Machines` are the GPUs of a run.

    Args:
        num_nodes, ranks_per_node: how many.
        card: which, by its data sheet.
    """

    num_nodes: int
    ranks_per_node: int
    card: Device

    @property
    def num_ranks(self) -> int:
        """Count the GPUs."""
        return self.num_nodes * self.ranks_per_node

    @property
    def name(self) -> str:
        """Return "8xH100", or "2x8xH100" for two nodes, as `machines_named` reads it."""
        nodes = f"{self.num_nodes}x" if self.num_nodes > 1 or self.ranks_per_node > MOST_PER_NODE else ""
        return f"{nodes}{self.ranks_per_node}x{self.card.name}"

    @property
    def topology(self) -> Topology:
        """Return how ranks stand on nodes, and what memory each has."""
        assert self.card.card_bytes is not None
        memory_bytes = int(usable_bytes(self.card.card_bytes, self.num_ranks))
        return Topology(self.num_ranks, self.ranks_per_node, memory_bytes)


def machines_named(gpus: str) -> Machines:
    """Read "8xH100", or "2x8xH100" for two nodes of eight.

    Raises:
        ConfigError: no such GPU, or a number that leaves open how many share a node.
    """
    found = re.fullmatch(r"((?:\d{1,9}\s*x\s*){0,2})(\S.*)", gpus.strip(), re.IGNORECASE)
    counts = [int(count) for count in re.findall(r"\d+", found[1])] if found else []
    if found is None or 0 in counts:
        raise ConfigError(f"{gpus!r:.60} names no GPUs. Write 8xH100, or 2x8xH100 for two nodes of eight.")
    card = device_named(found[2])
    if len(counts) < 2:
        counts = [1, *(counts or [1])]
        if counts[1] > MOST_PER_NODE:
            half = f"{-(-counts[1] // MOST_PER_NODE)}x{MOST_PER_NODE}x{card.name}"
            raise ConfigError(
                f"{gpus!r:.60}: how many share a node's links? Write {half}, or 1x{counts[1]}x{card.name} for all."
            )
    if counts[0] * counts[1] > MOST_GPUS:
        raise ConfigError(f"{gpus!r:.60}: that is {counts[0] * counts[1]:,} GPUs; at most {MOST_GPUS:,} are estimated.")
    return Machines(counts[0], counts[1], card)


def doubled(machines: Machines) -> Machines:
    """Return twice as many GPUs: in the node while it is one, and has room for them; else in more nodes."""
    if machines.num_nodes == 1 and 2 * machines.ranks_per_node <= MOST_PER_NODE:
        return replace(machines, ranks_per_node=2 * machines.ranks_per_node)
    return replace(machines, num_nodes=2 * machines.num_nodes)
