"""A planned mixer goes over each sample by itself, whichever ranks of a group hold the sample's tokens.

Mixers of transformers keep packed samples apart only with packages that have kernels for it (`packs`). Called once a
sample they need none. A rank fetches the tokens that its own depend on, hidden states of the layer, and goes over them
as well: what it computes for tokens that it does not hold is left out.

Why the gradients are exact. Each rank sends back through the mixer the gradient of its own outputs, and every output
is one rank's own. A mixer's gradients, of its weights and of what goes in, are sums over outputs. So summed over the
ranks, as data parallelism does for weights and the exchange for hidden states, they are those of the whole sample.
Nothing is scaled.

A mixer is given another class for a micro-batch (`model.chunked_mlp` does the same to MLPs): names, weights and hooks
stay, and afterwards nothing is left of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from hf_hetero.attention.context import AttentionContext, Place
from hf_hetero.attention.traffic import all_to_all
from hf_hetero.model.activations import set_until
from hf_hetero.state_layers.by_heads import HeadRuns, NormOverRanks, head_runs_of, mixed_by_heads
from hf_hetero.state_layers.cuts import cut_of, has_one_group, part_of
from hf_hetero.state_layers.families import mixers_of, window_of
from hf_hetero.state_layers.packs import BORDERS, OF_MODELS, Packs, borders_of, spread_of
from hf_hetero.state_layers.runs import Runs, runs_of

Over = Callable[..., torch.Tensor]
"""A mixer's forward, rows of samples and the tokens of each -> outputs of these rows. With `exchanges`, forward has
some with other ranks."""
CACHES = ("cache_params", "past_key_values", "past_key_value")
"""What mixers call the state of an earlier call."""
NOT_OF_A_CALL = {"hetero", OF_MODELS, *BORDERS}
"""Keywords that mixers hand on, and that each call has anew, or has not."""


class PlannedMixer(torch.nn.Module):
    """A `PlannedMixer` is a mixer during a micro-batch of a plan.

    Attributes:
        hetero_context: the micro-batch.
        hetero_packs: which kinds go over a pack at once.
    """

    hetero_context: AttentionContext
    hetero_packs: Packs

    @torch.compiler.disable  # a compiler does not see through messages between ranks
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the mixer's output, or a tuple that begins with it; shape (1, n, hidden) in and out.

        A call with tensors of another shape is none of the plan, and goes the stock way.

        Raises:
            CollectiveFailed: the exchange failed or waited longer than the group's timeout.
        """
        context = self.hetero_context
        call = inspect.signature(super().forward).bind(*args, **kwargs)
        name = next(iter(call.arguments))
        hidden: torch.Tensor = call.arguments[name]
        # more rows than tokens: of a rank without tokens, and of a loss that shifts labels itself
        stand_ins = hidden.shape[1] - context.num_tokens
        if hidden.shape[0] != 1 or stand_ins not in (0, 1):
            return super().forward(*args, **kwargs)
        layer = getattr(self, "layer_idx", None)
        if layer is not None:
            context.reached.add(layer)
        others: list[tuple[Any, ...]] = []

        kind = type(self).__bases__[1]

        def called(
            forward: Callable[..., Any], rows: torch.Tensor, lengths: tuple[int, ...], gap: int = 0
        ) -> torch.Tensor:
            keywords = _borders(kind, lengths, gap, context) if len(lengths) > 1 else {}
            _call_for(call, name, rows.unsqueeze(0), lengths, keywords)
            output = forward(*call.args, **call.kwargs)
            first, *rest = output if isinstance(output, tuple) else (output,)
            others[:] = [tuple(rest)]
            return first[0]

        def over(
            forward: Callable[..., Any], rows: torch.Tensor, lengths: Sequence[int], exchanges: bool = False
        ) -> torch.Tensor:
            def each() -> torch.Tensor:
                return torch.cat([called(forward, sample, (len(sample),)) for sample in rows.split(list(lengths))])

            def at_once(gap: int) -> torch.Tensor:
                if gap == 0:
                    return called(forward, rows, tuple(lengths))
                places = _spread(tuple(lengths), gap, context)
                spread = rows.new_zeros(len(rows) + gap * len(lengths), rows.shape[1]).index_copy(0, places, rows)
                return called(forward, spread, tuple(length + gap for length in lengths), gap)[places]

            # all ranks of a group must exchange as often, and a rank finds out by itself what keeps samples apart
            if len(lengths) == 1 or exchanges:
                return each()
            return self.hetero_packs.computed(self, kind, at_once, each)

        out = self._mixed(hidden[0], stand_ins, context.at(layer or 0), over).unsqueeze(0)
        return (out, *others[0]) if others[0] else out

    def _mixed(self, hidden: torch.Tensor, stand_ins: int, place: Place, over: Over) -> torch.Tensor:
        """Return the outputs of this rank's rows, shape (n, hidden) in and out."""
        context = place.context
        layout, me = context.layout, context.group_rank
        cut = cut_of(self, layout.degree) if layout.is_cut else None
        if cut is not None:
            head_runs: HeadRuns = context.shared(
                ("state layer by heads", stand_ins), lambda: head_runs_of(layout, me, stand_ins, context.device)
            )
            part = part_of(self, type(self).__bases__[1], cut, me, layout.degree)
            if has_one_group(self, cut):
                part.norm = NormOverRanks(part.norm, place)
                part.training = False  # while training, a kernel would compute the norm as well, of the part alone
            of_part = partial(over, part, exchanges=has_one_group(self, cut))
            return mixed_by_heads(hidden, head_runs, place, partial(over, super().forward), of_part)
        window = window_of(self)
        runs: Runs = context.shared(
            ("state layer", window, stand_ins), lambda: runs_of(layout, me, window, stand_ins, context.device)
        )
        rows = _fetched(hidden, runs, place)
        rows = rows if runs.order is None else rows[runs.order]
        out = over(super().forward, rows, runs.lengths)
        return out if runs.kept is None else out[runs.kept]


def _fetched(hidden: torch.Tensor, runs: Runs, place: Place) -> torch.Tensor:
    """Return this rank's rows, those of others that it needs, and those that stand in.

    Args:
        hidden: shape (n, hidden).
        runs: say what travels.
        place: the layer.
    """
    context = place.context
    if not context.layout.is_cut:  # the same on all ranks, which see the same layout
        return hidden
    num, width = context.num_tokens, hidden.shape[1]
    arrived = all_to_all(
        hidden[runs.send_rows].reshape(-1),
        [width * rows for rows in runs.num_sent],
        [width * rows for rows in runs.num_received],
        context.peers,
        "all-to-all of hidden states",
        place,
    ).view(-1, width)
    # what arrived takes part even where it is nothing, so that every rank joins the exchange of gradients
    return torch.cat([hidden[:num], arrived, hidden[num:]])


def _borders(kind: type, lengths: tuple[int, ...], gap: int, context: AttentionContext) -> dict[str, torch.Tensor]:
    """Return the keywords that say where samples begin; layers of one kind share them."""
    return context.shared(("borders", kind, lengths, gap), lambda: borders_of(kind, lengths, gap, context.device))


def _spread(lengths: tuple[int, ...], gap: int, context: AttentionContext) -> torch.Tensor:
    """Return where each row lies once there is a gap after each sample; layers share it."""
    return context.shared(("gaps", lengths, gap), lambda: spread_of(lengths, gap, context.device))


def _call_for(
    call: inspect.BoundArguments,
    name: str,
    rows: torch.Tensor,
    lengths: tuple[int, ...],
    keywords: dict[str, torch.Tensor],
) -> None:
    """Change a call of a mixer, which spoke of a rank's tokens, into one for some samples, shape (1, n, hidden)."""
    arguments = call.arguments
    arguments[name] = rows
    for missing in ("attention_mask", *CACHES):
        if missing in arguments:
            arguments[missing] = None
    if "use_cache" in arguments:
        arguments["use_cache"] = False
    if "position_ids" in arguments:
        positions = [torch.arange(length, device=rows.device) for length in lengths]
        arguments["position_ids"] = torch.cat(positions).unsqueeze(0)
    others = call.signature.parameters[list(call.signature.parameters)[-1]]
    if others.kind is inspect.Parameter.VAR_KEYWORD and (others.name in arguments or keywords):
        kept = {key: x for key, x in arguments.get(others.name, {}).items() if key not in NOT_OF_A_CALL}
        arguments[others.name] = {**kept, **keywords}


class StateLayers:
    """`StateLayers` are the layers of a model that carry state along a sample.

    Args:
        model: of transformers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._mixers = list(mixers_of(model))
        self._classes: dict[type, type] = {}
        self._packs = Packs()

    def __len__(self) -> int:
        return len(self._mixers)

    @contextmanager
    def planned(self, context: AttentionContext) -> Iterator[None]:
        """Let mixers go over the samples of a micro-batch, in its forward pass and in its backward pass.

        In backward, because layers that are recomputed must do what they did.
        """
        with ExitStack() as undone:
            for mixer in self._mixers:
                set_until(undone, mixer, "hetero_context", context)
                set_until(undone, mixer, "hetero_packs", self._packs)
                set_until(undone, mixer, "__class__", self._planned_class(type(mixer)))
            yield

    def _planned_class(self, kind: type) -> type:
        """Return the class that mixers of a kind have meanwhile; the same each time, so that nothing compiles anew."""
        if issubclass(kind, PlannedMixer):  # within another micro-batch, whose context this one hides
            return kind
        if kind not in self._classes:
            self._classes[kind] = type(f"Planned{kind.__name__}", (PlannedMixer, kind), {})
        return self._classes[kind]
