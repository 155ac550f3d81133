"""A plan in a few characters, for a line of a log or a cell of a table: the degrees of its groups."""

from __future__ import annotations

from collections import Counter

from hf_hetero.plan import MicroBatch, Plan


def describe_groups(micro_batch: MicroBatch) -> str:
    """Name the degrees of a micro-batch's groups, largest first: '4 2rx2' is one group of 4 ranks and two of 2.

    "r" marks groups that recompute layers to hold more tokens, "o" those that also offload.
    """
    names = [
        f"{group.degree}{group.activations[0] if group.activations else ''}"
        for group in sorted(micro_batch.groups, key=lambda group: -group.degree)
    ]
    return " ".join(f"{name}x{count}" if count > 1 else name for name, count in Counter(names).items())


def describe_degrees(plan: Plan) -> str:
    """Name the groups of each micro-batch in one line.

    >>> from hf_hetero.plan import Group
    >>> describe_degrees(Plan(4, (MicroBatch((Group((0, 1), (0,)), Group((2,), (1,)), Group((3,), (2,)))),)))
    '[2 1x2]'
    """
    return " ".join(f"[{describe_groups(micro_batch)}]" for micro_batch in plan.micro_batches)
