"""Hooks make rotary tables follow each sample, where transformers' would follow the longest of a forward pass.

Under LongRoPE (arXiv:2402.13753; Phi-3 and Phi-4 with 128K) long samples are rotated by another table than short ones.
Transformers takes one table for a whole forward pass, by its largest position. A pass of a plan holds several samples,
or a part of one: here every sample gets the table it has when it is alone.

A dynamic NTK table grows with the longest sample so far, and stays until a short one comes: beyond the length where it
starts to grow, what a sample learns depends on those before it, under stock Trainer, too. So there is a longest sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from hf_hetero.attention.context import AttentionContext


def problems(model: torch.nn.Module) -> Iterator[str]:
    """Yield, in words, the tables that cannot be made to follow each sample."""
    for name, _, kinds in _tables(model):
        if "longrope" in kinds.values() and any(part.isdigit() for part in name.split(".")):
            yield (
                f"its rotary table {name} (rope_type 'longrope') follows the longest sample of a forward pass, and is "
                "made inside a layer, where it cannot be told which sample a token is of; set another rope_type."
            )


def longest_exact(model: torch.nn.Module) -> tuple[int, str] | None:
    """Return the tokens of the longest sample whose table depends on no other sample, and the rope_type; None: any."""
    limits = [
        (int(cast("Any", module).original_max_seq_len), kind)
        for _, module, kinds in _tables(model)
        for kind in kinds.values()
        if "dynamic" in kind
    ]
    return min(limits, default=None)


def _tables(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, dict[str | None, str]]]:
    """Yield modules that make rotary tables: name, module, and rope_type for each type of layer, or for all (None)."""
    for name, module in model.named_modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            yield name, module, {None: kinds}
        elif isinstance(kinds, dict):
            yield name, module, cast("dict[str | None, str]", kinds)


class TablesBySample:
    """`TablesBySample` has a model's LongRoPE tables follow each sample of a plan. Without a plan it does nothing.

    Args:
        model: of transformers. The modules that call its tables are given the context among their keywords, as all of
            its layers are.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._context: AttentionContext | None = None
        self._handles: list[RemovableHandle] = []
        mine: Any = self  # torch's types do not see that a decorated function is still a method
        for name, module, kinds in _tables(model):
            if "longrope" in kinds.values():
                caller = model.get_submodule(name.rpartition(".")[0])
                self._handles += [
                    caller.register_forward_pre_hook(mine._enter, with_kwargs=True),
                    # after an error, too: the context must not outlive its pass
                    caller.register_forward_hook(mine._leave, always_call=True),
                    module.register_forward_hook(mine._by_sample, with_kwargs=True),
                ]

    def remove(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()

    @torch.compiler.disable
    def _enter(self, caller: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._context = kwargs.get("hetero")

    @torch.compiler.disable
    def _leave(self, caller: torch.nn.Module, args: Any, output: Any) -> None:
        self._context = None

    @torch.compiler.disable
    def _by_sample(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return the module's output for each token: one table, or a tuple; the n tokens are the dim before the last.

        None leaves the output as it is.
        """
        if self._context is None:
            return None
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        layer_type = call.arguments.get("layer_type")
        if (module.rope_type if layer_type is None else module.rope_type[layer_type]) != "longrope":
            return None
        rope: Any = module.config.rope_parameters
        switch = int((rope if layer_type is None else rope[layer_type])["original_max_position_embeddings"])
        positions = call.arguments["position_ids"]
        is_long = _in_long_samples(self._context, switch, positions)
        if is_long is None:
            return None

        def tables(of: torch.Tensor) -> tuple[torch.Tensor, ...]:
            call.arguments["position_ids"] = of
            # not a call of the module, whose hook is this function
            table = module.forward(*call.args, **call.kwargs)
            return table if isinstance(output, tuple) else (table,)

        # one position more, of a token that is not there, tells that the sample is long
        beyond = positions.new_full((*positions.shape[:-1], 1), switch)
        long = tables(torch.cat([positions, beyond], dim=-1))
        # without the positions of long samples, nothing tells that any is long
        short = tables(positions.where(~is_long, 0))
        chosen = tuple(torch.where(is_long[:, None], a[..., :-1, :], b) for a, b in zip(long, short, strict=True))
        return chosen if isinstance(output, tuple) else chosen[0]


def _in_long_samples(context: AttentionContext, switch: int, positions: torch.Tensor) -> torch.Tensor | None:
    """Tell for each token of this rank whether its sample reaches beyond position `switch`; None if none does.

    A sample counts as a whole, other ranks' tokens of it, too: its ranks must all take the same table.
    """
    if all(reach <= switch for reach in context.reaches):
        return None

    def make() -> torch.Tensor:
        spans = context.layout.spans[context.group_rank]
        is_long = torch.zeros(positions.shape[-1], dtype=torch.bool)  # a token that stands in at the end is short
        start = 0
        for span, reach in zip(spans, context.reaches, strict=True):
            is_long[start : start + span.num_tokens] = reach > switch
            start += span.num_tokens
        return is_long.to(positions.device)

    return context.shared(("long samples", switch), make)
