"""This module writes advice as lines of text, for people."""

from __future__ import annotations

import textwrap

from hf_hetero.advice.advise import WORTH, Advice
from hf_hetero.advice.levers import Lever
from hf_hetero.advice.start import Start

DOING = {"": "as it is", "recompute": "layers recomputed", "offload": "and offloaded"}
HEAD, WIDTH = 10, 110


def advice_lines(advice: Advice, start: Start) -> str:
    """Write advice: what fits, how fast, what to start from, what to change next."""
    cost, run = advice.forecast.cost, advice.run
    model_gib, rank_gib = cost.model_state_bytes_per_rank / 2**30, cost.memory_bytes_per_rank / 2**30
    lines = [
        _said("estimate", "All seconds, bytes and tokens below are estimates from data sheets; nothing was measured."),
        _said("model", advice.forecast.trained),
        _said("GPUs", f"{run.machines.name}: {rank_gib:.1f} GiB a rank, {model_gib:.1f} of it for the model"),
        *_held(advice),
        _said("data", _data(advice)),
        _said("speed", _speed(advice)),
        *_levers(advice),
        _said("next", _next(advice)),
        _said("start", _start(start)),
    ]
    return "\n".join(lines)


def _held(advice: Advice) -> list[str]:
    """Write the longest sample that fits, a line for each thing that groups do, a column a degree."""
    degrees = list(next(iter(advice.holds.values())))
    lines = ["tokens of the longest sample that fits, by the ranks that share it"]
    lines.append("ranks".rjust(28) + "".join(f"{degree:>12}" for degree in degrees))
    for doing, by_degree in advice.holds.items():
        lines.append(DOING[doing].rjust(28) + "".join(f"{tokens:>12,}" for tokens in by_degree.values()))
    return lines


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


def _levers(advice: Advice) -> list[str]:
    """Write a line a change: what it gains, how fast the run is then, and the longest sample that fits."""
    lines = ["what else could be done, each estimated and planned anew, by itself"]
    lines.append(f"{'gain':>9}{'tokens/s':>13}{'GPUs':>7}{'longest':>13}  change")
    for lever in advice.levers:
        if lever.longest_tokens is None:
            lines.append(f"{'-':>9}{'-':>13}{lever.num_gpus:>7}{'-':>13}  {lever.name}: the model does not fit")
        elif lever.tokens_per_s is None:
            lines.append(
                f"{'-':>9}{'-':>13}{lever.num_gpus:>7}{lever.longest_tokens:>13,}  {lever.name}: samples do not fit"
            )
        else:
            speed = f"{advice.gain(lever):>8.2f}x{lever.tokens_per_s:>13,.0f}"
            lines.append(f"{speed}{lever.num_gpus:>7}{lever.longest_tokens:>13,}  {lever.name}")
    return lines


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


def _said(head: str, said: str) -> str:
    return "\n".join(textwrap.wrap(said, WIDTH, initial_indent=f"{head:<{HEAD}}", subsequent_indent=" " * HEAD))
