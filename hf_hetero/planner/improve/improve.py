"""Better plans and bounds, given time: a walk over durations, then the integer program, then the relaxation.

The walk changes a few durations at random and squeezes again (iterated local search, Lourenço, Martin and Stützle,
2003). Its random numbers are always the same; how far it gets is the clock's.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

from hf_hetero.planner.bound import ROUNDING
from hf_hetero.planner.draft import Draft, draft_seconds, micro_batch_seconds
from hf_hetero.planner.improve.milp import improved, solved_whole
from hf_hetero.planner.improve.program import Backend
from hf_hetero.planner.improve.relaxation import relaxed_bound
from hf_hetero.planner.problem import Problem
from hf_hetero.planner.search.descent import Trial, Tries, descend, stretched

SHARES = (0.3, 0.3, 0.4)
"""Of the limit, for the walk, the integer program and the relaxation; what one leaves is the next one's. They add up
to 1, and are not measured by half and double."""
TRIES_A_STEP = 40
"""Packings of one step of the walk. Half: ±0.0 %; double: ±0.0 % (improved)."""
STEP = 0.05
"""First step of its descents, as a share of a micro-batch's seconds. Half: -0.1 % (-0.4 to 0); double: ±0.0 %
(improved)."""
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
    """Spend at most about so many wall seconds on a draft.

    Args:
        bound: seconds below which no plan is known to be; reaching it ends the search.
    """
    started = time.perf_counter()

    def until(share: float) -> float:
        return max(0.0, started + share * time_limit_s - time.perf_counter())

    best = Improved(draft, None, bound)
    small = solved_whole(problem, draft)
    if not small and not _proven(problem, best):
        walked = _walk(problem, best.draft, until(SHARES[0]))
        best = _better(problem, best, Improved(walked, "fast", bound))
    if not _proven(problem, best):
        solved, proven = improved(problem, best.draft, until(1.0 if small else sum(SHARES[:2])), backend)
        best = _better(problem, best, Improved(solved, "mip", max(best.bound, proven)))
    if not _proven(problem, best):
        proven = relaxed_bound(problem, draft_seconds(problem, best.draft), until(1.0), backend)
        best = replace(best, bound=max(best.bound, proven))
    return best


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
    while time.perf_counter() < deadline:
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
