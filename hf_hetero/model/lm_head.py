"""A model's head, in disguise, hands out no logits, but what the loss computes them from.

In planned training the model's output embedding, a `LeanHead`, hands out `LazyLogits`: hidden states, weight and bias,
and what the model does to the logits (scaling, a soft cap). `token_loss` computes loss and gradients from those
(`chunked_loss`), for a few tokens at a time. Whatever else is done to lazy logits has them computed: slower, the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch._C import DisableTorchFunctionSubclass
from torch.nn import functional as F

from hf_hetero.model.chunked_loss import Change

logger = logging.getLogger(__name__)


class LeanHead(torch.nn.Linear):
    """A `LeanHead` is a model's output embedding while logits may be lazy: the same module, given another class.

    Whoever else holds on to the module, FSDP for one, notices nothing, before or after.
    """

    _is_lazy: bool = False
    _is_always: bool = False
    _num_installed: int = 0

    @contextmanager
    def lazy(self, always: bool = False) -> Iterator[None]:
        """Hand out lazy logits meanwhile: in training mode, or always, also where no gradient is wanted."""
        before = self._is_lazy, self._is_always
        self._is_lazy, self._is_always = True, always
        try:
            yield
        finally:
            self._is_lazy, self._is_always = before

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits, shape (..., vocab_size), of hidden states, shape (..., hidden); lazy ones look the same."""
        is_learning = self.training and torch.is_grad_enabled()
        if not (self._is_lazy and (self._is_always or is_learning)):
            return super().forward(input)
        return LazyLogits.of(_Joined.apply(input, self.weight, self.bias), self.weight, self.bias, ())


def install(model: Any) -> LeanHead | str:
    """Make the model's output embedding a `LeanHead`; return why not, in words, where that cannot be.

    Each call is undone by one of `uninstall`, so that several trainers may use one model, in any order.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, LeanHead):
        if type(head) is not torch.nn.Linear:
            return f"its output embedding is a {type(head).__name__}"
        # a hook of somebody's would be handed lazy logits
        if head._forward_hooks or head._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            return "its output embedding has hooks"
        head.__class__ = LeanHead
    lean = cast("LeanHead", head)
    lean._num_installed += 1  # pyright: ignore[reportPrivateUsage]
    return lean


def uninstall(model: Any) -> None:
    """Give the output embedding its own class back, once nobody needs the other one any more.

    A head that FSDP has sharded since then stays what FSDP made of it: a `LeanHead` that is not asked for lazy logits
    is a linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, LeanHead):
        return
    head._num_installed -= 1  # pyright: ignore[reportPrivateUsage]
    if head._num_installed <= 0 and type(head) is LeanHead:  # pyright: ignore[reportPrivateUsage]
        for name in ("_is_lazy", "_is_always", "_num_installed"):
            vars(head).pop(name, None)
        cast("Any", head).__class__ = torch.nn.Linear


class _Joined(torch.autograd.Function):
    """`_Joined` gives hidden states from which the head's weights can be reached, too, as from logits.

    DistributedDataParallel takes weights that it cannot reach from a model's outputs for unused, and a loss of one's
    own has the logits computed after that.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # the weights' gradients come from the loss, which is given them, too; here they are only reached
        return (*grad_outputs, None, None)


class LazyLogits(torch.Tensor):
    """`LazyLogits` stand for logits not computed. Their data are the hidden states, so autograd's edges are real."""

    _weight: torch.Tensor
    _bias: torch.Tensor | None
    _changes: tuple[Change, ...]
    _written: torch.Tensor | None = None
    _seen: tuple[torch.Tensor, int] | None = None
    """Logits of which somebody has a view, and their version when that was handed out: in-place changes count it."""

    @staticmethod
    def of(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, changes: tuple[Change, ...]
    ) -> LazyLogits:
        """Make logits of hidden states, with elementwise changes made to them in this order."""
        lazy = hidden.view_as(hidden).as_subclass(LazyLogits)
        lazy._weight, lazy._bias, lazy._changes = weight, bias, changes
        return lazy

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[Change, ...]]:
        """Return hidden states, weight, bias, changes."""
        with DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor), self._weight, self._bias, self._changes

    def computed(self) -> torch.Tensor:
        """Compute the logits; once something was written into them, or may be by a view, return the same again."""
        if self._written is not None:
            return self._written
        if self._seen is not None:
            return self._seen[0]
        hidden, weight, bias, changes = self.parts()
        logits = F.linear(hidden, weight, bias)
        for change in changes:
            logits = change(logits)
        return logits

    def is_written(self) -> bool:
        """Return whether something was written into the logits, or into a view of them."""
        return self._written is not None or (self._seen is not None and _version(self._seen[0]) != self._seen[1])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note elementwise changes; answer questions about the shape; compute the logits for all else."""
        kwargs = kwargs or {}
        lazy = args[0] if args else None
        if not isinstance(lazy, LazyLogits):
            return _with_real(func, args, kwargs)
        if _writes(func) or func == T.data.__get__:  # pyright: ignore
            lazy._written = lazy.computed()  # for whoever looks at these logits next
        if func in SHAPES:
            hidden, weight, _, _ = lazy.parts()
            shape = torch.Size([*hidden.shape[:-1], weight.shape[0]])
            return SHAPES[func](shape, *args[1:], **kwargs)
        about_the_graph = getattr(func, "__name__", "") in ABOUT_THE_GRAPH and func not in TURNED
        if lazy.is_written() and not about_the_graph:
            return _with_real(func, args, kwargs)
        # by numbers only: a tensor may be of the logits' shape, which a chunk of them would not fit
        if func in ELEMENTWISE and not any(isinstance(x, torch.Tensor) for x in (*args[1:], *kwargs.values())):
            hidden, weight, bias, changes = lazy.parts()
            return LazyLogits.of(hidden, weight, bias, (*changes, lambda logits: func(logits, *args[1:], **kwargs)))
        if func in CLONES:
            hidden, weight, bias, changes = lazy.parts()
            return LazyLogits.of(hidden.clone(), weight, bias, changes)
        if about_the_graph:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        logits = lazy.computed()
        given = _with_real(func, (logits, *args[1:]), kwargs)
        if _shares(given, logits):
            lazy._seen = lazy._seen or (logits, _version(logits))
        return given


def _version(logits: torch.Tensor) -> int:
    """Return how often a tensor, or any view of it, was changed in place; nobody counts it in inference mode."""
    return 0 if logits.is_inference() else logits._version


def _shares(given: Any, logits: torch.Tensor) -> bool:
    """Return whether something that a function of torch gave has logits' memory in it: a view of them."""
    if isinstance(given, torch.Tensor):
        return given.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    return isinstance(given, list | tuple) and any(_shares(one, logits) for one in cast("Sequence[Any]", given))


def _writes(func: Any) -> bool:
    """Return whether a function of torch changes its first argument in place, as `x[0] = 1`, `x.add_(1)`, `x += 1`."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "retain_grad_")
    return in_place or name in WRITING


def as_written(logits: torch.Tensor) -> torch.Tensor:
    """Return logits, computed ones in the place of lazy ones that something was written into."""
    if isinstance(logits, LazyLogits) and logits.is_written():
        return logits.computed()
    return logits


def _size(shape: torch.Size, dim: int | None = None) -> Any:
    return shape if dim is None else shape[dim]


T = torch.Tensor
SHAPES: dict[Any, Callable[..., Any]] = {
    T.shape.__get__: lambda shape: shape,  # pyright: ignore
    T.size: _size,
    T.numel: lambda shape: shape.numel(),
    T.dim: lambda shape: len(shape),
    T.ndim.__get__: lambda shape: len(shape),  # pyright: ignore
}
ELEMENTWISE = {
    T.__truediv__,
    T.div,
    torch.div,
    T.__mul__,
    T.__rmul__,
    T.mul,
    torch.mul,
    T.tanh,
    torch.tanh,
    T.float,
    T.to,
}
WRITING = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
CLONES = {T.clone, torch.clone}
"""Asked for by DistributedDataParallel of what a model gives, where some weights may be unused."""
ABOUT_THE_GRAPH = {"__get__", "__set__", "register_hook", "is_floating_point", "is_complex", "__repr__", "type"}
"""Attributes (device, dtype, requires_grad, grad_fn) and what wrappers of the model ask of any output."""
TURNED = {
    T.T.__get__,  # pyright: ignore
    T.mT.__get__,  # pyright: ignore
    T.H.__get__,  # pyright: ignore
    T.mH.__get__,  # pyright: ignore
    T.data.__get__,  # pyright: ignore
}
"""Attributes, too, but of what is in the logits."""


def _with_real(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function with computed logits in the place of lazy ones: slower, the same."""
    logger.warning("All logits are computed, because the model or a wrapper calls %s on them.", func.__name__)
    return func(*_computed(args), **_computed(kwargs))


def _computed(value: Any) -> Any:
    """Return the same, with all lazy logits in it computed."""
    if isinstance(value, LazyLogits):
        return value.computed()
    if isinstance(value, dict):
        return {name: _computed(item) for name, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        items = [_computed(item) for item in cast("Sequence[Any]", value)]
        return items if isinstance(value, list) else tuple(items)
    return value
