"""The ranks add up the loss of each source of a step, and agree on which sources there are.

Names are met as rows are read, on whichever rank reads them. So a step's report carries sums of the names that all
ranks know, in one order; where a rank has met another name, all of them tell each other their new ones, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist

from hf_hetero.ranks.agreement import gather_objects

Tally = tuple[float, int]
"""The sum of the losses of some targets, and how many these are."""
NOTHING: Tally = (0.0, 0)
MOST_SOURCES = 64
"""Sources that are told apart: a column of addresses, say, would fill the log with a line for each row."""
OTHERS = "other sources"
"""All that are met after these."""


@dataclass(slots=True)
class SourcesOfAll:
    """`SourcesOfAll` are the sources that all ranks of a run know, in the order in which their sums travel."""

    names: list[str] = field(default_factory=list[str])

    def named(self, source: str) -> str:
        """Return the name under which a source is counted."""
        return source if source in self.names or len(self.names) < MOST_SOURCES else OTHERS

    def row(self, own: Mapping[str, Tally]) -> list[int]:
        """Return what this rank has to tell of a step, in whole numbers, as many as every rank has.

        Args:
            own: by name, what this rank computed.
        """
        known = [own.get(name, NOTHING) for name in self.names]
        return [len(own.keys() - set(self.names)), *(n for loss, count in known for n in (_as_integer(loss), count))]

    def of_all(
        self, rows: Sequence[Sequence[int]], own: Mapping[str, Tally], control: dist.ProcessGroup | None
    ) -> dict[str, Tally]:
        """Return the sums of all ranks. A collective of all ranks where one of them has met a new name.

        Args:
            rows: `row` of every rank.
            own: by name, what this rank computed.
            control: of all ranks; None for a single process.
        """
        total = {
            name: _sum([(_as_float(row[1 + 2 * at]), row[2 + 2 * at]) for row in rows])
            for at, name in enumerate(self.names)
        }
        if any(row[0] for row in rows):  # the same on all ranks
            new = {name: tally for name, tally in own.items() if name not in self.names}
            for name, tallies in sorted(_joined(gather_objects(new, control)).items()):
                counted_as = self.named(name)
                if counted_as not in self.names:
                    self.names.append(counted_as)
                total[counted_as] = _sum([total.get(counted_as, NOTHING), *tallies])
        return {name: tally for name, tally in total.items() if tally[1]}


def _joined(ranks: Sequence[Mapping[str, Tally]]) -> dict[str, list[Tally]]:
    """Return what all ranks have of each name."""
    found: dict[str, list[Tally]] = {}
    for tallies in ranks:
        for name, tally in tallies.items():
            found.setdefault(name, []).append(tally)
    return found


def _sum(tallies: Sequence[Tally]) -> Tally:
    return sum(loss for loss, _ in tallies), sum(count for _, count in tallies)


def _as_integer(value: float) -> int:
    """Return the bits of a number as an integer: ranks exchange integers only."""
    return int(np.float64(value).view(np.int64))


def _as_float(bits: int) -> float:
    """Invert `_as_integer`."""
    return float(np.int64(bits).view(np.float64))
