"""A backbone goes over whole samples, one after the other, whichever ranks hold their tokens.

Some models attend in a way of their own: past transformers' attention interface, with biases by distance, a learned
mask, tokens that are chosen or compressed. No method of this package brings their queries and keys together. So each
rank that holds a token of a sample runs the backbone, which is all of the model but its head, on the whole sample, as a
plain Trainer does with a batch of one, and takes the hidden states of its own tokens. Tokens of other ranks are fetched
first; they are numbers, and have no gradient.

Why the gradients are exact. Each rank sends back the gradient of its own tokens' hidden states, and every token is one
rank's own. A backbone's gradients are sums over its outputs. So summed over the ranks, as data parallelism does, they
are those of the whole sample. Nothing is scaled.

Ranks that share a sample so all do its work, so it is not planned unless `HeteroConfig.max_degree` asks for it.

Under FSDP2 each call of a layer gathers its weights from all ranks, and each backward pass of it adds up its gradients
over them. So there all ranks go through the layers as often as the one with the most samples: what a rank lacks are
passes of one token, of whose outputs nothing is learned (`passing_together`). Each pass is of the same layers in the
same order, in forward, and the other way in backward, so all ranks come to the same exchanges.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.traffic import all_to_all
from hf_hetero.layout import layout_of
from hf_hetero.manners.outside_loss import OF_LOSS
from hf_hetero.model.activations import set_until
from hf_hetero.state_layers.by_heads import HeadRuns, head_runs_of
from hf_hetero.step import RankMicroBatch, StepBatch

NOT_OF_SAMPLES = frozenset({"hetero", "attention_mask", "past_key_values", "cache_params", "state", *OF_LOSS})
"""Keywords that speak of the pack, or of other calls."""


class WholeBackbone(torch.nn.Module):
    """A `WholeBackbone` is a backbone during a micro-batch of a plan.

    Attributes:
        hetero_context: the micro-batch.
    """

    hetero_context: AttentionContext

    @torch.compiler.disable  # a compiler does not see through messages between ranks
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the backbone's output with the hidden states of this rank's tokens, shape (1, n, hidden), first.

        A call with tensors of another shape is none of the plan, and goes the stock way.

        Raises:
            CollectiveFailed: the exchange failed or waited longer than the group's timeout.
        """
        context = self.hetero_context
        given, known = _given(super().forward, args, kwargs)
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        stand_ins = -1 if tokens is None else tokens.shape[1] - context.num_tokens
        # more rows than tokens: of a rank without tokens, and of a loss that shifts labels itself
        if tokens is None or tokens.shape[0] != 1 or stand_ins not in (0, 1):
            return super().forward(*args, **kwargs)
        context.reached.add(0)
        of_tokens = {
            name: value
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and value.shape[:2] == tokens.shape[:2] and name not in NOT_OF_SAMPLES
        }
        if "position_ids" not in known:
            of_tokens.pop("position_ids", None)
        rest = {name: x for name, x in given.items() if name not in of_tokens and name not in NOT_OF_SAMPLES}
        rest.pop("position_ids", None)
        if "use_cache" in known:
            rest["use_cache"] = False
        samples, used = _samples(of_tokens, stand_ins, context)
        hidden: dict[int | None, torch.Tensor] = {}
        output: Any = None
        for _ in range(context.num_passes - len(samples)):
            output = super().forward(**{name: values[:, :1] for name, values in of_tokens.items()}, **rest)
            used = used + 0 * output[0][0, 0, 0]  # of one number, because a sum may be too large for a half type
        for number, sample in samples.items():
            output = super().forward(**sample, **rest)
            hidden[number] = output[0][0]
        spans = context.layout.spans[context.group_rank]
        own = [hidden[span.sample][span.start : span.end] for span in spans]
        own += [hidden[None]] if stand_ins else []
        return _with_first(output, (torch.cat(own) + used).unsqueeze(0))


def _given(forward: Any, args: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the arguments of a call by name, and the names that its function knows."""
    call = inspect.signature(forward).bind(*args, **kwargs)
    given = dict(call.arguments)
    for parameter in call.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given, frozenset(call.signature.parameters)


def _samples(
    of_tokens: Mapping[str, torch.Tensor], stand_ins: int, context: AttentionContext
) -> tuple[dict[int | None, dict[str, torch.Tensor]], torch.Tensor]:
    """Put the samples together of which this rank holds tokens.

    Args:
        of_tokens: name -> this rank's rows, shape (1, n, ...).
        stand_ins: rows after this rank's tokens that belong to no sample; they are a sample of their own, None.
        context: the micro-batch.

    Returns:
        Sample -> name -> its rows, shape (1, tokens, ...). And a zero, by which a rank that holds no token of a
        sample takes part in the exchange of gradients, where others' rows have some.
    """
    layout, me = context.layout, context.group_rank
    found: dict[int | None, dict[str, torch.Tensor]] = {}
    used = torch.zeros((), device=context.device, dtype=torch.get_default_dtype())
    own = {span.sample for span in layout.spans[me]}
    runs: HeadRuns = context.shared(
        ("whole samples", stand_ins), lambda: head_runs_of(layout, me, stand_ins, context.device)
    )
    whole = [s.sample for s in layout.spans[me] if s.num_tokens == layout.lengths[s.sample]]
    cut = sorted({s.sample for spans in layout.spans for s in spans if s.num_tokens < layout.lengths[s.sample]})
    for name, values in of_tokens.items():
        rows = values[0]
        ends = [*whole, *([None] if stand_ins else [])]
        for sample, part in zip(ends, rows[runs.whole_rows].split(list(runs.whole_lengths)), strict=True):
            found.setdefault(sample, {})[name] = part.unsqueeze(0)
        if not layout.is_cut:  # the same on all ranks, which see the same layout
            continue
        gathered = _gathered(rows, runs, name, context)
        if gathered.requires_grad:
            used = used.to(gathered.dtype) + 0 * gathered.sum()
        for sample, part in zip(cut, gathered.split(list(runs.lengths)), strict=True):
            if sample in own:
                found.setdefault(sample, {})[name] = part.unsqueeze(0)
    return found, used


def _gathered(rows: torch.Tensor, runs: HeadRuns, name: str, context: AttentionContext) -> torch.Tensor:
    """Return the rows of all samples that are cut, one sample after the other, on all ranks that share them."""
    place, me = context.at(0), context.group_rank
    mine = rows[runs.cut_rows]
    width = mine[:1].numel() if len(mine) else max(1, rows[:1].numel())
    others = len(runs.num_rows) - 1
    to_each = [0 if rank == me else width * runs.num_rows[me] for rank in range(others + 1)]
    of_each = [0 if rank == me else width * num for rank, num in enumerate(runs.num_rows)]
    copies = mine.reshape(-1).repeat(others)
    arrived = all_to_all(copies, to_each, of_each, context.peers, f"all-to-all of {name}", place)
    arrived = arrived.view(-1, *rows.shape[1:])
    before = sum(runs.num_rows[:me])
    return torch.cat([arrived[:before], mine, arrived[before:]])[runs.order]


def _with_first(output: Any, hidden: torch.Tensor) -> Any:
    """Return a backbone's output with other hidden states, and without what it has of single samples."""
    names: Any = getattr(output, "keys", None)
    if names is None:
        return (hidden, *[None] * (len(output) - 1))
    return type(output)(**{next(iter(names())): hidden})


class WholeSamples:
    """`WholeSamples` are a model of which each rank goes over whole samples.

    Args:
        model: of transformers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._backbone = backbone_of(model)
        self._class: Any = None

    @contextmanager
    def planned(self, context: AttentionContext) -> Iterator[None]:
        """Let the backbone go over the samples of a micro-batch, in its forward pass and in its backward pass."""
        with ExitStack() as undone:
            if not isinstance(self._backbone, WholeBackbone):
                if self._class is None:  # in the first step: by now a wrapper may have given it another class
                    kind = type(self._backbone)
                    self._class = type(f"Whole{kind.__name__}", (WholeBackbone, kind), {})
                set_until(undone, self._backbone, "__class__", self._class)
            set_until(undone, self._backbone, "hetero_context", context)
            yield


def passing_together(batch: StepBatch, unshifted: bool) -> StepBatch:
    """Return a step in each of whose micro-batches all ranks go through the layers equally often.

    Each rank counts it by the plan, so none has to ask another.

    Args:
        batch: of this rank.
        unshifted: each rank has a token that stands in, beside its samples; else only one without tokens has.
    """
    step, micro_batches = batch.share.step, list[RankMicroBatch]()
    for planned, micro_batch in zip(step.plan.micro_batches, batch.micro_batches, strict=True):
        spans = [spans for group in planned.groups for spans in layout_of(group, step.lengths).spans]
        most = max(len({span.sample for span in of_rank}) + (unshifted or not of_rank) for of_rank in spans)
        micro_batches.append(replace(micro_batch, num_passes=most))
    return replace(batch, micro_batches=tuple(micro_batches))


def backbone_of(model: Any) -> torch.nn.Module:
    """Return the innermost model within a model that begins with the embedding of tokens."""
    embedding = model.get_input_embeddings()
    parts = [part for part in model.modules() if hasattr(part, "get_input_embeddings") and part is not model]
    parts = [part for part in parts if any(module is embedding for module in part.modules())]
    return parts[-1] if parts else model
