"""The descent makes micro-batches shorter, one at a time, as long as all samples still fit.

The only thing that is searched are the durations: which sample goes where is for `packing.pack` to find, again and
again. A count of tries ends the search, never a clock, so that every machine finds the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_hetero.planner.problem import Problem
from hf_hetero.planner.search.packing import Packing, pack

STRETCH = 0.03
"""How far a guess is stretched where its samples do not fit; each time that fails, 1.6 times further. Half: ±0.0 %
(-0.1 to +0.6), CPU -1 %; double: +0.1 % (-0.1 to +2.4), CPU -2 % (all)."""
CLOSE = 0.006
"""`scale` ends where the factor that fits and the one that fails are so close. Half: ±0.0 % (-0.4 to +0.8), CPU +0
%; double: ±0.0 % (0 to +0.7), CPU +0 % (all)."""
KICKED_STEP = 0.03
"""First step of the descent after a kick, as a share of a micro-batch's seconds. Half: ±0.0 % (-0.2 to +0.8), CPU +1
%; double: ±0.0 % (-0.1 to +0.7), CPU +0 % (all)."""
LAST_GAIN = 2e-3
"""A descent ends where its best step gains less than this share of a mean micro-batch. Half: -0.1 % (-1.3 to +0.2),
CPU -3 %; double: ±0.0 % (-0.6 to +0.6), CPU -7 % (all)."""
KICKS = (0.015, 0.03, 0.008, 0.05)
"""How much all micro-batches are lengthened, one try after the other, to leave a local optimum. Half: +0.1 % (-0.1
to +0.9), CPU +0 %; double: ±0.0 % (-0.4 to +1.0), CPU +1 % (all)."""


@dataclass(frozen=True)
class Trial:
    """A `Trial` is a packing that worked.

    Args:
        seconds: of the step.
        durations: seconds of each micro-batch, as packed.
        packing: who is where.
    """

    seconds: float
    durations: tuple[float, ...]
    packing: Packing


@dataclass(slots=True)
class Tries:
    """`Tries` count down how many packings may still be tried for one batch."""

    problem: Problem
    left: int

    def pack(self, durations: Sequence[float]) -> Trial | None:
        """Pack into micro-batches that last no longer than this, in any order; None where samples are left out."""
        self.left -= 1
        packing = pack(self.problem, sorted(durations, reverse=True))
        if packing is None:
            return None
        spans = packing.makespans(self.problem)
        return Trial(sum(spans), spans, packing)


def stretched(problem: Problem, durations: Sequence[float], factor: float) -> list[float]:
    """Scale the part of durations beyond the fixed cost of a micro-batch."""
    fixed_s = problem.fixed_s[0]
    return [fixed_s + (seconds - fixed_s) * factor for seconds in durations]


def scale(tries: Tries, durations: Sequence[float], limit_s: float, most: int) -> Trial | None:
    """Stretch or shrink a guess until its samples just fit; None where they do not within the limit, in seconds."""
    problem, fixed_s = tries.problem, tries.problem.fixed_s[0]
    variable = sum(durations) - fixed_s * len(durations)
    best: Trial | None = None
    factor, growth, fails, fits = 1.0, 1 + STRETCH, 0.0, 0.0
    for _ in range(most):
        target = stretched(problem, durations, factor)
        if best is None and sum(target) > limit_s:
            return None
        trial = tries.pack(target)
        if trial is None:
            fails = factor
            if fits:
                factor = (fails + fits) / 2
            else:
                factor, growth = factor * growth, 1 + (growth - 1) * 1.6
            continue
        if best is None or trial.seconds < best.seconds:
            best = trial
        if trial.seconds > limit_s:
            return best
        # what the packing really takes fits, too, and may be far below the factor: the search goes on from there
        fits = min(factor, (trial.seconds - fixed_s * len(trial.durations)) / variable) if variable > 0 else 0.0
        if fits - fails < CLOSE:
            return best
        factor = (fails + fits) / 2 if fails else fits * 0.98
    return best


def descend(tries: Tries, trial: Trial, first_step: float, most: int | None = None) -> Trial:
    """Shorten the micro-batch that has most to give; a step that fails is tried three times smaller next time."""
    stop = 0 if most is None else max(0, tries.left - most)
    fixed_s = tries.problem.fixed_s[0]
    steps = [first_step] * len(trial.durations)
    while tries.left > stop:
        gains = [step * (seconds - fixed_s) for step, seconds in zip(steps, trial.durations, strict=True)]
        chosen = max(range(len(gains)), key=gains.__getitem__)
        if gains[chosen] <= LAST_GAIN * trial.seconds / len(gains):
            break
        target = list(trial.durations)
        target[chosen] -= gains[chosen]
        shorter = tries.pack(target)
        if shorter is None or shorter.seconds >= trial.seconds * (1 - 1e-9):
            steps[chosen] /= 3
            continue
        # packing sorts micro-batches by the durations asked for, and drops empty ones: steps go where theirs went
        if len(shorter.durations) == len(steps):
            steps = [steps[i] for i in sorted(range(len(steps)), key=lambda i: -target[i])]
        else:
            steps = [first_step] * len(shorter.durations)
        trial = shorter
    return trial


def kick(tries: Tries, trial: Trial) -> Trial:
    """Lengthen all micro-batches a little and descend again: packings change, and some are better."""
    for share in KICKS:
        if tries.left <= 0:
            break
        kicked = tries.pack(stretched(tries.problem, trial.durations, 1 + share))
        if kicked is not None:
            kicked = descend(tries, kicked, KICKED_STEP)
            if kicked.seconds < trial.seconds * (1 - 1e-9):
                trial = kicked
    return trial
