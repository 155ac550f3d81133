"""Hooks hand the context to attention where a layer in between drops its keyword arguments.

The layers of Nemotron and of StableLM are given the context, like all layers, and call their attention without it. Each
layer's is kept from its call to its next one: where a layer is recomputed in backward, transformers runs its forward
without its hooks, and that backward comes before the next micro-batch.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

KEYWORD = "hetero"


class HandedDown:
    """`HandedDown` has attention be given the context that its layer drops; other layers it leaves alone.

    Args:
        model: of transformers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._handles: list[RemovableHandle] = []
        for layer, attention in _dropped(model):
            bridge: Any = _Bridge()
            self._handles += [
                layer.register_forward_pre_hook(bridge.enter, with_kwargs=True),
                attention.register_forward_pre_hook(bridge.hand_down, with_kwargs=True),
            ]

    def remove(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()


class _Bridge:
    """A bridge holds the context of a layer's last call."""

    def __init__(self) -> None:
        self._context: Any = None

    @torch.compiler.disable
    def enter(self, layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._context = kwargs.get(KEYWORD)

    @torch.compiler.disable
    def hand_down(self, attention: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return None if self._context is None else (args, {**kwargs, KEYWORD: self._context})


def _dropped(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Yield layers that do not hand their keyword arguments to a part that has a layer's number; and that part."""
    known: dict[tuple[type, str], bool] = {}  # a model has many layers of few classes
    for layer in model.modules():
        for name, part in layer.named_children():
            if isinstance(getattr(part, "layer_idx", None), int):
                key = type(layer), name
                if key not in known:
                    known[key] = _takes_any(layer) and _takes_any(part) and _drops(type(layer), name)
                if known[key]:
                    yield layer, part


def _takes_any(module: torch.nn.Module) -> bool:
    """Return whether a module's forward takes keyword arguments that it does not name."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _drops(layer: type[torch.nn.Module], part: str) -> bool:
    """Return whether a layer's forward calls a part of its own, each time without `**`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(layer.forward))))
    except (OSError, TypeError, SyntaxError):  # written at a prompt, or not in Python
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_own(node.func, part)]
    return bool(calls) and not any(keyword.arg is None for call in calls for keyword in call.keywords)


def _is_own(function: ast.expr, name: str) -> bool:
    """Return whether an expression is `self.name`."""
    return (
        isinstance(function, ast.Attribute)
        and function.attr == name
        and isinstance(function.value, ast.Name)
        and function.value.id == "self"
    )
