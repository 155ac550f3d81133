"""This module says in a few lines what was measured, and how well the cost model follows it."""

from __future__ import annotations

from statistics import median

from hf_hetero.profile.profile import Profile


def profile_lines(found: Profile, file: str) -> str:
    """Return a table of how far the formula is from the groups of each kind, and what is in the file."""
    cost = found.cost_model
    kinds: dict[str, list[float]] = {}
    for one, error in zip(found.measured, found.errors, strict=True):
        trial = one.trial
        kind = "one sample" if len(trial.lengths) == 1 else "packs"
        how = trial.activations or (trial.method if trial.degree > 1 else "")
        kinds.setdefault(f"degree {trial.degree}, {kind}{f', {how}' if how else ''}", []).append(error)
    width = max(map(len, kinds))
    lines = [f"{'groups':<{width}}  number  median error  largest"]
    lines += [f"{kind:<{width}}  {len(e):>6}  {median(e):>12.1%}  {max(e):>7.1%}" for kind, e in kinds.items()]
    lines += [
        "",
        f"{cost.attention_s_per_token2:.3g} s a squared token, {cost.linear_s_per_token:.3g} s a token, "
        f"{cost.micro_batch_s:.3g} s a micro-batch",
        *(
            f"degree {degree}: {speed / 1e9:.3g} GB/s, {1e3 * cost.all_to_all_latency_s.get(degree, 0.0):.3g} ms"
            for degree, speed in sorted(cost.all_to_all_bytes_per_s.items())
        ),
        f"{cost.activation_bytes_per_token / 2**10:.4g} KiB a token, {cost.model_state_bytes_per_rank / 2**30:.3g} GiB "
        f"whatever the tokens, of {cost.memory_bytes_per_rank / 2**30:.3g} GiB: {cost.capacity_tokens:,} tokens a rank",
        f"Wrote {file}: {cost.model}",
    ]
    return "\n".join(lines)
