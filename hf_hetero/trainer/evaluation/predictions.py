"""An evaluation gathers from all ranks, for any length, a loss weighted by tokens, and outputs in the dataset's order.

The loss is that of training: a sum over tokens, divided once by all targets of the dataset, so it is the value that a
single process finds. Each token's outputs are made on the rank that holds the token, and put back into their samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from hf_hetero.collators.classes import Classes
from hf_hetero.errors import HeteroError
from hf_hetero.layout import Span
from hf_hetero.ranks.agreement import gather_objects
from hf_hetero.step import RankMicroBatch, StepBatch

PADDING = -100  # what transformers fills the rows of its arrays of predictions with

Array = NDArray[Any]
Nested = Any
"""A tensor (or array), or a tuple of them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece is the per-token values of one span: arrays of shape (num_tokens, ...).

    Args:
        row: of the dataset.
        start: position of the span among the tokens of its row that were not cut off.
        num_tokens: of the span.
        values: predictions, labels, inputs: those that were asked for.
    """

    row: int
    start: int
    num_tokens: int
    values: dict[str, Nested]


@dataclass
class Results:
    """`Results` are what an evaluation gathers, step after step.

    Args:
        args: what to return, and how.
        preprocess: `preprocess_logits_for_metrics`: gets logits and labels of tokens that follow one another in one
            sample, shapes (1, num_tokens, vocab_size) and (1, num_tokens), and gives one output per token.
        compute_metrics: of transformers.
        keeps_outputs: False: only the loss.
        control: group that carries the outputs; None for a single process.
        has_labels: False: there is no loss, and there are no labels to compare with.
        keeps_batches: keep outputs although metrics are counted batch by batch.
        classes: of the model, where labels are no tokens.

    Attributes:
        loss_sum, num_targets, num_rows: of all steps.
        micro_batch_targets: target tokens of each micro-batch, of all ranks.
    """

    args: TrainingArguments
    preprocess: Callable[[Any, Any], Any] | None
    compute_metrics: Callable[..., Any] | None
    keeps_outputs: bool
    control: dist.ProcessGroup | None
    has_labels: bool = True
    keeps_batches: bool = False
    classes: Classes | None = None
    loss_sum: float = 0.0
    num_targets: int = 0
    num_rows: int = 0
    micro_batch_targets: list[int] = field(default_factory=list[int])
    _steps: list[dict[str, list[Nested]]] = field(default_factory=list[dict[str, list[Nested]]])
    _losses: list[float] = field(default_factory=list[float])
    _batch_metrics: dict[str, Any] | None = None

    @property
    def _of_sequences(self) -> bool:
        """Return whether a row has one output, instead of one for each token."""
        return self.classes is not None and self.classes.of_sequences

    def pieces(self, batch: StepBatch, micro_batch: RankMicroBatch, outputs: Nested) -> list[Piece]:
        """Cut a micro-batch's outputs into the spans that this rank holds. Each: shape (1, num_tokens, ...)."""
        if self._of_sequences:
            return self._scores(batch, micro_batch, outputs)
        group, drawn = micro_batch.group, batch.share.step.drawn
        starts = drawn.kept_starts()
        pieces: list[Piece] = []
        first = 0
        for span in micro_batch.spans:  # the spans of a rank lie one after the other in its row of tokens
            tokens = slice(first, first + span.num_tokens)
            own = _map(lambda tensor, tokens=tokens: tensor[:, tokens], outputs)
            values: dict[str, Nested] = {}
            labels = None
            if self.has_labels and micro_batch.labels is not None:
                labels = micro_batch.labels[:, tokens].to(self.args.device)
                values["labels"] = _to_numpy(labels)
            if self.preprocess is not None:
                own = self.preprocess(own, labels)
            values["predictions"] = _to_numpy(_one_per_token(own, span))
            if "inputs" in self.args.include_for_metrics:
                values["inputs"] = _to_numpy(micro_batch.inputs["input_ids"][:, tokens])
            position = group.samples[span.sample]
            pieces.append(Piece(drawn.rows[position], starts[position] + span.start, span.num_tokens, values))
            first += span.num_tokens
        return pieces

    def _scores(self, batch: StepBatch, micro_batch: RankMicroBatch, outputs: Nested) -> list[Piece]:
        """Take a micro-batch's outputs of sequences where this rank holds the token whose score counts."""
        assert self.classes is not None
        pieces: list[Piece] = []
        first = 0
        for span, place in zip(micro_batch.spans, micro_batch.scored or (), strict=True):
            if place is not None:
                token = slice(first + place, first + place + 1)
                own = _map(lambda tensor, token=token: tensor[0, token], outputs)
                labels, values = None, dict[str, Nested]()
                if self.has_labels and micro_batch.labels is not None:
                    labels = self.classes.as_given(micro_batch.labels[0, token]).to(self.args.device)
                    values["labels"] = _to_numpy(labels[None])
                if self.preprocess is not None:
                    own = self.preprocess(own, labels)
                values["predictions"] = _map(lambda tensor: _to_numpy(tensor[None]), own)
                row = batch.share.step.rows[micro_batch.group.samples[span.sample]]
                pieces.append(Piece(row, 0, 1, values))
            first += span.num_tokens
        return pieces

    def add(self, batch: StepBatch, loss: float, num_targets: int, pieces: Sequence[Piece], is_last: bool) -> None:
        """Add a step: this rank's part of the mean loss of its targets, and its outputs. A collective of all ranks."""
        mine = (loss, list(pieces), [m.num_targets for m in batch.micro_batches])
        step, of_all = batch.share.step, gather_objects(mine, self.control)
        loss = sum(part for part, _, _ in of_all)
        self.micro_batch_targets += map(sum, zip(*(counts for _, _, counts in of_all), strict=True))
        self.loss_sum += loss * max(num_targets, 1)  # a sum again, so that steps count by their targets
        self.num_targets += num_targets
        # documents of a packed row are samples of their own, and one row of the results
        row_tokens: dict[int, int] = {}
        for row, length in zip(step.rows, step.lengths, strict=True):
            row_tokens[row] = row_tokens.get(row, 0) + length
        self.num_rows += len(row_tokens)
        self._losses += [loss] * len(row_tokens)
        if not self.keeps_outputs:
            return
        everywhere = [piece for _, pieces, _ in of_all for piece in pieces]
        rows = assemble(everywhere, dict.fromkeys(row_tokens, 1) if self._of_sequences else row_tokens)
        if not self.args.batch_eval_metrics or self.keeps_batches:
            self._steps.append(rows)
        if self.args.batch_eval_metrics and self.compute_metrics is not None and self.has_labels:
            tensors = {name: _map(torch.from_numpy, self._joined(values)) for name, values in rows.items()}
            if "inputs" in tensors:  # a whole batch, in stock
                ids = tensors["inputs"]
                mask = (ids != PADDING).long()
                tensors["inputs"] = {"input_ids": ids * mask, "attention_mask": mask, "labels": tensors["labels"]}
            losses = torch.full((len(row_tokens),), loss)
            self._batch_metrics = self.compute_metrics(self._prediction(tensors, losses), compute_result=is_last)

    def output(self, prefix: str) -> EvalLoopOutput:
        """Return the results as transformers' `evaluation_loop` does."""
        arrays: dict[str, Any] = {"predictions": None, "labels": None}
        for name in self._steps[0] if self._steps else ():
            batches = [step[name] for step in self._steps]
            if self.args.eval_do_concat_batches:
                arrays[name] = self._joined([row for batch in batches for row in batch])
            else:
                arrays[name] = [self._joined(batch) for batch in batches]
        metrics: dict[str, Any] = self._batch_metrics or {}
        if self.compute_metrics is not None and self._steps and not self.args.batch_eval_metrics and self.has_labels:
            metrics = self.compute_metrics(self._prediction(arrays, np.asarray(self._losses)))
        metrics = cast("dict[str, Any]", denumpify_detensorize(metrics))
        if self.has_labels:
            metrics["loss"] = self.loss_sum / self.num_targets if self.num_targets else float("nan")
        return EvalLoopOutput(
            predictions=arrays["predictions"],
            label_ids=arrays["labels"],
            metrics={k if k.startswith(f"{prefix}_") else f"{prefix}_{k}": v for k, v in metrics.items()},
            num_samples=self.num_rows,
        )

    def _joined(self, rows: Sequence[Nested]) -> Nested:
        """Join rows of tokens as transformers does, with padding; rows of sequences one below the other."""
        return _map(lambda *arrays: np.concatenate(arrays), *rows) if self._of_sequences else pad_rows(rows)

    def _prediction(self, arrays: dict[str, Any], losses: Any) -> EvalPrediction:
        """Make what `compute_metrics` is given."""
        wanted = self.args.include_for_metrics
        return EvalPrediction(
            predictions=arrays["predictions"],
            label_ids=arrays["labels"],
            inputs=arrays["inputs"] if "inputs" in wanted else None,
            losses=losses if "loss" in wanted else None,
        )


def assemble(pieces: Iterable[Piece], lengths: Mapping[int, int]) -> dict[str, list[Nested]]:
    """Assemble whole rows of the pieces of all ranks, each value shape (num_tokens, ...), in the order of `lengths`.

    Raises:
        HeteroError: tokens that no rank gave, or two did.
    """
    by_row: dict[int, list[Piece]] = {row: [] for row in lengths}
    for piece in pieces:
        by_row[piece.row].append(piece)
    rows: dict[str, list[Nested]] = {}
    for row, length in lengths.items():
        ordered = sorted(by_row[row], key=lambda piece: piece.start)
        ends = [0, *(piece.start + piece.num_tokens for piece in ordered)]
        if [piece.start for piece in ordered] != ends[:-1] or ends[-1] != length:
            raise HeteroError(
                f"Row {row} of {length} tokens: outputs came back for tokens {ends}, not each token once."
            )
        for name in ordered[0].values:
            parts = [piece.values[name] for piece in ordered]
            rows.setdefault(name, []).append(_map(lambda *leaves: np.concatenate(leaves), *parts))
    return rows


def pad_rows(rows: Sequence[Nested]) -> Nested:
    """Join arrays of shape (num_tokens, ...) to one of shape (num_rows, most_tokens, ...), filled up with -100."""

    def pad(*arrays: Array) -> Array:
        most = max(map(len, arrays))
        out = np.full((len(arrays), most, *arrays[0].shape[1:]), PADDING, dtype=arrays[0].dtype)
        for row, array in enumerate(arrays):
            out[row, : len(array)] = array
        return out

    return _map(pad, *rows)


def _one_per_token(outputs: Nested, span: Span) -> Nested:
    """Return outputs that have one value a token, or refuse them.

    Raises:
        HeteroError: they do not, so that no row can be assembled of them.
    """

    def check(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2 or tuple(tensor.shape[:2]) != (1, span.num_tokens):
            raise HeteroError(
                f"preprocess_logits_for_metrics made {tuple(tensor.shape)} of the logits of {span.num_tokens} tokens; "
                "under plans it must give one output per token, shape (1, num_tokens, ...): tokens of one sample may "
                "lie on several ranks. Shift in compute_metrics instead, or set HeteroConfig.plan_evaluation=False."
            )
        return tensor

    return _map(check, outputs)


def _to_numpy(values: Nested) -> Nested:
    """Turn tensors of shape (1, num_tokens, ...) into arrays of shape (num_tokens, ...); numpy knows no bf16."""

    def convert(tensor: torch.Tensor) -> Array:
        tensor = tensor.detach()[0]
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()

    return _map(convert, values)


def _map(function: Callable[..., Any], *nested: Nested) -> Nested:
    """Apply a function to each leaf; several nests of one shape are walked together."""
    if isinstance(nested[0], tuple | list):
        return tuple(_map(function, *leaves) for leaves in zip(*nested, strict=True))
    return function(*nested)
