"""Hooks give a plan's positions to embeddings of positions whose model counts them by itself, from the row's beginning.

The decoders of BART and its kin know no `position_ids`: they count tokens, and hand the count to their embedding. A row
of a plan holds several samples, or a part of one, and its positions come with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

COUNTED = frozenset({"past_key_values_length", "position_ids"})
"""What the forward of an embedding knows to which a model hands its own count."""


class PositionsBySample:
    """`PositionsBySample` has positions follow each sample of a plan. Without a plan it does nothing.

    Args:
        model: of transformers. The modules that count are given positions and context among keywords that they do not
            know, as all of its layers are.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._handles: list[RemovableHandle] = []
        for caller, embedding in _counting(model):
            bridge: Any = _Bridge()
            self._handles += [
                caller.register_forward_pre_hook(bridge.enter, with_kwargs=True),
                # after an error, too: positions must not outlive their pass
                caller.register_forward_hook(bridge.leave, always_call=True),
                embedding.register_forward_pre_hook(bridge.hand_down, with_kwargs=True),
            ]

    def __len__(self) -> int:
        return len(self._handles) // 3

    def remove(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()


class _Bridge:
    """A bridge holds the positions of a call underway."""

    def __init__(self) -> None:
        self._positions: torch.Tensor | None = None

    @torch.compiler.disable
    def enter(self, caller: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._positions = kwargs.get("position_ids") if kwargs.get("hetero") is not None else None

    @torch.compiler.disable
    def leave(self, caller: torch.nn.Module, args: Any, output: Any) -> None:
        self._positions = None

    @torch.compiler.disable
    def hand_down(self, embedding: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        # of the one row, as these embeddings are given them
        return None if self._positions is None else (args, {**kwargs, "position_ids": self._positions[0]})


def _counting(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Yield modules that know no positions and have an embedding that is handed their count; and that embedding."""
    for caller in model.modules():
        for embedding in caller.children():
            if isinstance(embedding, torch.nn.Embedding) and _names(embedding) >= COUNTED:
                known = _names(caller)
                if "position_ids" not in known and "kwargs" in known:
                    yield caller, embedding


def _names(module: torch.nn.Module) -> set[str]:
    return set(inspect.signature(type(module).forward).parameters)
