"""A planned run is the user's model, fitted for planned steps, and what it takes to plan and to compute them.

`BetweenRuns`, which is what a trainer keeps from one run to the next, joins them when training or an evaluation starts;
nothing of a `PlannedRun` changes until it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.ring import MERGING
from hf_hetero.checks import exactness
from hf_hetero.checks.probe import check_untested, needs_trial
from hf_hetero.collators import PackedCollator
from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel
from hf_hetero.data.epochs import KeptCounts
from hf_hetero.data.plan_sources import PlanSource
from hf_hetero.data.planning import Planners, Planning, planning_of
from hf_hetero.data.workers import end_with_this_process, named_loss
from hf_hetero.errors import HeteroError
from hf_hetero.images.together import seeing_together
from hf_hetero.manners.manner import Manner, settings_for
from hf_hetero.manners.whole_samples import WholeSamples, passing_together
from hf_hetero.model.classes.labelled import NEXT, labelled_of
from hf_hetero.model.logged_means import LoggedMeans
from hf_hetero.model.wrapped import base_model, looks_ahead
from hf_hetero.ranks.agreement import confirm_rows, confirm_step, gather
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.step import RankMicroBatch, StepBatch
from hf_hetero.trainer.fitting import Fitted, check_manner, compute_dtype, fit
from hf_hetero.trainer.machine import Machine, set_up
from hf_hetero.trainer.packing import fitting_packer

# -------------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A `PlannedRun` is what planned steps are made of, the same from the first step to the last.

    Args:
        args: of the trainer.
        hetero: settings of planning.
        fitted: the user's model.
        groups: the process groups, open.
        packer: rows -> this rank's tensors; rows need no labels.
        planners: make plans, for the cost model of their moment.
    """

    args: TrainingArguments
    hetero: HeteroConfig
    fitted: Fitted
    groups: GroupPool
    packer: PackedCollator
    planners: Planners

    @property
    def control(self) -> dist.ProcessGroup | None:
        """Return the group of all ranks that carries control messages; None for a single process."""
        return self.groups.control

    @property
    def labelled_packer(self) -> PackedCollator:
        """Return the packer for training: each row has labels, or it says how to make them."""
        return replace(self.unlabelled_packer, needs_labels=True)

    @property
    def unlabelled_packer(self) -> PackedCollator:
        """Return the packer for evaluation: it makes labels as training does, and needs none."""
        return replace(self.packer, makes_labels=self.packer.makes_labels or self.packer.says_so)

    def planning(self, source: PlanSource) -> Planning:
        """Return how steps are planned, with plans from this source."""
        return planning_of(self.hetero, source, self.control, self.packer.limits)

    def context(self, micro_batch: RankMicroBatch, index: int, step: int) -> AttentionContext:
        """Make what attention has to know of a micro-batch.

        Args:
            micro_batch: of this rank.
            index: of the micro-batch within its step.
            step: its number, for messages.
        """
        group, inner = micro_batch.group, micro_batch.layout.inner
        rank = self.args.process_index if self.args.world_size > 1 else 0
        first = rank - rank % inner
        num_tokens = micro_batch.inputs["input_ids"].shape[1]
        activations = self.fitted.activations
        # an evaluation has no backward pass that would take what is kept for it
        recomputed = activations.recomputed(group.activations) and torch.is_grad_enabled()
        policy = group.activations if recomputed else None
        hidden = self.fitted.model.config.get_text_config(decoder=True).hidden_size
        return AttentionContext(
            micro_batch.layout,
            group.ranks,
            rank,
            self.groups.get(group.ranks),
            group.method,
            self.fitted.kernel,
            self.args.device,
            step=step,
            micro_batch=index,
            inner_group=self.groups.get(tuple(range(first, first + inner))),
            keeps=self.hetero.keep_exchanged and recomputed,
            store=activations.store(policy, self.args.device, num_tokens, hidden),
            reaches=micro_batch.reaches,
            waits=self.groups.waits,
            mutual=micro_batch.mutual,
            mutual_in_windows=self.packer.sight is not None and self.packer.sight.mutual_in_windows,
            num_passes=micro_batch.num_passes,
        )

    def confirmed(self, steps: Iterator[StepBatch], number: int) -> ConfirmedStep:
        """Return the next step, once all ranks hold it. A collective of all ranks.

        Args:
            steps: of this rank.
            number: of the step, for messages.

        Raises:
            HeteroError: a bad sample, or another plan, on any rank; raised on all.
        """
        error: Exception | None = None
        batch: StepBatch | None = None
        start = time.perf_counter()
        try:
            batch = next(steps, None)
        except Exception as raised:  # told to the other ranks first, then raised on all of them
            error = named_loss(raised) if self.args.dataloader_num_workers else raised
        fetch_s = time.perf_counter() - start
        # without a word: all ranks are dealt as many steps, so they come here together
        if batch is None and error is None:
            return ConfirmedStep(None, 0, fetch_s)
        digest, targets = (batch.share.step.digest(), batch.num_targets) if batch is not None else (0, 0)
        num_targets = confirm_step(number, digest, targets, error, self.control)
        assert batch is not None
        confirm_rows(number, batch.share.step.shared_rows(), batch.fingerprints, self.control)
        batch = seeing_together(batch, self.packer.sight, self.control)
        if isinstance(self.fitted.state_layers, WholeSamples) and self.fitted.sharding.is_sharded:
            batch = passing_together(batch, self.packer.keeps_labels_unshifted)
        return ConfirmedStep(batch, num_targets, fetch_s)


class ConfirmedStep(NamedTuple):
    """A `ConfirmedStep` is a step that all ranks hold.

    Args:
        batch: this rank's; None: there is no other step.
        num_targets: over all ranks.
        fetch_s: seconds that this rank waited for its batch.
    """

    batch: StepBatch | None
    num_targets: int
    fetch_s: float


def begin_step(
    trainer: Trainer,
    model: torch.nn.Module,
    batch: StepBatch,
    note: Callable[[int], None] = lambda _: None,
    learns: bool = True,
) -> None:
    """Let a trainer whose loss is of all samples of a step at once see them first: it has a method `begin_step`.

    Args:
        trainer: of any kind; most have no such loss.
        model: in its wrapper.
        batch: of this rank.
        note: is told which micro-batch is being computed.
        learns: the step is of training; else of an evaluation.
    """
    begin: Callable[..., None] | None = getattr(trainer, "begin_step", None)
    if begin is not None:
        with torch.set_grad_enabled(learns):
            begin(model, batch, note)


# ----------------------------------------------------------------------------------------------------------- what stays


@dataclass(slots=True)
class BetweenRuns:
    """`BetweenRuns` is what a trainer keeps from run to run: none of it holds a file, thread or process group open.

    Args:
        means: of what the trainer logs.
        counts: what is known of datasets that were evaluated.
        evaluated: the dataset of each loader for an evaluation.
        cost_model: what plans are made by; callbacks may refit it. None before the first planned step.
        has_learned: the first step had a target.
        machine: what runs stand on. None before the first.
        manner: how the model is trained.
    """

    means: LoggedMeans
    counts: KeptCounts = field(default_factory=KeptCounts)
    evaluated: WeakKeyDictionary[Any, Any] = field(default_factory=WeakKeyDictionary[Any, Any])
    cost_model: CostModel | None = None
    has_learned: bool = False
    machine: Machine | None = None
    manner: Manner = field(default_factory=Manner)
    _num_running: int = 0
    _tried_model: tuple[type, dict[str, Any]] | None = None

    def noted(self, loader: DataLoader[Any], dataset: Any) -> DataLoader[Any]:
        """Note the dataset of a loader for an evaluation; return the loader, whose workers end with this process."""
        self.evaluated[loader] = dataset
        end_with_this_process(loader)
        return loader

    def try_untested(self, trainer: Trainer, hetero: HeteroConfig) -> None:
        """Try a tiny instance, for a second, of a model that nobody has compared yet; once for each model.

        A collective of all ranks.

        Raises:
            UnsupportedModel: it is not exact under plans, or not with these settings; raised on every rank.
        """
        base = base_model(trainer.model)
        if not needs_trial(base):
            self.manner = Manner()
        else:
            model = (type(base), base.config.to_dict())
            # groups of a run come with its cost model, which is not made before the model is accepted
            messengers = GroupPool((), hetero.group_timeout_s, trainer.args.ddp_timeout)
            try:
                # by vote: a rank that saves writes into its config, and no rank may try alone
                if not all(known for [known] in gather([int(model == self._tried_model)], messengers.control)):
                    self.manner = check_untested(base, messengers.control)
            finally:
                messengers.close()
            self._tried_model = model
        check_manner(trainer, self.manner)

    def fit(self, trainer: Trainer, hetero: HeteroConfig) -> Fitted:
        """Fit a trainer's model of now for planned steps, if it is exact under plans.

        Raises:
            UnsupportedModel: it is not; raised on every rank.
        """
        exactness.check_arguments(trainer.args)  # which a script may have changed
        exactness.check_model(trainer)
        self.try_untested(trainer, hetero)
        return fit(trainer, hetero, self.manner)

    def run_on(
        self, fitted: Fitted, trainer: Trainer, hetero: HeteroConfig, packer: PackedCollator, checkpoint: str | None
    ) -> PlannedRun:
        """Make a run on a fitted model. A collective of all ranks where groups are closed.

        Cost model and groups are made when they are first needed, and kept; but a checkpoint brings its own.

        Args:
            fitted: the model.
            trainer, hetero: whose it is, and how it is planned.
            packer: packs rows as the user's collator makes them.
            checkpoint: folder that the run goes on from; None: it starts anew.
        """
        # all ranks go on from the same checkpoint, so all close their groups here, or none does
        if self.machine is not None and not self.machine.serves(checkpoint):
            self.machine.groups.close()
            self.machine = None
        if self.machine is None:
            model, dtype = cast("torch.nn.Module", trainer.model), compute_dtype(trainer)
            fits = fitted.sharding, fitted.activations, checkpoint, fitted.kernel.name, fitted.asked
            self.machine = set_up(model, trainer.args, settings_for(self.manner, hetero), dtype, *fits)
            self.cost_model = self.machine.cost_model
        groups = self.machine.groups
        groups.open()
        # what the kernel cannot do is not planned; ulysses asks for nothing
        methods = [method for method in hetero.methods if fitted.kernel.has_lse or method not in MERGING]
        if labelled_of(fitted.model) != NEXT and looks_ahead(fitted.model):
            methods = ["ulysses"]
        planners = Planners(hetero, trainer.args.world_size, self.cost_model_of_now, methods or ["ulysses"])
        fits = fitting_packer(trainer, hetero, packer, self.manner, fitted)
        return PlannedRun(trainer.args, hetero, fitted, groups, fits, planners)

    def cost_model_of_now(self) -> CostModel:
        """Return the cost model, which is there once there is a run."""
        assert self.cost_model is not None
        return self.cost_model

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold a run, or one within it: where the outermost ends, so do the groups. The next may be another trainer's.

        Groups are closed on all ranks or on none: after an error that others may not know of, they may be in them.
        """
        self._num_running += 1
        ends_everywhere = False
        try:
            yield
            ends_everywhere = True
        except HeteroError as error:
            ends_everywhere = error.is_known_to_all
            raise
        finally:
            self._num_running -= 1
            if ends_everywhere and not self._num_running and self.machine is not None:
                self.machine.groups.close()
