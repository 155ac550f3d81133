"""This module says what a check of a recipe found, for people (`terminal`)."""

from __future__ import annotations

from hf_hetero.cookbook.check import Checked
from hf_hetero.plan_in_words import describe_groups
from hf_hetero.terminal.blocks import Fact


def check_facts(checked: Checked) -> list[Fact]:
    """Say what is right as far as it was looked at, then what is wrong, one by one."""
    facts: list[Fact] = []
    if checked.ok or checked.sample is not None:
        facts.append(Fact("keys", f"{checked.num_keys} of {checked.name} are known, and take their values"))
        facts.append(Fact("launch", checked.launch or "a single rank"))
    if checked.sample is not None:
        lengths = sorted(checked.sample.lengths)
        looked = f"{len(checked.sample.rows):,} rows looked at, {len(lengths):,} samples"
        facts.append(Fact("data", f"{looked}: median {lengths[len(lengths) // 2]:,} tokens, longest {lengths[-1]:,}"))
    elif checked.ok:
        facts.append(Fact("data", "not looked at: its script reads them in a way of its own"))
    if checked.planned is not None:
        plan = checked.planned.plan
        ways = " ".join(f"[{describe_groups(micro_batch)}]" for micro_batch in plan.micro_batches[:6])
        more = f" and {len(plan.micro_batches) - 6} more" if len(plan.micro_batches) > 6 else ""
        step = f"{len(checked.planned.lengths)} samples of {sum(checked.planned.lengths):,} tokens in {ways}{more}"
        facts.append(Fact("plan", f"{step}: {plan.seconds:.3g} s on {checked.planned.by}"))
    if checked.trial is not None:
        ranks = "one CPU rank" if checked.trial.num_ranks == 1 else f"{checked.trial.num_ranks} CPU ranks"
        losses = ", ".join(f"{loss:.3f}" for loss in checked.trial.losses)
        facts.append(Fact("training", f"a small model of its kind on {ranks}: losses {losses or 'not logged'}"))
    facts += [
        Fact("wrong", f"{problem.key}: {problem.said}" if problem.key else problem.said, tone="bad")
        for problem in checked.problems
    ]
    found = len(checked.problems)
    verdict = "nothing wrong was found" if checked.ok else f"{found} thing{'s' if found > 1 else ''} to mend"
    return [*facts, Fact("verdict", verdict, tone="good" if checked.ok else "bad")]
