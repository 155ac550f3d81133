"""This is the function that transformers calls as attention "hf_hetero": only this file knows its signature.

Under a plan the function finds its `AttentionContext` in the model's keywords. Without one (evaluation, generation) it
is stock scaled-dot-product attention.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_hetero.attention import chunks
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.contract import Scores
from hf_hetero.attention.kernels.plain import weigh
from hf_hetero.attention.methods import attend
from hf_hetero.errors import UnsupportedModel

# must hold neither "flash" nor "sdpa": transformers treats such names in ways of its own
ATTENTION_NAME = "hf_hetero"


@torch.compiler.disable  # a compiler sees through neither messages between ranks nor what the context keeps of them
def hetero_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    hetero: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention across the group of the current micro-batch.

    Args:
        query: shape (1, H, n, D).
        key, value: shapes (1, Hk, n, D) and (1, Hk, n, Dv).
        hetero: the micro-batch; None outside a plan.

    Returns:
        Shape (1, n, H, Dv), and None for the weights.

    Raises:
        UnsupportedModel: the model lost the context on its way here, or wants what no plan can keep exact.
    """
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    if hetero is None:
        return _without_plan(module, query, key, value, attention_mask, dropout, scores, kwargs), None
    if dropout:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for attention dropout of {dropout}, which draws another mask for every "
            "layout. Load the model without it, as by from_pretrained(..., attention_dropout=0.0): its layers do not "
            "read the config again."
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        if sliding_window is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} looks at tokens after its own, in a window of {sliding_window}; windows "
                "across ranks look back only. Train a model without windows, or this one with plain Trainer."
            )
        scores, hetero.looked_ahead = replace(scores, causal=False), True
    elif hetero.is_mutual(sliding_window):
        scores = replace(scores, mutual=True)
    # layers without a number share 0; the context then keeps nothing of them, since nothing tells their calls apart
    layer = getattr(module, "layer_idx", None) or 0
    hetero.reached.add(layer)
    # a pack is one row. Norms may have raised q and k to fp32 under autocast; the values tell the type to compute in
    query = chunks.at_own_positions(module, query, hetero)
    missing = query.shape[2] - hetero.num_tokens
    q, k, v = (_rows(x, hetero.num_tokens).to(value.dtype) for x in (query, key, value))
    out = attend(q, k, v, scores, chunks.place_of(module, hetero, layer))
    # a rank without tokens runs the model on one that stands in, so that it takes part in every exchange; the output
    # of that token is zeros, and nothing flows back from it
    out = F.pad(out, (0, 0, 0, 0, 0, missing)) if missing else out
    return out.unsqueeze(0), None


def _rows(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return a pack's first rows, (t, H, D) of (1, H, n, D): a slice, even of all, copies a whole gradient."""
    rows = x.squeeze(0).transpose(0, 1)
    return rows if rows.shape[0] == num_tokens else rows[:num_tokens]


def _without_plan(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scores: Scores,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Compute stock attention, shape (1, n, H, Dv) for queries of shape (1, H, n, D), in any batch size.

    Raises:
        UnsupportedModel: there is a plan, and the model lost the context on its way here.
    """
    # a mask of one row for all queries is `planned_mask`: it came through, and the context did not
    if attention_mask is not None and attention_mask.shape[-2] != query.shape[-2]:
        raise UnsupportedModel(
            f"{type(module).__name__} does not hand its keyword arguments to attention, so a layer cannot learn which "
            "ranks share its tokens. Use a model of transformers itself, or plain Trainer."
        )
    chosen = kwargs.get("indices")
    if chosen is not None and chosen.shape[-1] < key.shape[-2]:
        raise UnsupportedModel(
            f"{type(module).__name__} chooses {chosen.shape[-1]} of {key.shape[-2]} tokens to attend to, which only "
            "transformers' own attention follows. Evaluate shorter samples, or after training."
        )
    if scores.softcap is None and scores.sinks is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scores.scaling, **kwargs
        )
        return out
    # torch's operator has neither a softcap nor sinks
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    if attention_mask is None:
        # causal, aligned at the last keys: in generation the cache holds keys before the first query
        num_q, num_k = query.shape[2], key.shape[2]
        hidden = torch.ones(num_q, num_k, dtype=torch.bool, device=query.device).triu(num_k - num_q + 1)
    else:
        hidden = ~attention_mask
    return weigh(q, k, v, hidden, scores)


def register() -> None:
    """Make "hf_hetero" known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, hetero_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
