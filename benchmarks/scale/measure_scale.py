"""What a run of a thousand ranks asks of each: `python benchmarks/scale/measure_scale.py`.

Rank 0 and another one run all of a step but the model, over exchanges with as many ranks as are asked for (see
`benchmarks/scale/README.md`): seconds and memory of each, bytes of what they tell each other, and how long it takes to
read the lengths of a large dataset. Seconds a message takes on a network are not in them.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import socket
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.scale.ranks_as_threads import World
from benchmarks.scale.run_of_many_ranks import Seen, Setup, rank_of_a_run
from hf_hetero.costs import CostModel
from hf_hetero.data.plan_sources import planned_elsewhere
from hf_hetero.planner import Planner
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.what_if.mixes import MIXES, draw_lengths

MIB = 2**20


def resident_bytes() -> int:
    """Return the memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def most_bytes(process: Any) -> int:
    """Return the most memory that another process had so far, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def table_of(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
    """Return a table with a column of lengths, whose tokens are made as rows are read."""
    import datasets
    import pyarrow

    def rows(table: dict[str, list[int]]) -> dict[str, list[np.ndarray[Any, Any]]]:
        return {"input_ids": [np.ones(length, dtype=np.int64) for length in table["length"]]}

    return datasets.Dataset(pyarrow.table({"length": lengths})).with_transform(rows)


def lengths_of(mix: str, num_rows: int, most_tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Draw as many lengths, a million of them anew, and these again in another order."""
    drawn, _ = draw_lengths(MIXES[mix], min(num_rows, 1_000_000), seed=0, max_tokens=most_tokens)
    return np.random.default_rng(0).permutation(np.resize(drawn, num_rows))


def of_steps(options: argparse.Namespace, present: list[int]) -> tuple[World, dict[int, Seen]]:
    """Run the steps on these ranks; say what they tell each other, and what they hold."""
    cost = CostModel.load(options.cost)
    lengths = lengths_of(options.mix, options.rows, options.longest)
    dataset = table_of(lengths)
    num_samples = options.ranks * options.samples
    gc.collect()
    before = resident_bytes()
    held: list[int] = []
    planner = Planner(cost, options.ranks, solver="fast")
    source = planned_elsewhere(lambda: planner, improves=False, limit_s=600.0)
    planning_bytes: list[int] = []

    class Watch:
        """Notes the memory at the start of the first step, and at the end of each."""

        def __enter__(self) -> None:
            if not held:
                held.append(resident_bytes())

        def __exit__(self, *_: object) -> None:
            held.append(resident_bytes())
            planning_bytes.append(most_bytes(source.planning._process))

    def around(rank: int, step: int) -> Any:
        return nullcontext() if rank else Watch()

    setup = Setup(dataset, cost, options.ranks, num_samples, options.steps, source, around)
    world = World(options.ranks, present)
    found = world.run(lambda rank: rank_of_a_run(setup, rank))
    print(
        f"ranks {present} in one process: {before / MIB:,.0f} MiB with the dataset, {held[0] / MIB:,.0f} when steps "
        f"begin, {max(held) / MIB:,.0f} at most after a step, {held[-1] / MIB:,.0f} after the last; "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} at most at any time"
    )
    core_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    print(
        f"the process that plans: {max(planning_bytes) / MIB:,.0f} MiB at most, "
        f"{core_s / options.steps:.2f} s of a core a step, what one degree would take included\n"
    )
    return world, found


def of_groups(num_ranks: int, degrees: list[int], num_sockets: int) -> None:
    """Say how long rank 0 takes to make its process groups, the network left out."""
    pairs = [socket.socketpair() for _ in range(num_sockets // 2)]  # such as connect it with the other ranks

    def opened(rank: int) -> tuple[float, int]:
        start = time.perf_counter()
        pool = GroupPool(degrees, 60, 60)
        seconds = time.perf_counter() - start
        if pool.waits is not None:
            pool.waits.close()
        return seconds, len(pool._groups)

    [(seconds, made)] = World(num_ranks, [0]).run(opened).values()
    print(
        f"\nprocess groups: {made + 1} calls of new_group, {len(degrees) + 1} of them for groups that rank 0 is in: "
        f"{seconds:.2f} s, with {num_sockets} sockets open"
    )
    for pair in pairs:
        for end in pair:
            end.close()


def print_table(world: World, found: dict[int, Seen], steps: int) -> None:
    """Print a line for each rank, and one for each kind of exchange."""
    print("| rank | start (s) | step, median (ms) | at most | of the processor, median | planning (s) | waited (s) |")
    print("|---|---|---|---|---|---|---|")
    for rank, seen in found.items():
        late, cpu = seen.step_s[1:], seen.step_cpu_s[1:]  # the first waits for its plan
        print(
            f"| {rank} | {seen.started_s:.1f} | {1000 * statistics.median(late):.0f} | {1000 * max(late):.0f} | "
            f"{1000 * statistics.median(cpu):.0f} | {statistics.median(seen.planning_s):.2f} | "
            f"{statistics.median(seen.waited_s):.2f} |"
        )
    print(f"\n{statistics.median(found[0].num_groups):.0f} groups a step. Received, with what is told at the start:\n")
    print("| rank | exchange | messages a step | KiB a step |\n|---|---|---|---|")
    for rank in found:
        for what, count in world.num_messages[rank].items():
            kib = world.received_bytes[rank][what] / 1024 / steps
            print(f"| {rank} | {what} | {count / steps:.1f} | {kib:,.1f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="The numbers quoted are from: python benchmarks/scale/measure_scale.py"
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4, help="of a step, for each rank")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the dataset")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--mix", default="wiki-192k", choices=list(MIXES))
    parser.add_argument("--longest", type=int, default=65536, help="tokens of a sample, at most")
    parser.add_argument("--cost", default="llama-8b_64xh100_ib")
    parser.add_argument("--other", type=int, default=511, help="a second rank; 0: rank 0 alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    present = sorted({0, options.other})
    world, found = of_steps(options, present)
    print_table(world, found, options.steps)
    of_groups(options.ranks, CostModel.load(options.cost).degrees(options.ranks)[1:], 2 * (options.ranks - 1))


if __name__ == "__main__":
    main()
