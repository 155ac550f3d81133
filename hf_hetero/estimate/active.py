"""This counts the weights that one token is computed with: of a mixture of experts, only those that it is sent to."""

from __future__ import annotations

from typing import Any

import torch

from hf_hetero.model.experts.load import NUM_EXPERTS

NUM_USED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")
"""What configs, and modules, call the number of experts that a token is sent to."""


def num_experts(config: Any) -> int:
    """Return the routed experts of a layer; 0 where there are none."""
    return _first_number(config, NUM_EXPERTS)


def num_used(config: Any) -> int:
    """Return how many experts a token is sent to; 0 where the config does not say it."""
    return _first_number(config, NUM_USED)


def active_params(model: torch.nn.Module, config: Any) -> int:
    """Count the weights that a token is computed with: all, but for those of experts that it is not sent to.

    Args:
        model, config: as for `idle_shares`.
    """
    idle = sum(share * p.numel() for p, share in idle_shares(model, config).items())
    return max(1, round(sum(p.numel() for p in model.parameters()) - idle))


def idle_shares(model: torch.nn.Module, config: Any) -> dict[torch.Tensor, float]:
    """Return, for each weight of experts, by what share of tokens it is not used, if all are used alike.

    Args:
        model: of transformers, on any device. Its experts are told by what it is built of: one tensor with a row for
            each expert, in a module called ...Experts, or a list of modules called `experts`.
        config: of its text part.
    """
    shares: dict[torch.Tensor, float] = {}
    used_in = num_used(config)
    for name, module in model.named_modules():
        kind, last = type(module).__name__, name.rpartition(".")[2]
        if "Shared" in kind or "shared" in last:  # all tokens are computed with these
            continue
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict) and last == "experts":
            rows, weights = len(module), list(module.parameters())
        elif kind.endswith(("Experts", "ExpertGLU")):
            weights = list(module.parameters(recurse=False))
            stacked = [p for p in weights if p.ndim > 1]
            rows = _first_number(module, NUM_EXPERTS) or (stacked[0].shape[0] if stacked else 0)
        else:
            continue
        used = used_in or _used_by(model, name) or rows
        if rows:
            shares |= dict.fromkeys(weights, 1 - min(used, rows) / rows)
    return shares


def _used_by(model: torch.nn.Module, experts: str) -> int:
    """Return how many experts a token is sent to, as what stands around the experts keeps it."""
    around = model.get_submodule(experts.rpartition(".")[0])
    found = (_first_number(module, NUM_USED) for module in (around, *around.children()))
    return next((number for number in found if number), 0)


def _first_number(of: Any, names: tuple[str, ...]) -> int:
    """Return the first of some fields that is a number above 0; 0 where none is."""
    for name in names:
        try:
            value = getattr(of, name, None)
        except RuntimeError:  # transformers does not say what differs by layer
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
