"""The reference of a preference is a frozen model, the trained one without its adapters, or columns of the dataset.

It is asked without a gradient, in a context of its own over the same micro-batch; or once, before training, by planned
steps of its own, where TRL has batches of which each rank holds whole sequences: what can be trained can be asked, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.utils import use_adapter

from hf_hetero.attention.context import AttentionContext
from hf_hetero.collators import PackedCollator, PairCollator
from hf_hetero.collators.unpaired import COMPARED
from hf_hetero.data.planning import Planners
from hf_hetero.model.loss import IGNORE_INDEX
from hf_hetero.ranks.agreement import gather_objects
from hf_hetero.samples.pairs import PairRows
from hf_hetero.step import RankMicroBatch, StepBatch
from hf_hetero.trainer.evaluation.evaluation import planned_steps
from hf_hetero.trainer.pairs.means import Means
from hf_hetero.trainer.pairs.planned import PlannedPairs
from hf_hetero.trainer.pairs.plans import PlannersOfPairs
from hf_hetero.trainer.pairs.sums import EXACT, at_starts, by_sample, over_group
from hf_hetero.trainer.run import PlannedRun

if TYPE_CHECKING:
    import datasets

ASKED = {"use_cache": False, "token_log_probs": True}
"""What a model is told, to give the log-probability of each token."""


Ask = Callable[[dict[str, Any], AttentionContext], torch.Tensor]
"""Inputs and context of a micro-batch -> this rank's part of each sample's number, shape (num_samples,)."""


class PairsWithReference(PlannedPairs):
    """`PairsWithReference` goes before a trainer of TRL that compares a model with what it was."""

    precompute_ref_logps: bool
    ref_model: Any
    _waits: bool = False

    def _begin_with(
        self,
        pairs: PairRows,
        means: Means,
        packs: type[PackedCollator] = PairCollator,
        plans: type[Planners] = PlannersOfPairs,
    ) -> None:
        """Read pairs as packed rows from now on, with what the reference thinks of them if that is asked for."""
        train: Any = self.train_dataset
        super()._begin_with(pairs, means, packs, plans)
        if not self._waits:
            return
        self.train_dataset = self._view(self._with_references(train))
        evaluated: Any = self.eval_dataset
        if isinstance(evaluated, dict):
            named: dict[str, Any] = {**evaluated}
            self.eval_dataset = {name: self._with_references(dataset) for name, dataset in named.items()}
        elif evaluated is not None:
            self.eval_dataset = self._with_references(evaluated)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Ask the reference of a table before training, as TRL asks for it, but by planned steps.

        While TRL makes the trainer, nothing can be planned yet: the table waits. Where weights are sharded it does not,
        because there TRL has a model for this alone: the pass is its own, and each sequence must fit a rank.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not hasattr(dataset, "add_column"):
            theirs: Any = super()
            return theirs._precompute_ref_logps(dataset, name, batch_size)
        if hasattr(self, "_pairs"):
            return self._with_references(dataset)
        self._waits = True
        return dataset

    def _with_references(self, dataset: Any) -> Any:
        """Return a table with what the reference thinks of its rows. A collective of all ranks."""

        def ask(inputs: dict[str, Any], context: AttentionContext) -> torch.Tensor:
            own = {name: values for name, values in inputs.items() if name not in (*self._pairs.columns, COMPARED)}
            return by_sample(context, self._reference_log_probs({**own, **ASKED})[0])

        with self._between_runs.running(), self._fitted() as fitted:
            values = numbers_of(self, self._run_on(fitted), self._view(dataset), ask)
        return with_columns(dataset, values, self._pairs.references, str(getattr(self, "_precompute_model_hash", "")))

    @property
    def reference_passes(self) -> int:
        """Count the passes of each token through the reference: none where all was computed before."""
        return 0 if self.precompute_ref_logps else 1

    def _sums(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        context: AttentionContext,
        columns: dict[str, torch.Tensor],
        *others: torch.Tensor,
    ) -> torch.Tensor:
        """Return what is known of each sample of the group, shape (7 + others, num_samples). A collective of the group.

        These are log-probability, that of the reference, and sums over targets of entropy, mean logit and whether the
        most probable token is right; targets; tokens of the completion; then the sums of `others`. The first has this
        rank's gradient.

        Args:
            model: that is trained, in its wrapper.
            inputs: of the model, with `ASKED`.
            context: of the micro-batch.
            columns: of this rank's tokens.
            others: this rank's part of more, shape (num_samples,) each.
        """
        reference = self._reference_sums(inputs, context, columns)
        head = self._run.fitted.head
        with nullcontext() if head is None else head.lazy(always=True):
            tokens = model(**inputs).loss
        is_target = inputs["shift_labels"] != IGNORE_INDEX
        is_completion = inputs["labels"] != IGNORE_INDEX
        watched = by_sample(context, torch.cat([tokens[1:], is_target, is_completion]).detach())
        own = [by_sample(context, tokens[:1]), reference[None], watched, *(one[None] for one in others)]
        return over_group(context, torch.cat(own))

    def _reference_sums(
        self, inputs: dict[str, Any], context: AttentionContext, columns: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return this rank's part of the reference's log-probability of each sample. Shape (num_samples,).

        Args:
            inputs: of the model, with `ASKED`.
            context: of the micro-batch.
            columns: of this rank's tokens; `PairRows.column` has what was computed before.
        """
        if not self.precompute_ref_logps:
            return by_sample(context, self._reference_log_probs({**inputs, "hetero": context.again()})[0])
        if (known := columns.get(PairRows.column)) is not None:
            return at_starts(context, known)
        return torch.zeros(len(context.layout.lengths), dtype=EXACT, device=self.args.device)

    @torch.no_grad()
    def _reference_log_probs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return what the reference gives of this rank's tokens, as `chunked_log_probs` does. Shape (4, n)."""
        if self.ref_model is None:
            with self._reference_adapter():
                return self._own_log_probs(inputs)
        fitted, frozen = self._run.fitted, self.ref_model
        with ExitStack() as opened:
            if fitted.reference_layers is not None:
                opened.enter_context(fitted.reference_layers.planned(inputs["hetero"]))
            opened.enter_context(self.compute_loss_context_manager())
            if fitted.reference is not None:
                opened.enter_context(fitted.reference.lazy(always=True))
            return frozen(**inputs).loss

    @torch.no_grad()
    def _own_log_probs(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return what the trained model gives of this rank's tokens, as `chunked_log_probs` does. Shape (4, n)."""
        fitted, trained = self._run.fitted, self.model
        assert trained is not None
        with ExitStack() as opened:
            opened.enter_context(fitted.state_layers.planned(inputs["hetero"]))
            opened.enter_context(self.compute_loss_context_manager())
            if fitted.head is not None:
                opened.enter_context(fitted.head.lazy(always=True))
            return trained(**inputs).loss

    @contextmanager
    def _reference_adapter(self) -> Iterator[None]:
        """Be the reference meanwhile: an adapter that was kept as it was, or the model without any."""
        adapted: Any = self.accelerator.unwrap_model(self.model)
        if not hasattr(adapted, "peft_config"):  # before training it is what it was
            yield
            return
        with use_adapter(adapted, adapter_name="ref" if "ref" in adapted.peft_config else None):
            yield


# ------------------------------------------------------------------------------------------------------ before training


def with_columns(
    dataset: datasets.Dataset, values: Sequence[Sequence[float]], names: Sequence[str], known_by: str
) -> datasets.Dataset:
    """Return a table with a column for each sample of its rows.

    Args:
        dataset: of rows that have at most as many samples as there are names.
        values: of each row, one for each of its samples.
        names: of the columns.
        known_by: what else decides the values: a table of the same is known again by it.
    """
    from datasets.fingerprint import Hasher

    num_samples = len(values[0]) if values else 0
    for place, name in enumerate(names[:num_samples]):
        mark = Hasher.hash((dataset._fingerprint, known_by, name))  # pyright: ignore[reportPrivateUsage]
        # by rows and reference, not by values, whose last digits are those of a plan
        column: Any = [row[place] for row in values]
        dataset = dataset.add_column(name, column, new_fingerprint=mark)
    return dataset


def numbers_of(trainer: Any, run: PlannedRun, view: Any, ask: Ask) -> list[list[float]]:
    """Compute a number for each sample of each row, the same on all ranks. A collective of all of them.

    Args:
        trainer: whose settings and packer count.
        run: of planned steps.
        view: packed rows, map-style.
        ask: computes a rank's part of the numbers.

    Raises:
        HeteroError: a bad sample, on every rank.
    """
    source = trainer._planners().for_evaluation()
    loader = planned_steps(trainer, run, run.packer, trainer._between_runs, view, source)
    own: dict[tuple[int, int], float] = {}
    try:
        steps = iter(loader)
        while (batch := run.confirmed(steps, 1).batch) is not None:
            for index, micro_batch in enumerate(batch.micro_batches):
                own |= _of_micro_batch(trainer, run, batch, micro_batch, index, ask)
    finally:
        loader.close()
    found: dict[tuple[int, int], float] = {}
    for part in gather_objects(own, run.control):
        found |= part
    rows: list[list[float]] = [[] for _ in range(len(view))]
    for row, _start in sorted(found):
        rows[row].append(found[row, _start])
    return rows


def _of_micro_batch(
    trainer: Any, run: PlannedRun, batch: StepBatch, micro_batch: RankMicroBatch, index: int, ask: Ask
) -> dict[tuple[int, int], float]:
    """Return the numbers of a group's samples, by row and start in it, on the first rank of the group."""
    with torch.no_grad():  # by which the context knows that there is no backward pass to keep anything for
        context = run.context(micro_batch, index, 1)
        inputs = trainer._prepare_inputs({**micro_batch.inputs, "hetero": context})
        sums = over_group(context, ask(inputs, context)).tolist()
    if context.group_rank != 0:
        return {}
    drawn = batch.share.step.drawn
    places = [(drawn.rows[sample], drawn.starts[sample]) for sample in micro_batch.group.samples]
    return dict(zip(places, sums, strict=True))
