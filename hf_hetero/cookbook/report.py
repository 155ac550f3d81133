"""This module writes what a check of a recipe found as lines of text, for people."""

from __future__ import annotations

from hf_hetero.cookbook.check import Checked
from hf_hetero.plan_in_words import describe_groups

WIDTH = 10


def check_lines(checked: Checked) -> str:
    """Write what is right as far as it was looked at, then what is wrong, a line each."""
    lines: list[str] = []
    if checked.ok or checked.sample is not None:
        lines.append(_line("keys", f"{checked.num_keys} of {checked.name} are known, and take their values"))
        lines.append(_line("launch", checked.launch or "a single rank"))
    if checked.sample is not None:
        lengths = sorted(checked.sample.lengths)
        looked = f"{len(checked.sample.rows):,} rows looked at, {len(lengths):,} samples"
        lines.append(_line("data", f"{looked}: median {lengths[len(lengths) // 2]:,} tokens, longest {lengths[-1]:,}"))
    elif checked.ok:
        lines.append(_line("data", "not looked at: its script reads them in a way of its own"))
    if checked.planned is not None:
        plan = checked.planned.plan
        ways = " ".join(f"[{describe_groups(micro_batch)}]" for micro_batch in plan.micro_batches[:6])
        more = f" and {len(plan.micro_batches) - 6} more" if len(plan.micro_batches) > 6 else ""
        step = f"{len(checked.planned.lengths)} samples of {sum(checked.planned.lengths):,} tokens in {ways}{more}"
        lines.append(_line("plan", f"{step}: {plan.seconds:.3g} s on {checked.planned.by}"))
    if checked.trial is not None:
        ranks = "one CPU rank" if checked.trial.num_ranks == 1 else f"{checked.trial.num_ranks} CPU ranks"
        losses = ", ".join(f"{loss:.3f}" for loss in checked.trial.losses)
        lines.append(_line("training", f"a small model of its kind on {ranks}: losses {losses or 'not logged'}"))
    lines += [
        _line("wrong", f"{problem.key}: {problem.said}" if problem.key else problem.said)
        for problem in checked.problems
    ]
    found = len(checked.problems)
    verdict = "nothing wrong was found" if checked.ok else f"{found} thing{'s' if found > 1 else ''} to mend"
    return "\n".join([*lines, _line("verdict", verdict)])


def _line(head: str, said: str) -> str:
    return f"{head:<{WIDTH}}{said}"
