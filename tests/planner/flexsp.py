"""FlexSP's released solver, written anew to compare plans with: blast, bucket, one integer program a micro-batch.

Sources: arXiv:2412.01523, sections 4.1 and 4.2 and appendix A; and `galvatron/flexsp_solver` on branch `flexsp` of
PKU-DAIR/Hetu-Galvatron (b466689), for what the paper leaves open. Where this differs from that code, it does so in
FlexSP's favour:

- groups of one rank are allowed, as in the paper (its code leaves them out: `Settings.min_degree` of 2);
- lengths are what they are (its code pads them to a multiple of twice the ranks);
- the limit counts CPU seconds of SCIP, so that a busy machine does not shorten the search (its code: wall seconds);
- no processes are started; `Outcome` has the seconds of each program, and so of any number of processes.

Kept as they are: cutting ties, at least 16 buckets, the degrees it rules out, its starts, and that a number of
micro-batches is given up with the first of its programs that has no solution in time.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_hetero.costs import CostModel
from hf_hetero.plan import Group, MicroBatch, Plan

MS = 1e3  # its programs are in milliseconds, which the tolerances of a solver are not indifferent to
Counts = dict[tuple[int, int], int]
"""(bucket, group): samples."""


@dataclass(frozen=True)
class Settings:
    """What a user of FlexSP may set; the defaults are those of its solver script.

    Args:
        limit_s: CPU seconds of SCIP for each integer program.
        num_counts: numbers of micro-batches that are tried, from the fewest that hold the batch.
        num_buckets: buckets of a micro-batch, more where they would add too many tokens.
        min_degree: smallest degree of a group.
        seed: of the samples that leave a bucket, which its code draws at random.
    """

    limit_s: float = 5.0
    num_counts: int = 5
    num_buckets: int = 16
    min_degree: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Bucket:
    """Samples that an integer program takes to be as long as the longest of them: their bound, in tokens."""

    bound_tokens: int
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """How the integer program of one micro-batch went.

    Args:
        num_micro_batches: of the plan that it was solved for.
        num_samples, num_buckets, num_groups: its size.
        status: SCIP's last word ("optimal", "timelimit", "infeasible").
        solved: whether a solution was found.
        wall_s, cpu_s: seconds of this thread from the samples to the groups, bucketing and building included.
    """

    num_micro_batches: int
    num_samples: int
    num_buckets: int
    num_groups: int
    status: str
    solved: bool
    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Outcome:
    """A plan, or None where every number of micro-batches was given up, and what it took.

    Args:
        seconds_by_count: predicted seconds of the step for each number of micro-batches; None where given up.
        wall_s, cpu_s: seconds of one thread for everything.
    """

    plan: Plan | None
    seconds_by_count: dict[int, float | None]
    programs: tuple[Program, ...]
    wall_s: float
    cpu_s: float


def solve(lengths: Sequence[int], cost: CostModel, num_ranks: int, settings: Settings | None = None) -> Outcome:
    """The plan of the released solver (algorithm 1): the fastest over some numbers of micro-batches, exact lengths."""
    settings = settings or Settings()
    wall, cpu = time.perf_counter(), time.process_time()
    rng = random.Random(settings.seed)
    fewest = fewest_micro_batches(lengths, cost, num_ranks)
    programs: list[Program] = []
    seconds_by_count: dict[int, float | None] = {}
    best: Plan | None = None
    for count in range(fewest, min(fewest + settings.num_counts, len(lengths) + 1)):
        micro_batches: list[MicroBatch] = []
        for chunk in blast(lengths, count):
            micro_batch, program = solve_chunk(lengths, chunk, cost, num_ranks, settings, rng)
            programs.append(replace(program, num_micro_batches=count))
            if micro_batch is None:
                break
            micro_batches.append(micro_batch)
        seconds_by_count[count] = None
        if len(micro_batches) == count:
            plan = Plan(num_ranks, tuple(micro_batches), solver="flexsp")
            plan = replace(plan, seconds=cost.plan_seconds(plan, lengths))
            seconds_by_count[count] = plan.seconds
            best = plan if best is None or plan.seconds < best.seconds else best
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return Outcome(best, seconds_by_count, tuple(programs), *spent)


# ------------------------------------------------------------------------------------------- micro-batches and buckets


def fewest_micro_batches(lengths: Sequence[int], cost: CostModel, num_ranks: int) -> int:
    """The first number of chunks of which each has fewer tokens than all ranks hold; more than the samples if none."""
    room_tokens = cost.capacity_tokens * num_ranks
    count = max(1, math.ceil(sum(lengths) / room_tokens))
    while count <= len(lengths):
        if all(sum(lengths[sample] for sample in chunk) < room_tokens for chunk in blast(lengths, count)):
            break
        count += 1
    return count


def blast(lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Samples, longest first, in consecutive chunks whose largest number of tokens is least (eq. 23 and 24).

    Many cuts are as good; as in the released code, each chunk from the last on takes as many samples as it can.
    """
    order = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    ends = np.concatenate([[0], np.cumsum([lengths[sample] for sample in order], dtype=np.float64)])
    tokens = ends[None, :] - ends[:, None]
    for _, starts in _cuts(tokens, np.maximum):
        if len(starts) == num_chunks:
            return [order[start:end] for start, end in _parts(starts)]
    raise ValueError(f"{len(lengths)} samples do not fill {num_chunks} chunks.")


def bucket(
    lengths: Sequence[int], samples: Sequence[int], num_buckets: int, most_tokens: float = math.inf
) -> list[Bucket]:
    """Buckets that add the fewest tokens when each sample becomes as long as the longest of its bucket (eq. 15, 16).

    Args:
        num_buckets: so many, or one for each sample where there are fewer.
        most_tokens: with more buckets, until the samples with their new lengths have at most so many tokens.
    """
    order = sorted(samples, key=lambda sample: lengths[sample])
    bounds = np.array([0] + [lengths[sample] for sample in order], dtype=np.float64)
    ends, number = np.cumsum(bounds), np.arange(len(bounds))
    added = bounds[None, :] * (number[None, :] - number[:, None]) - (ends[None, :] - ends[:, None])
    starts: list[np.ndarray] = []
    for added_tokens, starts in _cuts(added, np.add):
        if len(starts) >= min(num_buckets, len(order)) and ends[-1] + added_tokens <= most_tokens:
            break
    return [Bucket(lengths[order[end - 1]], tuple(order[start:end])) for start, end in _parts(starts)]


def _cuts(part: np.ndarray, combine: np.ufunc) -> Iterator[tuple[float, list[np.ndarray]]]:
    """The cheapest cuts of a row of n things into 1, 2, ..., n parts, none of them empty.

    Args:
        part: what a part costs, [start, end]; (n + 1, n + 1).
        combine: np.add or np.maximum: of the parts, what the whole costs.

    Yields:
        what it costs, and for each number of parts so far, where the last of them starts; (n + 1,) by its end.
    """
    part = np.where(np.tri(len(part), dtype=bool), np.inf, part)
    whole = np.where(np.arange(len(part)) == 0, 0.0, np.inf)
    starts: list[np.ndarray] = []
    while len(starts) < len(part) - 1:
        wholes = combine(whole[:, None], part)
        starts.append(wholes.argmin(axis=0))
        whole = wholes.min(axis=0)
        yield float(whole[-1]), starts


def _parts(starts: list[np.ndarray]) -> list[tuple[int, int]]:
    parts: list[tuple[int, int]] = []
    end = len(starts[0]) - 1
    for start in reversed(starts):
        parts.append((int(start[end]), end))
        end = parts[-1][0]
    return parts[::-1]


# -------------------------------------------------------------------------------------------------------------- groups


def least_degree(length: int, cost: CostModel) -> int:
    """The smallest power of two of ranks that hold so many tokens."""
    return 1 << (math.ceil(length / cost.capacity_tokens) - 1).bit_length()


def virtual_groups(lengths: Sequence[int], cost: CostModel, num_ranks: int, min_degree: int = 1) -> list[int]:
    """Degrees of the groups that a program may open: of each, as many as the ranks have room for.

    Ranks that the longest samples are sure to take (each in a group of its own, the released code holds) are not
    counted for groups too small for them.
    """
    least = [least_degree(length, cost) for length in lengths]
    largest = max(least)
    groups: list[int] = []
    for degree in cost.degrees(num_ranks):
        if degree >= min_degree and degree & (degree - 1) == 0:
            taken = largest * least.count(largest) if degree < largest else 0
            groups += [degree] * ((num_ranks - taken) // degree)
    return groups


def balanced_start(buckets: Sequence[Bucket], groups: Sequence[int], degree: int, cost: CostModel) -> Counts | None:
    """Samples over all groups of one degree, each to the group with the fewest tokens; a start for SCIP.

    Left as it is in the released code: a group is passed over right after it was given a sample or had no room for
    one, and a single group is given everything. SCIP refuses the starts that are no solutions.
    """
    held = {group: 0 for group, other in enumerate(groups) if other == degree}
    if len(held) == 1:
        return {(k, group): len(b.samples) for group in held for k, b in enumerate(buckets)}
    counts: Counts = Counter()
    ready = [(0, group) for group in held]
    for k in sorted(range(len(buckets)), key=lambda k: -buckets[k].bound_tokens):
        bound = buckets[k].bound_tokens
        for _ in buckets[k].samples:
            tried: set[int] = set()
            while ready:
                _, group = heapq.heappop(ready)
                tried.add(group)
                if held[group] + bound <= cost.capacity_tokens * degree:
                    break
            else:
                return None
            held[group] += bound
            counts[k, group] += 1
            ready = [(held[other], other) for other in held if other not in tried]
            heapq.heapify(ready)
    return counts


# --------------------------------------------------------------------------------------------------------- one program


def solve_chunk(
    lengths: Sequence[int],
    chunk: Sequence[int],
    cost: CostModel,
    num_ranks: int,
    settings: Settings,
    rng: random.Random,
) -> tuple[MicroBatch | None, Program]:
    """The groups of one micro-batch, or None without a solution in time."""
    wall, cpu = time.perf_counter(), time.process_time()
    groups = virtual_groups([lengths[sample] for sample in chunk], cost, num_ranks, settings.min_degree)
    most_tokens = (sum(lengths[sample] for sample in chunk) + cost.capacity_tokens * num_ranks) / 2
    buckets = bucket(lengths, chunk, settings.num_buckets, most_tokens)
    counts, status = _assign(buckets, groups, cost, num_ranks, settings.limit_s)
    micro_batch = None if counts is None else _decoded(buckets, groups, counts, rng)
    spent = time.perf_counter() - wall, time.process_time() - cpu
    return micro_batch, Program(0, len(chunk), len(buckets), len(groups), status, micro_batch is not None, *spent)


def _assign(
    buckets: Sequence[Bucket], groups: Sequence[int], cost: CostModel, num_ranks: int, limit_s: float
) -> tuple[Counts | None, str]:
    """The integer program of section 4.1 with buckets (eq. 17-22) as it was released, solved by SCIP on one thread."""
    import pyscipopt

    model: Any = pyscipopt.Model()
    model.hideOutput()
    model.setParams({"limits/time": limit_s, "timing/clocktype": 1, "parallel/maxnthreads": 1, "lp/threads": 1})
    add_up: Any = pyscipopt.quicksum
    alone = all(len(b.samples) == 1 for b in buckets)  # its program without buckets: binary, and without starts
    makespan_ms = model.addVar(lb=0)
    model.setObjective(makespan_ms, "minimize")
    held = [[model.addVar(vtype="B" if alone else "I", lb=0) for _ in groups] for _ in buckets]
    used = [model.addVar(vtype="B") for _ in groups]
    num_samples = sum(len(b.samples) for b in buckets)
    for k, b in enumerate(buckets):
        model.addCons(add_up(held[k]) == len(b.samples))
        for p, degree in enumerate(groups):
            if degree < least_degree(b.bound_tokens, cost):
                model.addCons(held[k][p] == 0)
    for p, degree in enumerate(groups):
        column = [row[p] for row in held]
        tokens = add_up(b.bound_tokens * x for b, x in zip(buckets, column, strict=True))
        model.addCons(tokens / degree <= cost.capacity_tokens)
        model.addCons(_milliseconds(buckets, degree, column, used[p], cost, add_up) <= makespan_ms)
        model.addCons(add_up(column) <= num_samples * used[p])
        model.addCons(add_up(column) >= used[p])
    model.addCons(add_up(degree * x for degree, x in zip(groups, used, strict=True)) == num_ranks)
    for degree in () if alone else sorted(set(groups)):
        counts = balanced_start(buckets, groups, degree, cost)
        if counts is not None:
            _add_start(model, makespan_ms, held, used, groups, degree, counts, buckets, cost)
    model.optimize()
    status = str(model.getStatus())
    if status not in {"optimal", "timelimit"} or model.getNSols() == 0:
        return None, status
    found = {
        (k, p): count for k, row in enumerate(held) for p, x in enumerate(row) if (count := round(model.getVal(x))) > 0
    }
    return found, status


def _milliseconds(
    buckets: Sequence[Bucket], degree: int, counts: Sequence[Any], used: Any, cost: CostModel, add_up: Any
) -> Any:
    """Eq. 14 of one group, also for one that is not used: numbers in, a number out; variables in, an expression out."""
    work = add_up(MS * cost.work(b.bound_tokens, degree) / degree * n for b, n in zip(buckets, counts, strict=True))
    latency_s = cost.fixed_s(degree) - cost.micro_batch_s
    return work + MS * cost.micro_batch_s + (MS * latency_s * used if latency_s else 0.0)


def _add_start(
    model: Any,
    makespan_ms: Any,
    held: list[list[Any]],
    used: list[Any],
    groups: Sequence[int],
    degree: int,
    counts: Counts,
    buckets: Sequence[Bucket],
    cost: CostModel,
) -> None:
    start = model.createSol()
    slowest_ms = 0.0
    for p, other in enumerate(groups):
        column = [counts.get((k, p), 0) for k in range(len(buckets))]
        model.setSolVal(start, used[p], int(other == degree))
        for row, count in zip(held, column, strict=True):
            model.setSolVal(start, row[p], count)
        if other == degree:
            slowest_ms = max(slowest_ms, _milliseconds(buckets, degree, column, 1, cost, sum))
    model.setSolVal(start, makespan_ms, slowest_ms)
    model.addSol(start)


def _decoded(buckets: Sequence[Bucket], groups: Sequence[int], counts: Counts, rng: random.Random) -> MicroBatch | None:
    """Samples drawn from their buckets, large groups first so that ranks are aligned; None where a sample is left."""
    left = [rng.sample(b.samples, len(b.samples)) for b in buckets]
    named: list[Group] = []
    first = 0
    for p in sorted({p for _, p in counts}, key=lambda p: -groups[p]):
        taken = [left[k].pop() for k in range(len(buckets)) for _ in range(min(counts.get((k, p), 0), len(left[k])))]
        named.append(Group(tuple(range(first, first + groups[p])), tuple(taken)))
        first += groups[p]
    return None if any(left) else MicroBatch(tuple(named))
