"""What plans did, in numbers for the log: who shared how, how well it was predicted, and what it saved.

All are sums over the steps since the last log, divided once, so that a long step counts as long as it was.
"""

from __future__ import annotations

from collections import Counter

from hf_hetero.plan import StepReport

GIB = 2**30


class PlanNumbers:
    """`PlanNumbers` add up the reports of steps, and give their means under the names of the log."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()
        self._static = StaticRuns()
        self._losses: dict[str, tuple[float, int]] = {}
        self._begin()

    def _begin(self) -> None:
        self._num_steps = self._num_tokens = self._sent_bytes = self._peak_bytes = self._num_ranks = 0
        self._seconds = self._planned_s = self._busy_s = self._planning_s = 0.0
        self._bounded_s = self._bound_s = self._imbalance = 0.0
        self._num_balanced = 0
        # what was there before stays in the log, as 0: a curve shall not stop where a degree is not used
        self._tokens = Counter(dict.fromkeys(self._tokens, 0))
        self._losses = {}
        self._static.begin()

    def add(self, report: StepReport) -> None:
        """Count one step."""
        plan, totals = report.plan, [sum(seconds) for seconds in zip(*report.busy_s, strict=True)]
        self._num_steps += 1
        self._num_ranks = plan.num_ranks
        self._num_tokens += report.num_tokens
        self._seconds += report.seconds + report.wait_s
        self._planned_s += plan.seconds
        self._busy_s += sum(max(ranks, default=0.0) for ranks in report.busy_s)
        self._planning_s += plan.planning_s
        self._sent_bytes += report.sent_bytes
        self._peak_bytes = max(self._peak_bytes, report.peak_bytes)
        if plan.lower_bound_s > 0:
            self._bounded_s += plan.seconds
            self._bound_s += plan.lower_bound_s
        if not report.is_lockstep and sum(totals) > 0:  # under sharded weights all ranks measure the slowest
            self._num_balanced += 1
            self._imbalance += max(totals) * len(totals) / sum(totals)
        for name, (loss, count) in report.by_source.items():
            before = self._losses.get(name, (0.0, 0))
            self._losses[name] = before[0] + loss, before[1] + count
        self._static.add(report)
        self._count_groups(report)

    def _count_groups(self, report: StepReport) -> None:
        """Count the tokens of each degree, method and policy."""
        for group in report.plan.groups:
            if not group.samples:
                continue
            tokens = sum(report.lengths[sample] for sample in group.samples)
            self._tokens[f"degree/{group.degree}"] += tokens
            if group.degree > 1:  # alone, a rank exchanges nothing
                self._tokens[f"method/{group.method}"] += tokens
            if group.activations is not None:
                self._tokens[f"activations/{group.activations}"] += tokens

    def take(self) -> dict[str, float]:
        """Return what came together since the last call, and begin anew; nothing where no step came."""
        found = self._means() if self._num_steps else {}
        self._begin()
        return found

    def _means(self) -> dict[str, float]:
        steps = self._num_steps
        means = {
            "planning_ms": 1000 * self._planning_s / steps,
            "busy_s": self._busy_s / steps,
            "exchanged_gib": self._sent_bytes / GIB / steps,
        }
        if self._seconds > 0:
            means["tokens_per_s_per_rank"] = self._num_tokens / self._seconds / self._num_ranks
        if self._planned_s > 0:
            means["measured_by_planned"] = self._busy_s / self._planned_s
        if self._bound_s > 0:
            means["gap"] = self._bounded_s / self._bound_s - 1
        if self._num_balanced:
            means["imbalance"] = self._imbalance / self._num_balanced
        if self._peak_bytes:
            means["peak_gib"] = self._peak_bytes / GIB
        if self._num_tokens:
            means |= {name: tokens / self._num_tokens for name, tokens in sorted(self._tokens.items(), key=_in_order)}
        means |= {f"loss/{name}": loss / count for name, (loss, count) in sorted(self._losses.items()) if count}
        return {f"hetero/{name}": value for name, value in {**means, **self._static.means()}.items()}


def _in_order(share: tuple[str, int]) -> tuple[str, int, str]:
    """Sort shares by what they are of, degrees by their numbers."""
    kind, _, name = share[0].partition("/")
    return kind, int(name) if name.isdigit() else 0, name


class StaticRuns:
    """`StaticRuns` add up what runs with one degree would take, each degree for itself, by the cost model of each step.

    A static run has one degree from its first step to its last. So the best one is that with the fewest seconds since
    training began, of the degrees that held the samples of all steps; and it is what a step of now is compared with.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._of_run: dict[int, float] = {}
        self.begin()

    def begin(self) -> None:
        """Begin to count for the next log; which degree is the best one, all steps decide."""
        self._num_recent = 0
        self._planned_s = 0.0
        self._recent: Counter[int] = Counter()

    def add(self, report: StepReport) -> None:
        """Count a step, if somebody has looked what a static run takes for it."""
        if not report.static_s:
            return
        known = report.static_s if not self._num_steps else {d: report.static_s.get(d) for d in self._of_run}
        self._of_run = {d: self._of_run.get(d, 0.0) + s for d, s in known.items() if s is not None}
        self._num_steps += 1
        self._num_recent += 1
        self._planned_s += report.plan.seconds
        self._recent.update(report.static_s)

    def means(self) -> dict[str, float]:
        """Return the best degree, and the seconds of a step that plans save against it."""
        if not self._num_recent or not self._of_run:
            return {}
        best = min(self._of_run, key=lambda degree: self._of_run[degree])
        saved_s = (self._recent[best] - self._planned_s) / self._num_recent
        return {"saved_s_by_model": saved_s, "static_degree_by_model": float(best)}
