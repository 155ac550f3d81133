"""A manner says how a model is trained under plans where its class does not go the way of most; a trial finds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_hetero.config import HeteroConfig


@dataclass(frozen=True, slots=True)
class Manner:
    """A `Manner` is how a model is trained under plans. Without arguments: as most are.

    Args:
        whole: why ranks cannot share a sample of it, in words, so that each goes over whole ones; "": they can.
        outside_loss: its own loss is a plain cross-entropy that cannot be divided by the targets of a step, so that
            the loss is computed outside of it, from its logits.
        aligned: its own loss compares a token's logits with the label of that token, and not of the one after it:
            whoever made the labels has shifted them.
    """

    whole: str = ""
    outside_loss: bool = False
    aligned: bool = False


def settings_for(manner: Manner, hetero: HeteroConfig) -> HeteroConfig:
    """Return settings as they are meant: ranks that share a whole sample all do its work, so none do unasked."""
    return replace(hetero, max_degree=1) if manner.whole and hetero.max_degree is None else hetero
