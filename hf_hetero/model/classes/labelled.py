"""This says what a model is given labels of: the next token, each token, or a whole sequence."""

from __future__ import annotations

from typing import Any, Literal

from transformers.modeling_layers import GenericForSequenceClassification

Labelled = Literal["next tokens", "tokens", "sequences", "nothing"]

NEXT: Labelled = "next tokens"
TOKENS: Labelled = "tokens"
SEQUENCES: Labelled = "sequences"
NOTHING: Labelled = "nothing"


def labelled_of(base: Any) -> Labelled:
    """Return what labels are of: a model of transformers is asked, by the names that its classes have there.

    Args:
        base: any model; one that neither writes text nor has classes is given no labels.
    """
    names = {kind.__name__ for kind in type(base).__mro__}  # FSDP puts a class of its own before them
    if isinstance(base, GenericForSequenceClassification) or _any_ends(names, "ForSequenceClassification"):
        return SEQUENCES
    if _any_ends(names, "ForTokenClassification"):
        return TOKENS
    return NEXT if getattr(base, "can_generate", bool)() else NOTHING


def pools_last_token(base: Any) -> bool:
    """Return whether a model's score of a sequence is that of its last token, as decoders' is in transformers."""
    return isinstance(base, GenericForSequenceClassification)


def _any_ends(names: set[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)
