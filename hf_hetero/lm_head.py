"""The loss without the logits: computed chunk by chunk, gradients in the forward pass, only where there is a target.

The logits of a micro-batch are often its largest tensor: 8192 tokens of a 128K vocabulary are 4 GiB in fp32, and the
loss holds three of them. So in planned training the model's output embedding, a `LeanHead`, hands out `LazyLogits`:
what logits would come from, and what the model does to them (scaling, a soft cap). `token_loss` computes loss and
gradients from those, for a few tokens at a time. Whatever else is done to lazy logits has them computed: slower, the
same.

The idea of gradients in the forward pass is that of Cut Cross-Entropy (arXiv:2411.09009) and Liger (arXiv:2410.10989).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch._C import DisableTorchFunctionSubclass
from torch.nn import functional as F

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 29
"""Logits of a chunk, in fp32. Adding to the head's gradient, once a chunk, should be little beside computing it."""

Change = Callable[[torch.Tensor], torch.Tensor]


class LeanHead(torch.nn.Linear):
    """A model's output embedding while its logits may be lazy: the same module, given another class (as `ChunkedMLP`).

    Whoever else holds on to the module, FSDP for one, notices nothing, before or after.
    """

    _is_lazy: bool = False
    _num_installed: int = 0

    @contextmanager
    def lazy(self) -> Iterator[None]:
        """Hand out lazy logits meanwhile, in training mode."""
        before, self._is_lazy = self._is_lazy, True
        try:
            yield
        finally:
            self._is_lazy = before

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Logits, shape (..., vocab_size), of hidden states, shape (..., hidden)."""
        if not (self._is_lazy and self.training and torch.is_grad_enabled()):
            return super().forward(input)
        return LazyLogits.of(_Joined.apply(input, self.weight, self.bias), self.weight, self.bias, ())


def install(model: Any) -> LeanHead | str:
    """Make the model's output embedding a `LeanHead`; why not, in words, where that cannot be.

    Each call is undone by one of `uninstall`, so that several trainers may use one model, in any order.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, LeanHead):
        if type(head) is not torch.nn.Linear:
            return f"its output embedding is a {type(head).__name__}"
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
        vars(head).pop("_is_lazy", None)
        vars(head).pop("_num_installed", None)
        cast("Any", head).__class__ = torch.nn.Linear


class _Joined(torch.autograd.Function):
    """Hidden states from which the head's weights can be reached, too, as from logits.

    DistributedDataParallel takes weights that it cannot reach from a model's outputs for unused, and a loss of one's
    own has the logits computed after that.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*grad_outputs, None, None)


class LazyLogits(torch.Tensor):
    """Stands for logits that were not computed. Its data are the hidden states, so that autograd's edges are real."""

    _weight: torch.Tensor
    _bias: torch.Tensor | None
    _changes: tuple[Change, ...]

    @staticmethod
    def of(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, changes: tuple[Change, ...]
    ) -> LazyLogits:
        """Logits of hidden states, with elementwise changes made to them in this order."""
        lazy = hidden.view_as(hidden).as_subclass(LazyLogits)
        lazy._weight, lazy._bias, lazy._changes = weight, bias, changes
        return lazy

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[Change, ...]]:
        """Hidden states, weight, bias, changes."""
        with DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor), self._weight, self._bias, self._changes

    def computed(self) -> torch.Tensor:
        """The logits."""
        hidden, weight, bias, changes = self.parts()
        logits = F.linear(hidden, weight, bias)
        for change in changes:
            logits = change(logits)
        return logits

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note elementwise changes; answer questions about the shape; compute the logits for all else."""
        kwargs = kwargs or {}
        lazy = args[0] if args else None
        if not isinstance(lazy, LazyLogits):
            return _with_real(func, args, kwargs)
        if func in SHAPES:
            hidden, weight, _, _ = lazy.parts()
            shape = torch.Size([*hidden.shape[:-1], weight.shape[0]])
            return SHAPES[func](shape, *args[1:], **kwargs)
        if func in ELEMENTWISE and not any(isinstance(x, torch.Tensor) for x in (*args[1:], *kwargs.values())):
            hidden, weight, bias, changes = lazy.parts()
            return LazyLogits.of(hidden, weight, bias, (*changes, lambda logits: func(logits, *args[1:], **kwargs)))
        if func in CLONES:
            hidden, weight, bias, changes = lazy.parts()
            return LazyLogits.of(hidden.clone(), weight, bias, changes)
        if getattr(func, "__name__", "") in ABOUT_THE_GRAPH:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _with_real(func, args, kwargs)


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
CLONES = {T.clone, torch.clone}
"""Asked for by DistributedDataParallel of what a model gives, where some weights may be unused."""
ABOUT_THE_GRAPH = {"__get__", "__set__", "register_hook", "is_floating_point", "is_complex", "__repr__", "type"}
"""Attributes (device, dtype, requires_grad, grad_fn) and what wrappers of the model ask of any output."""


def _with_real(func: Any, args: Any, kwargs: Any) -> Any:
    logger.warning("All logits are computed, because the model or a wrapper calls %s on them.", func.__name__)
    return func(*_computed(args), **_computed(kwargs))


def _computed(value: Any) -> Any:
    """The same, with all lazy logits in it computed."""
    if isinstance(value, LazyLogits):
        return value.computed()
    if isinstance(value, dict):
        return {name: _computed(item) for name, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        items = [_computed(item) for item in cast("Sequence[Any]", value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def loss_sum(logits: LazyLogits, targets: torch.Tensor, ignore_index: int, chunk_bytes: int = CHUNK_BYTES) -> Any:
    """Sum of the cross-entropies, as a scalar in at least fp32.

    Args:
        logits: of all tokens; in any shape (..., vocab_size).
        targets: as many, in order; `ignore_index` where there is none.
        ignore_index: the label of a token without a target.
        chunk_bytes: most bytes of a chunk's logits in fp32.
    """
    hidden, weight, bias, changes = logits.parts()
    return _ChunkedLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), ignore_index, changes, chunk_bytes
    )


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are made beside the loss, for a gradient of 1, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        ignore_index: int,
        changes: tuple[Change, ...],
        chunk_bytes: int,
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        exact = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        positions = (targets != ignore_index).nonzero().squeeze(1)  # waits for the device, once a micro-batch
        with torch.autocast(kind, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            total = torch.zeros((), dtype=exact, device=hidden.device)
            of_hidden = torch.zeros_like(hidden) if needs_hidden else None
            # one chunk is added to another in fp32: in bf16 a long sum would lose what a single product keeps
            of_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
            of_bias = torch.zeros_like(bias, dtype=exact) if needs_bias and bias is not None else None
            for chunk in positions.split(max(1, chunk_bytes // (4 * weight.shape[0]))):
                h = hidden[chunk].to(dtype)
                loss, gradient = _chunk(F.linear(h, w, b), targets[chunk], changes, exact)
                total += loss
                if of_hidden is not None:
                    of_hidden[chunk] = (gradient @ w).to(hidden.dtype)
                if of_weight is not None:
                    of_weight += gradient.T @ h
                if of_bias is not None:
                    of_bias += gradient.sum(0, dtype=exact)
        ctx.gradients = ((of_hidden, hidden.dtype), (of_weight, weight.dtype), (of_bias, weight.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        [scale] = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if g is None else g.to(scale.dtype).mul_(scale).to(dtype) for g, dtype in gradients)
        return (*scaled, None, None, None, None)


def _chunk(
    logits: torch.Tensor, targets: torch.Tensor, changes: tuple[Change, ...], exact: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a chunk, and its gradient by the logits as the head gave them."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_(bool(changes))
        changed = leaf
        for change in changes:
            changed = change(changed)
    log_softmax = F.log_softmax(changed.detach().to(exact), dim=-1)
    at_targets = targets.unsqueeze(1)
    loss = -log_softmax.gather(1, at_targets).sum()
    gradient = log_softmax.exp_().scatter_add_(1, at_targets, -torch.ones_like(at_targets, dtype=exact))
    gradient = gradient.to(changed.dtype)
    if changes:
        [gradient] = torch.autograd.grad(changed, leaf, gradient)
    return loss, gradient
