"""This module says advice, for people (`terminal`)."""

from __future__ import annotations

from hf_hetero.advice.advise import WORTH, Advice
from hf_hetero.advice.levers import Lever
from hf_hetero.advice.start import Start
from hf_hetero.report.tables import WIDTH, held_columns
from hf_hetero.terminal.blocks import Block, Fact, Table, number, words

DOING = {"": "as it is", "recompute": "layers recomputed", "offload": "and offloaded"}


def advice_blocks(advice: Advice, start: Start) -> list[Block]:
    """Say advice: what fits, how fast, what to start from, what to change next."""
    cost, run = advice.forecast.cost, advice.run
    model_gib, rank_gib = cost.model_state_bytes_per_rank / 2**30, cost.memory_bytes_per_rank / 2**30
    return [
        _said("estimate", "All seconds, bytes and tokens below are estimates from data sheets; nothing was measured."),
        _said("model", advice.forecast.trained),
        _said("GPUs", f"{run.machines.name}: {rank_gib:.1f} GiB a rank, {model_gib:.1f} of it for the model"),
        _held(advice),
        _said("data", _data(advice)),
        _said("speed", _speed(advice)),
        _levers(advice),
        _said("next", _next(advice)),
        _said("start", _start(start)),
    ]


def _held(advice: Advice) -> Table:
    """Say the longest sample that fits, a row for each thing that groups do, a column a degree."""
    degrees = list(next(iter(advice.holds.values())))
    return Table(
        held_columns(len(degrees), ("ranks", *map(str, degrees))),
        tuple(
            (DOING[doing], *(f"{held:,}" for held in by_degree.values())) for doing, by_degree in advice.holds.items()
        ),
        "tokens of the longest sample that fits, by the ranks that share it",
    )


def _data(advice: Advice) -> str:
    """Say what is trained on, and what of it does not fit."""
    lengths = advice.source.lengths
    drawn = "drawn from" if advice.source.is_drawn else "in"
    said = (
        f"{lengths.size:,} samples {drawn} {advice.source.name}: median {int(sorted(lengths)[lengths.size // 2]):,} "
        f"tokens, longest {int(lengths.max()):,}; {advice.batch_size} a step"
    )
    if advice.fits:
        return said
    lost = lengths[lengths > max(max(held.values()) for held in advice.holds.values())]
    share = lost.sum() / lengths.sum()
    return (
        f"{said}. {lost.size:,} of them, with {share:.1%} of the tokens, fit nowhere, and are left out of what "
        "follows: pull a lever, or cut them (max_length_policy: truncate, or split)"
    )


def _speed(advice: Advice) -> str:
    """Say how fast the run is, beside the best single degree."""
    found, total = advice.outlook, f"{advice.num_tokens / 1e9:.3g} billion tokens"
    planned, fixed = found.tokens_per_s, found.static_tokens_per_s
    return (
        f"{planned:,.0f} tokens/s, {_days(advice.days(planned))} for {total}; at most "
        f"{found.adaptive_s / found.bound_s - 1:.1%} from optimal. The best single degree for all, "
        f"{found.best_degree}: {fixed:,.0f} tokens/s, {_days(advice.days(fixed))}; so plans are {planned / fixed:.2f} "
        "times as fast"
    )


def _levers(advice: Advice) -> Table:
    """Say a row a change: what it gains, how fast the run is then, and the longest sample that fits."""
    columns = (
        number("gain", 9, "as fast"),
        number("tokens/s", 13),
        number("GPUs", 7),
        number("longest", 13, "tokens"),
        words("change", gap=2),
    )
    rows: list[tuple[str, ...]] = []
    for lever in advice.levers:
        gpus = str(lever.num_gpus)
        if lever.longest_tokens is None:
            rows.append(("-", "-", gpus, "-", f"{lever.name}: the model does not fit"))
        elif lever.tokens_per_s is None:
            rows.append(("-", "-", gpus, f"{lever.longest_tokens:,}", f"{lever.name}: samples do not fit"))
        else:
            gain, speed = f"{advice.gain(lever):.2f}x", f"{lever.tokens_per_s:,.0f}"
            rows.append((gain, speed, gpus, f"{lever.longest_tokens:,}", lever.name))
    title = "what else could be done, each estimated and planned anew, by itself"
    return Table(columns, tuple(rows), title, key=len(columns) - 1)


def _next(advice: Advice) -> str:
    """Say which change to try first."""
    lever = advice.next_lever()
    if lever is None and advice.fits:
        return f"leave it as it is: no change gains {WORTH - 1:.0%}"
    if lever is None:
        return "none of these changes makes room for the longest samples: cut them, or take twice as many GPUs twice"
    if not advice.fits:
        return f"{lever.name}: then every sample fits"
    return f"{lever.name}: {advice.gain(lever):.2f} times as fast{_for_gpus(advice, lever)}"


def _for_gpus(advice: Advice, lever: Lever) -> str:
    more = lever.num_gpus / advice.run.machines.num_ranks
    return f", for {more:.3g} times as many GPUs" if more > 1 else ""


def _start(start: Start) -> str:
    launch = f" and {start.launch.name}" if start.launch else ", without accelerate launch"
    return (
        f"from the recipe {start.recipe.name}{launch}; -o DIR writes them for this run. Then `hf-hetero recipes check "
        "DIR`, and on the machine itself `hf-hetero profile` measures what is estimated here"
    )


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 2 else f"{24 * days:.1f} hours"


def _said(label: str, said: str) -> Fact:
    return Fact(label, said, WIDTH)
