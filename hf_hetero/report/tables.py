"""This module writes plans, simulations, cost models and checks as tables of text, for people; programs read JSON."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hf_hetero.costs import CostModel, shipped_names
from hf_hetero.plan import METHODS, Plan
from hf_hetero.plan_in_words import describe_groups


def plan_table(plan: Plan, lengths: Sequence[int], cost: CostModel) -> str:
    """Write a plan for people: a line a micro-batch, then what it comes to."""
    rows: list[str] = []
    for number, micro_batch in enumerate(plan.micro_batches):
        seconds = [cost.group_seconds(group, lengths) for group in micro_batch.groups]
        tokens = sum(lengths[sample] for group in micro_batch.groups for sample in group.samples)
        samples = sum(len(group.samples) for group in micro_batch.groups)
        degrees = describe_groups(micro_batch)
        rows.append(f"{number:>11}  {degrees:<24}  {samples:>7,}  {tokens:>11,}  {max(seconds):>8.3f}")
    head = f"{'micro-batch':>11}  {'degrees':<24}  {'samples':>7}  {'tokens':>11}  {'seconds':>8}"
    total = (
        f"{plan.seconds:.3f} s predicted, within {plan.gap:.1%} of optimal "
        f"(no plan is faster than {plan.lower_bound_s:.3f} s); {plan.solver}, {1000 * plan.planning_s:.1f} ms"
    )
    return "\n".join([head, *rows, total])


def simulation_table(result: Mapping[str, Any]) -> str:
    """Write a simulation for people: a line a way, then what it comes to."""
    steps: int = result["num_steps"]
    head = f"{'way':<13}{'s a step':>10}{'adaptive is':>13}{'above bound':>13}{'micro-batches':>15}{'idle':>7}"
    rows: list[str] = []
    for name, way in result["ways"].items():
        rows.append(
            f"{name:<13}{way['seconds'] / steps:>10.3f}{way['speedup_of_adaptive']:>12.2f}x"
            f"{way['ratio_to_bound'] - 1:>13.1%}{way['micro_batches'] / steps:>15.1f}"
            f"{way['idle_share']:>7.0%}  {way['note']}".rstrip()
        )
    planning = sorted(result["planning_s"])
    return "\n".join(
        [
            head,
            *rows,
            f"{'bound':<13}{result['lower_bound_s'] / steps:>10.3f}",
            f"Adaptive is within {result['ways']['adaptive']['ratio_to_bound'] - 1:.1%} of optimal. "
            f"Planning {1000 * planning[len(planning) // 2]:.1f} ms a step, {1000 * planning[-1]:.1f} ms at worst.",
            f"{steps} steps of {result['num_samples'] // steps} samples, {result['num_tokens'] // steps:,} tokens, on "
            f"{result['num_ranks']} ranks; context {result['context_tokens']:,}. "
            "Seconds are predicted by the cost model.",
        ]
    )


def costs_table() -> str:
    """List shipped cost models for people: name, tokens a rank holds, degrees, and where the numbers come from."""
    rows: list[str] = []
    for name in shipped_names():
        cost = CostModel.load(name)
        degrees = ", ".join(map(str, cost.degrees(sys.maxsize)))
        about = f"{cost.capacity_tokens:,} tokens a rank, degrees {degrees}. {cost.source}"
        rows += [name, *textwrap.wrap(about, 100, initial_indent="    ", subsequent_indent="    ")]
    return "\n".join(rows)


TYPICAL_TOKENS = (1024, 8192, 32768, 131072, 1048576)


def check_table(result: Mapping[str, Any], card: str) -> str:
    """Write what is known of a model, for people; the verdict last."""
    probe = result["probe"]
    tested = "compared with plain training in this version's tests" if result["tested"] else "not compared in tests yet"
    heads = f"{result['num_heads']} of queries, {result['num_kv_heads']} of keys and values"
    errors = f"by {probe['loss_error']:.0e} in the loss, {probe['gradient_error']:.0e} in gradients"
    if probe["manner"]["whole"] and not probe["problem"]:
        tried = f"a tiny instance that goes over whole samples differs from stock {errors}"
    elif probe["num_layers"]:
        reached = f"attention reached in {probe['reached']} of {probe['num_layers']} layers of a tiny instance"
        tried = f"{reached}; differs from stock attention {errors}"
    else:
        tried = "not tried" if probe["failure"] else "a tiny instance did not finish"
    lines = [
        f"model     {result['name']} ({result['model_type']}), {tested}",
        "versions  " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"kernel    on a GPU in bf16: {result['kernel']}",
        f"heads     {heads if result['num_heads'] else 'none'}",
        *_methods_table(result["methods"]),
        *_tokens_table(result["tokens_a_rank"], card),
        f"probe     {tried}",
        *textwrap.wrap(result["verdict"], 110, initial_indent="verdict   ", subsequent_indent=" " * 10),
    ]
    return "\n".join(lines)


def _tokens_table(tokens: Mapping[str, int], card: str) -> list[str]:
    """Say how long a sample one rank holds: a line for each way to save memory."""
    if not tokens:
        return []
    lines = [f"memory    tokens of the longest sample that one rank holds by estimate ({card})"]
    for number, (lever, most_tokens) in enumerate(tokens.items()):
        lines.append(f"{'' if number == 0 else '+ '}{lever}".rjust(28) + f"{most_tokens:>12,}")
    return lines


def _methods_table(methods: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Say how heads fit: a line a degree, a column a method."""
    rows = [(str(degree), *(ways.get(method, "") for method in METHODS)) for degree, ways in methods.items() if ways]
    if not rows:
        return []
    table = [("degree", *METHODS), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def estimate_table(cost: CostModel, num_ranks: int, trained: str, machines: str) -> str:
    """Write a cost model in words, for people: what a rank holds, and the seconds of typical samples.

    Args:
        cost: of the run.
        num_ranks: of the run.
        trained, machines: the model and the GPUs, in words.
    """
    model_gib, rank_gib = cost.model_state_bytes_per_rank / 2**30, cost.memory_bytes_per_rank / 2**30
    lines = [
        f"model     {trained}",
        f"GPUs      {machines}: {rank_gib:.1f} GiB a rank, {model_gib:.1f} of it for the model",
        "tokens that a rank holds in a micro-batch",
    ]
    for name, model in cost.by_activations.items():
        words = {None: "as it is", "recompute": "layers recomputed", "offload": "and offloaded"}[name]
        lines.append(words.rjust(28) + f"{model.capacity_tokens:>12,}")
    degrees = cost.degrees(num_ranks)
    lines.append("seconds of one sample, forward and backward, by the ranks that share it (- does not fit)")
    lines.append("tokens".rjust(28) + "".join(f"{degree:>9}" for degree in degrees))
    longest = cost.leanest.capacity_tokens * degrees[-1]
    for length in [length for length in TYPICAL_TOKENS if length <= longest] or [longest]:
        lines.append(f"{length:>28,}" + "".join(_seconds(cost, length, degree) for degree in degrees))
    lines += textwrap.wrap(cost.source, 110, initial_indent="source    ", subsequent_indent=" " * 10)
    return "\n".join(lines)


def _seconds(cost: CostModel, length: int, degree: int) -> str:
    """Write the seconds of a sample, by the first way to hold it that a group of this degree has."""
    fits = (model for model in cost.by_activations.values() if length <= model.capacity_tokens * degree)
    model = next(fits, None)
    return f"{'-' if model is None else f'{model.seconds([length], degree):.3g}':>9}"
