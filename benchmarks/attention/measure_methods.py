"""How long each method takes, forward and backward, side by side: `python benchmarks/attention/measure_methods.py`.

Four gloo ranks, one thread each, on this machine's CPU: so arithmetic and copies are dear here, and links are memory.
The methods take turns, so that whatever else the machine does hits all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers import run_ranks

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Scores
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.methods import attend
from hf_hetero.costs.volume import Heads, volume
from hf_hetero.layout import layout_of
from hf_hetero.plan import METHODS, Group
from hf_hetero.ranks.groups import GroupPool

PACKS = {
    "many short": tuple(10 + (97 * sample) % 254 for sample in range(60)),
    "mixed": (4096, *(10 + (97 * sample) % 254 for sample in range(30))),
    "one long": (8192,),
}
DEGREE, INNER = 4, 2


def groups_of(lengths: tuple[int, ...]) -> list[Group]:
    """The same samples by each method."""
    ranks, samples = tuple(range(DEGREE)), tuple(range(len(lengths)))
    return [Group(ranks, samples, method, INNER if method == "ulysses_ring" else None) for method in METHODS]


def seconds(heads: tuple[int, int], head_dim: int, repeats: int) -> dict[tuple[str, str], list[float]]:
    """Of each pack by each method, `repeats` times, on this rank; all ranks start together."""
    pool, me = GroupPool({DEGREE, INNER}, 120, 120), dist.get_rank()
    found: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 1):
        for name, lengths in PACKS.items():
            for group in groups_of(lengths):
                layout = layout_of(group, lengths)
                first = me - me % layout.inner
                context = AttentionContext(
                    layout,
                    group.ranks,
                    me,
                    pool.get(group.ranks),
                    group.method,
                    CPU,
                    torch.device("cpu"),
                    inner_group=pool.get(tuple(range(first, first + layout.inner))),
                )
                tokens = layout.rank_tokens[me]
                q, k, v = (torch.randn(tokens, h, head_dim, requires_grad=True) for h in (heads[0], *heads[1:] * 2))
                dist.barrier()
                start = time.perf_counter()
                attend(q, k, v, Scores(head_dim**-0.5), context.at(0)).sum().backward()
                dist.barrier()
                if turn:  # the first makes connections
                    found.setdefault((name, group.method), []).append(time.perf_counter() - start)
    pool.close()
    return found


def main() -> None:
    """Print one line a pack: milliseconds and MiB sent by the busiest rank, by method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs=2, default=(8, 8), help="of queries, and of keys and values")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    ranks = run_ranks(seconds, DEGREE, tuple(options.heads), options.head_dim, options.repeats, timeout_s=1800)
    heads = Heads(*options.heads, options.head_dim, options.head_dim)
    print(f"| pack (tokens) | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
    for name, lengths in PACKS.items():
        cells: list[str] = []
        for group in groups_of(lengths):
            layout = layout_of(group, lengths)
            # a turn lasts as long as its slowest rank
            turns = [max(turn) for turn in zip(*(rank[name, group.method] for rank in ranks), strict=True)]
            sent = max(volume(layout, group.method, heads, rank).total for rank in range(DEGREE)) * 4 / 2**20
            cells.append(f"{1e3 * statistics.median(turns):.0f} ms, {sent:.2f} MiB")
        print(f"| {name} ({sum(lengths):,}) | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
