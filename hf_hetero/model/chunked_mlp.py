"""An MLP goes a few tokens at a time, forward and backward, where its layer is computed again in backward.

Layers that are recomputed keep next to nothing, so that what a rank can hold is soon decided by the one layer that is
whole at a time, and of that by the MLP: its inner tensors are several times as wide as a hidden state. A token's MLP
depends on that token only. So forward keeps nothing but the MLP's input, and backward computes inner tensors and their
gradients chunk by chunk (StreamBP, arXiv:2506.03077; TiledMLP of ALST, arXiv:2506.13996).

The recompute of a layer ends when the last tensor that it saved is there again. That is the MLP's input, saved by a
node of its own before the MLP (`_Save`). So with non-reentrant checkpointing the MLP is computed twice, as it would be
without chunks, not three times.

An MLP is given another class for a micro-batch, as FSDP2 gives one for good to the modules it shards: names, weights
and hooks stay, and afterwards nothing is left of it.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_BYTES = 1 << 28
"""Inner tensors of a chunk."""
INNER_TENSORS = 4
"""Of a gated MLP: gate, up, the activated gate, and their product."""


class ChunkedMLP(torch.nn.Module):
    """A `ChunkedMLP` is an MLP while it goes chunk by chunk: of a class of `chunked_class`, with its own weights."""

    chunk_bytes: int = CHUNK_BYTES

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the MLP; shape (..., hidden) in and out."""
        if len(args) != 1 or kwargs or not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        [x], saved_at = args, _SavedAt()
        return _InChunks.apply(_Save.apply(x, saved_at) if x.requires_grad else x, saved_at, self, *self.parameters())


def chunked_class(layer: torch.nn.Module) -> type[ChunkedMLP] | None:
    """Make the class that a layer's MLP is to have while it goes chunk by chunk; its own one is its base.

    None where there is no MLP, or it is not known that each token's is its own.
    """
    mlp: Any = getattr(layer, "mlp", None)
    if not isinstance(mlp, torch.nn.Module) or not type(mlp).__name__.endswith("MLP") or not _is_by_token(mlp):
        return None
    if isinstance(mlp, ChunkedMLP):
        return type(mlp)
    return type(f"Chunked{type(mlp).__name__}", (ChunkedMLP, type(mlp)), {})


def is_hooked(mlp: torch.nn.Module) -> bool:
    """Return whether somebody's hooks hang on an MLP's weights or parts, which would be called for each chunk, too."""
    hooks: list[Any] = [p._backward_hooks for p in mlp.parameters()]  # pyright: ignore[reportPrivateUsage]
    for part in mlp.modules():
        if part is not mlp:  # those of the MLP itself are called by whoever calls it
            names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            hooks += [vars(part)[name] for name in names]
    return any(hooks)


def widest_inner(mlp: torch.nn.Module) -> int:
    """Return the width of an MLP's inner tensors."""
    return max((m.out_features for m in mlp.modules() if isinstance(m, torch.nn.Linear)), default=1)


def _is_by_token(mlp: torch.nn.Module) -> bool:
    """Return whether it is made of linear layers and what has no weights and draws no random numbers.

    Such a random number would be another one when a chunk is computed again.
    """
    leaves = [m for m in mlp.modules() if not list(m.children())]
    return all(
        isinstance(m, torch.nn.Linear)
        or not (list(m.parameters(recurse=False)) or (isinstance(m, torch.nn.Dropout) and m.p > 0))
        for m in leaves
    )


class _SavedAt:
    """`_SavedAt` names the node that saved the MLP's input: the MLP's own node reads it there, or else saves it."""

    node: Any = None


class _Save(torch.autograd.Function):
    """`_Save` is the identity, which saves its input for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, saved_at: _SavedAt) -> torch.Tensor:
        ctx.save_for_backward(x)
        saved_at.node = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


class _InChunks(torch.autograd.Function):
    """`_InChunks` computes the MLP and saves nothing of it; backward has its gradients from its input, by chunks."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, saved_at: _SavedAt, mlp: ChunkedMLP, *params: torch.nn.Parameter
    ) -> torch.Tensor:
        ctx.saved_at, ctx.mlp, ctx.params = saved_at, mlp, params
        if saved_at.node is None:  # nothing before it gets a gradient
            ctx.save_for_backward(x)
        # backward runs outside of the forward pass's autocast, and the second computation must be as the first
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        chunks = [_whole(mlp, chunk) for chunk in _rows(x).split(_chunk_tokens(x, mlp))]
        return torch.cat(chunks).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        [x] = (ctx.saved_at.node or ctx).saved_tensors
        mlp, size = ctx.mlp, _chunk_tokens(x, ctx.mlp)
        needed = [p for p in ctx.params if p.requires_grad]
        # chunks are added up in fp32: in bf16 a sum of many would lose what one product keeps
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in needed]
        device, dtype, enabled = ctx.autocast
        # the MLP's parameters are inputs of this node, so what hangs on their gradients, as DDP's exchange does, runs
        # once, with the sum, and not once a chunk
        of_x: list[torch.Tensor] = []
        for chunk, gradient in zip(_rows(x).split(size), _rows(grad_outputs[0]).split(size), strict=True):
            leaf = chunk.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                out = _whole(mlp, leaf)
            inputs = [leaf, *needed] if ctx.needs_input_grad[0] else needed
            grads = list(torch.autograd.grad(out, inputs, gradient))
            if ctx.needs_input_grad[0]:
                of_x.append(grads.pop(0))
            for total, part in zip(sums, grads, strict=True):
                total += part
        by_param = dict(zip(map(id, needed), sums, strict=True))
        of_params = [None if id(p) not in by_param else by_param[id(p)].to(p.dtype) for p in ctx.params]
        return (torch.cat(of_x).view(x.shape) if of_x else None, None, None, *of_params)


def _whole(mlp: ChunkedMLP, x: torch.Tensor) -> torch.Tensor:
    return super(ChunkedMLP, mlp).forward(x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _chunk_tokens(x: torch.Tensor, mlp: ChunkedMLP) -> int:
    return max(1, mlp.chunk_bytes // (INNER_TENSORS * x.element_size() * widest_inner(mlp)))
