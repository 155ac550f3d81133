"""Better plans and bounds, given time: a walk over durations, then whole plans annealed, then the relaxation.

The walk changes a few durations at random and squeezes again (iterated local search, Lourenço, Martin and Stützle,
2003). Its random numbers are always the same; how far it gets is the clock's. Batches small enough to be solved whole
are the integer program's instead, which proves that no plan is faster.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

from hf_hetero.planner.bound import ROUNDING
from hf_hetero.planner.draft import Draft, draft_seconds, micro_batch_seconds
from hf_hetero.planner.improve.annealing import annealed
from hf_hetero.planner.improve.milp import solved, solved_whole
from hf_hetero.planner.improve.program import Backend
from hf_hetero.planner.improve.relaxation import relaxed_bound
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.search.descent import Trial, Tries, descend, stretched

SHARES = (0.2, 0.6, 0.2)
"""Of the limit, for the walk, the annealing and the relaxation; what one leaves is the next one's. They add up to 1,
and are not measured by half and double."""
MOST_WALKS = 400
"""Steps of the walk, at most. Half: ±0.0 %; double: ±0.0 % (improved)."""
MOVES_A_SECOND = 400_000
"""Moves of the annealing for each second that it may take. A core without other work does more. Half: ±0.0 %;
double: ±0.0 % (-0.2 to 0) (improved)."""
MOST_MOVES = 2_000_000
"""Moves of the annealing, at most."""
TRIES_A_STEP = 40
"""Packings of one step of the walk. Half: ±0.0 %; double: ±0.0 % (improved)."""
STEP = 0.05
"""First step of its descents, as a share of a micro-batch's seconds. Half: ±0.0 %; double: ±0.0 % (improved)."""
WANDERS = 1.01
"""The walk goes on from a plan at most so many times slower than where it stands. Half: ±0.0 %; double: ±0.0 %
(improved)."""


@dataclass(frozen=True, slots=True)
class Improved:
    """What the time was good for.

    Args:
        draft: no slower than the one given.
        solver: who found it; None where it is the one given.
        bound: seconds below which no plan can be.
    """

    draft: Draft
    solver: str | None
    bound: float


def improve_draft(problem: Problem, draft: Draft, bound: float, time_limit_s: float, backend: Backend) -> Improved:
    """Spend at most about so many wall seconds on a draft and its bound.

    Args:
        bound: seconds below which no plan is known to be; reaching it ends the search.
    """
    started = time.perf_counter()
    limit_s = time_limit_s if solved_whole(problem, draft) else time_limit_s * sum(SHARES[:2])
    best = search_draft(problem, draft, bound, limit_s, backend)
    if not _proven(problem, best):
        left_s = max(0.0, started + time_limit_s - time.perf_counter())
        proven = relaxed_bound(problem, draft_seconds(problem, best.draft), left_s, backend)
        best = replace(best, bound=max(best.bound, proven))
    return best


def search_draft(problem: Problem, draft: Draft, bound: float, time_limit_s: float, backend: Backend) -> Improved:
    """The same without the relaxation: all time is spent on the draft."""
    best = Improved(draft, None, bound)
    if _proven(problem, best):
        return best
    if solved_whole(problem, draft):
        found, proven = solved(problem, draft, time_limit_s, backend)
        return _better(problem, best, Improved(found, "mip", max(bound, proven)))
    started = time.perf_counter()
    walked = _walk(problem, draft, time_limit_s * SHARES[0] / sum(SHARES[:2]))
    left_s = max(1e-3, started + time_limit_s - time.perf_counter())
    num_moves = min(MOST_MOVES, 1 + int(MOVES_A_SECOND * time_limit_s * SHARES[1] / sum(SHARES[:2])))
    return _better(problem, best, Improved(annealed(problem, walked, num_moves, left_s), "annealing", bound))


def _better(problem: Problem, known: Improved, found: Improved) -> Improved:
    """What was found if it is faster, with the bound of both."""
    if draft_seconds(problem, found.draft) < draft_seconds(problem, known.draft) * ROUNDING:
        return found
    return replace(known, bound=found.bound)


def _proven(problem: Problem, known: Improved) -> bool:
    """Whether nothing is left to gain but rounding."""
    return known.bound >= draft_seconds(problem, known.draft) * (1 - 1e-4)


def _walk(problem: Problem, draft: Draft, time_limit_s: float) -> Draft:
    """The draft, or a faster one that other durations lead to."""
    deadline = time.perf_counter() + time_limit_s
    chance = random.Random(0)
    durations = [micro_batch_seconds(problem, groups) for groups in draft]
    here = best = Tries(problem, 1).pack([seconds * (1 + 1e-9) for seconds in durations])
    if here is None or best is None:
        return draft  # no packing has these durations: another search made the draft
    for _ in range(MOST_WALKS):
        if time.perf_counter() >= deadline:
            break
        start = best if chance.random() < 0.7 else here
        tries = Tries(problem, TRIES_A_STEP)
        trial = tries.pack(_changed(problem, start, chance))
        if trial is not None:
            trial = descend(tries, trial, STEP)
            if trial.seconds < here.seconds * WANDERS:
                here = trial
            if trial.seconds < best.seconds:
                best = trial
    found = best.packing.draft(problem)
    return found if draft_seconds(problem, found) < draft_seconds(problem, draft) else draft


def _changed(problem: Problem, trial: Trial, chance: random.Random) -> list[float]:
    """Durations near those of a trial: two of them changed, all of them, or one more or less."""
    durations, fixed_s = list(trial.durations), problem.fixed_s[0]
    kind = chance.random()
    if kind < 0.6:
        for low, high in ((0.7, 1.5), (0.8, 1.3)):
            chosen = chance.randrange(len(durations))
            durations[chosen] = fixed_s + (durations[chosen] - fixed_s) * chance.uniform(low, high)
    elif kind < 0.8 or (kind >= 0.9 and len(durations) <= problem.fewest_micro_batches):
        durations = [stretched(problem, [seconds], chance.uniform(0.9, 1.15))[0] for seconds in durations]
    elif kind < 0.9:
        durations.append(fixed_s + chance.uniform(0.1, 1.0) * max(durations))
    else:
        durations.pop(chance.randrange(len(durations)))
    return durations
