"""This module says plans, simulations, cost models and checks, for people (`terminal`); programs read JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hf_hetero.costs import CostModel, shipped_names
from hf_hetero.plan import METHODS, Plan
from hf_hetero.plan_in_words import describe_groups
from hf_hetero.terminal.blocks import Block, Column, Entry, Fact, Table, number, words

WIDTH, ENTRY_WIDTH = 110, 100


def plan_table(plan: Plan, lengths: Sequence[int], cost: CostModel) -> Table:
    """Say a plan for people: a line a micro-batch, then what it comes to."""
    rows: list[tuple[str, ...]] = []
    for position, micro_batch in enumerate(plan.micro_batches):
        seconds = [cost.group_seconds(group, lengths) for group in micro_batch.groups]
        tokens = sum(lengths[sample] for group in micro_batch.groups for sample in group.samples)
        samples = sum(len(group.samples) for group in micro_batch.groups)
        degrees = describe_groups(micro_batch)
        rows.append((str(position), degrees, f"{samples:,}", f"{tokens:,}", f"{max(seconds):.3f}"))
    total = (
        f"{plan.seconds:.3f} s predicted, within {plan.gap:.1%} of optimal "
        f"(no plan is faster than {plan.lower_bound_s:.3f} s); {plan.solver}, {1000 * plan.planning_s:.1f} ms"
    )
    columns = (
        number("micro-batch", 11),
        words("degrees", 24, gap=2),
        number("samples", 7, gap=2),
        number("tokens", 11, gap=2),
        number("seconds", 8, "predicted", gap=2),
    )
    return Table(columns, tuple(rows), notes=(total,))


def simulation_table(result: Mapping[str, Any]) -> Table:
    """Say a simulation for people: a line a way, then what it comes to."""
    steps: int = result["num_steps"]
    columns = (
        words("way", 13),
        number("s a step", 10),
        number("adaptive is", 13, "as fast"),
        number("above bound", 13),
        number("micro-batches", 15, "a step"),
        number("idle", 7),
        words(gap=2),
    )
    rows = [
        (
            name,
            f"{way['seconds'] / steps:.3f}",
            f"{way['speedup_of_adaptive']:.2f}x",
            f"{way['ratio_to_bound'] - 1:.1%}",
            f"{way['micro_batches'] / steps:.1f}",
            f"{way['idle_share']:.0%}",
            way["note"],
        )
        for name, way in result["ways"].items()
    ]
    rows.append(("bound", f"{result['lower_bound_s'] / steps:.3f}", "", "", "", "", ""))
    planning = sorted(result["planning_s"])
    notes = (
        f"Adaptive is within {result['ways']['adaptive']['ratio_to_bound'] - 1:.1%} of optimal. "
        f"Planning {1000 * planning[len(planning) // 2]:.1f} ms a step, {1000 * planning[-1]:.1f} ms at worst.",
        f"{steps} steps of {result['num_samples'] // steps} samples, {result['num_tokens'] // steps:,} tokens, on "
        f"{result['num_ranks']} ranks; context {result['context_tokens']:,}. Seconds are predicted by the cost model.",
    )
    return Table(columns, tuple(rows), notes=notes)


def costs_table() -> list[Entry]:
    """List shipped cost models for people: name, tokens a rank holds, degrees, and where the numbers come from."""
    entries: list[Entry] = []
    for name in shipped_names():
        cost = CostModel.load(name)
        degrees = ", ".join(map(str, cost.degrees(sys.maxsize)))
        about = f"{cost.capacity_tokens:,} tokens a rank, degrees {degrees}. {cost.source}"
        entries.append(Entry(name, about, ENTRY_WIDTH))
    return entries


TYPICAL_TOKENS = (1024, 8192, 32768, 131072, 1048576)


def check_table(result: Mapping[str, Any], card: str) -> list[Block]:
    """Say what is known of a model, for people; the verdict last."""
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
    return [
        Fact("model", f"{result['name']} ({result['model_type']}), {tested}"),
        Fact("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        Fact("kernel", f"on a GPU in bf16: {result['kernel']}"),
        Fact("heads", heads if result["num_heads"] else "none"),
        *_methods_table(result["methods"]),
        *_tokens_table(result["tokens_a_rank"], card),
        Fact("probe", tried),
        Fact("verdict", result["verdict"], WIDTH, "good" if result["ok"] else "bad"),
    ]


def _tokens_table(tokens: Mapping[str, int], card: str) -> list[Block]:
    """Say how long a sample one rank holds: a line for each way to save memory."""
    if not tokens:
        return []
    rows = [
        (f"{'' if position == 0 else '+ '}{lever}", f"{most_tokens:,}")
        for position, (lever, most_tokens) in enumerate(tokens.items())
    ]
    return [
        Fact("memory", f"tokens of the longest sample that one rank holds by estimate ({card})"),
        Table(held_columns(1), tuple(rows)),
    ]


def held_columns(num_columns: int, titles: Sequence[str] = ()) -> tuple[Column, ...]:
    """Describe a table of tokens: what is done to hold them, and numbers beside it, under these titles or none."""
    first, *others = titles or [""] * (num_columns + 1)
    return (words(first, 28, is_left=False), *(number(title, 12) for title in others))


def _methods_table(methods: Mapping[int, Mapping[str, str]]) -> list[Block]:
    """Say how heads fit: a line a degree, a column a method."""
    rows = [(str(degree), *(ways.get(method, "") for method in METHODS)) for degree, ways in methods.items() if ways]
    columns = (words("degree"), *(words(method, gap=2) for method in METHODS))
    return [Table(columns, tuple(rows))] if rows else []


def estimate_table(cost: CostModel, num_ranks: int, trained: str, machines: str) -> list[Block]:
    """Say a cost model in words, for people: what a rank holds, and the seconds of typical samples.

    Args:
        cost: of the run.
        num_ranks: of the run.
        trained, machines: the model and the GPUs, in words.
    """
    model_gib, rank_gib = cost.model_state_bytes_per_rank / 2**30, cost.memory_bytes_per_rank / 2**30
    doing = {None: "as it is", "recompute": "layers recomputed", "offload": "and offloaded"}
    held = [(doing[name], f"{model.capacity_tokens:,}") for name, model in cost.by_activations.items()]
    degrees = cost.degrees(num_ranks)
    longest = cost.leanest.capacity_tokens * degrees[-1]
    typical = [length for length in TYPICAL_TOKENS if length <= longest] or [longest]
    return [
        Fact("model", trained),
        Fact("GPUs", f"{machines}: {rank_gib:.1f} GiB a rank, {model_gib:.1f} of it for the model"),
        Table(held_columns(1), tuple(held), "tokens that a rank holds in a micro-batch"),
        Table(
            (number("tokens", 28), *(number(str(d), 9, "rank" if d == 1 else "ranks") for d in degrees)),
            tuple((f"{length:,}", *(_seconds(cost, length, degree) for degree in degrees)) for length in typical),
            "seconds of one sample, forward and backward, by the ranks that share it (- does not fit)",
        ),
        Fact("source", cost.source, WIDTH),
    ]


def _seconds(cost: CostModel, length: int, degree: int) -> str:
    """Write the seconds of a sample, by the first way to hold it that a group of this degree has."""
    fits = (model for model in cost.by_activations.values() if length <= model.capacity_tokens * degree)
    model = next(fits, None)
    return "-" if model is None else f"{model.seconds([length], degree):.3g}"
