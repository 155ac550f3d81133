"""This module says in a few lines (`terminal`) what was measured, and how well the cost model follows it."""

from __future__ import annotations

from statistics import median

from hf_hetero.profile.profile import Profile
from hf_hetero.terminal.blocks import Block, Line, Table, number, words


def profile_blocks(found: Profile, file: str) -> list[Block]:
    """Say in a table of how far the formula is from the groups of each kind, and what is in the file."""
    cost = found.cost_model
    kinds: dict[str, list[float]] = {}
    for one, error in zip(found.measured, found.errors, strict=True):
        trial = one.trial
        kind = "one sample" if len(trial.lengths) == 1 else "packs"
        how = trial.activations or (trial.method if trial.degree > 1 else "")
        kinds.setdefault(f"degree {trial.degree}, {kind}{f', {how}' if how else ''}", []).append(error)
    errors = Table(
        (words("groups"), number("number", gap=2), number("median error", gap=2), number("largest", gap=2)),
        tuple((kind, str(len(e)), f"{median(e):.1%}", f"{max(e):.1%}") for kind, e in kinds.items()),
    )
    return [
        errors,
        Line(),
        Line(
            f"{cost.attention_s_per_token2:.3g} s a squared token, {cost.linear_s_per_token:.3g} s a token, "
            f"{cost.micro_batch_s:.3g} s a micro-batch"
        ),
        *(
            Line(f"degree {degree}: {speed / 1e9:.3g} GB/s, {1e3 * cost.all_to_all_latency_s.get(degree, 0.0):.3g} ms")
            for degree, speed in sorted(cost.all_to_all_bytes_per_s.items())
        ),
        Line(
            f"{cost.activation_bytes_per_token / 2**10:.4g} KiB a token, "
            f"{cost.model_state_bytes_per_rank / 2**30:.3g} GiB whatever the tokens, of "
            f"{cost.memory_bytes_per_rank / 2**30:.3g} GiB: {cost.capacity_tokens:,} tokens a rank"
        ),
        Line(f"Wrote {file}: {cost.model}"),
    ]
