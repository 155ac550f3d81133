"""The loss of a model that computes one of its own is computed outside of it, by `token_loss`, from its logits.

Older models of transformers take the mean of their batch's cross-entropies, whatever the targets of a step are. Where
that loss is known to be plain (`checks.probe`), the model is called without labels, and the loss is put among its
outputs. Hooks do it, on whatever is called: what wraps the model may go past its own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hf_hetero.model.loss import token_loss

OF_LOSS = ("labels", "shift_labels", "num_items_in_batch", "loss_weights", "token_log_probs")
"""Keywords of a model's forward that are its loss's."""


class OutsideLoss:
    """`OutsideLoss` has a model's loss computed outside of it.

    Args:
        called: what is called: the model, or what wraps it.
        model: of transformers. It is not given keywords that its forward does not know.
        aligned: without `shift_labels`, each label is the target of its own token.
    """

    def __init__(self, called: torch.nn.Module, model: torch.nn.Module, aligned: bool) -> None:
        self._aligned, self._taken = aligned, dict[str, Any]()
        self._known = keywords_of(model)
        mine: Any = self  # torch's types do not see that a decorated function is still a method
        self._handles: list[RemovableHandle] = [
            called.register_forward_pre_hook(mine._take, with_kwargs=True),
            called.register_forward_hook(mine._put),
        ]

    def remove(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()

    @torch.compiler.disable
    def _take(self, called: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._taken = {name: kwargs[name] for name in OF_LOSS if name in kwargs}
        known = self._known
        return args, {
            name: value
            for name, value in kwargs.items()
            if name not in self._taken and (known is None or name in known)
        }

    @torch.compiler.disable
    def _put(self, called: torch.nn.Module, args: Any, output: Any) -> Any:
        taken, self._taken = self._taken, {}
        labels = taken.pop("labels", None)
        if labels is None and taken.get("shift_labels") is None:
            return None
        if self._aligned and taken.get("shift_labels") is None:
            taken["shift_labels"] = labels
        loss = token_loss(output.logits, labels, output.logits.shape[-1], **taken)
        return type(output)(**{**output, "loss": loss})


def keywords_of(model: torch.nn.Module) -> frozenset[str] | None:
    """Return the keywords that a model's forward takes; None: any."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)
