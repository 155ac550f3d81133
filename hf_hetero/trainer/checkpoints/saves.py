"""The methods of `Trainer` that save: a checkpoint is whole, or removed, and is written at once or beside training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_hetero.config import HeteroConfig
from hf_hetero.ranks.groups import limit_of
from hf_hetero.ranks.naming import all_ranks, named
from hf_hetero.trainer import reporting
from hf_hetero.trainer.checkpoints.checkpoint import Run
from hf_hetero.trainer.checkpoints.kept_cost_model import keep_cost_model
from hf_hetero.trainer.checkpoints.removing import discard, newest_first
from hf_hetero.trainer.checkpoints.resuming import settings_of
from hf_hetero.trainer.checkpoints.saving import Saving
from hf_hetero.trainer.checkpoints.taken import Taken, reason_against
from hf_hetero.trainer.checkpoints.writing import Writing
from hf_hetero.trainer.run import BetweenRuns, PlannedRun
from hf_hetero.trainer.training import Training

logger = logging.getLogger(__name__)


class SavesWhole(Trainer):
    """`SavesWhole` saves checkpoints that are known to be whole.

    With `HeteroConfig.save_in_background` the loop of training only takes what a checkpoint holds. A thread writes it
    while steps go on, one checkpoint at a time. When it is whole, all ranks know after the same step, and only then
    callbacks have their `on_save`, with the trainer's state of when it was taken, and it is pushed. Training ends, or
    looks for its best model, when nothing is being written any more.

    Attributes:
        hetero: the settings.
        _between_runs: what stays from one run to the next.
        _planned_run, _training: the run of now, and what `train` has open beside it; None otherwise.
    """

    hetero: HeteroConfig
    _between_runs: BetweenRuns
    _planned_run: PlannedRun | None
    _training: Training | None

    @property
    def _run(self) -> PlannedRun:
        assert self._planned_run is not None
        return self._planned_run

    @property
    def _open(self) -> Training:
        assert self._training is not None
        return self._training

    @property
    def _saving(self) -> Saving | None:
        return None if self._training is None else self._training.saving

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Log, save and evaluate as Trainer does; ranks may wait long for one that saves or evaluates."""
        self._announce(waits=False)
        takes_long = self.control.should_save or self.control.should_evaluate
        callbacks = self.callback_handler.callbacks
        self._open.is_saved_by_loop = True
        try:
            with self._run.groups.relaxed() if takes_long else nullcontext():
                super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._open.is_saved_by_loop = False
            self.callback_handler.callbacks = callbacks

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as Trainer does, but a checkpoint that is known to be whole, or removed."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        sharding = self._run.fitted.sharding

        def save() -> None:
            super(SavesWhole, self)._save_checkpoint(model, trial)
            if self.args.should_save:
                between = self._between_runs
                given = between.machine.given if between.machine is not None else None
                keep_cost_model(folder, between.cost_model_of_now(), self.args.world_size, given, sharding.replicas)

        self._announce(waits=True)
        run = self._place()  # before callbacks are silenced
        if self._writes_beside():
            self._begin_writing(save, folder, run)
            # Trainer has them called next, and nothing is whole yet: `_announce` does it when it is
            self.callback_handler.callbacks = []
            return
        # `save_model`, which Trainer calls on the way, asks for it
        self._open.saving = saving = Saving(self.args, self._run.control, sharding.is_sharded)
        try:
            saving.write(save, folder, run, lambda: self.state.best_model_checkpoint)
        finally:
            self._open.saving = None

    def _place(self) -> Run:
        """Return where the run is."""
        data = self._open.data
        assert data is not None
        position = data.stream.position(self.state.global_step) if data.stream is not None else None
        return Run(self.args.world_size, data.order, position, reporting.kept_calibration(self), settings_of(self))

    def _writes_beside(self) -> bool:
        """Return whether the checkpoint that is due is written beside training; the same on all ranks."""
        if not (self.hetero.save_in_background and self._open.is_saved_by_loop):
            return False
        if self._open.may_write_beside is None:
            reason = reason_against(self)
            self._open.may_write_beside = reason is None
            if reason is not None and self.args.process_index == 0:
                logger.warning("Checkpoints are written at once, in spite of save_in_background: %s.", reason)
        return self._open.may_write_beside

    def _begin_writing(self, save: Callable[[], None], folder: Path, run: Run) -> None:
        """Take a checkpoint, and have a thread write it. A collective of all ranks."""
        is_sharded = self._run.fitted.sharding.is_sharded
        group = self._run.groups.beside_training() if is_sharded else None
        taken = Taken(self, group)
        self._open.saving = saving = Saving(self.args, self._run.control, may_wait=False, taken=taken)
        try:
            write = saving.begin(save, folder, run, lambda: self.state.best_model_checkpoint, group)
        finally:
            self._open.saving = None
        taken.is_all()
        self._open.writing = Writing(write, folder, copy.copy(self.state), taken.is_pushed)

    def _announce(self, waits: bool) -> None:
        """Tell callbacks and the hub of the checkpoint that was being written, once it is whole, on all ranks.

        Args:
            waits: until it is.

        Raises:
            HeteroError: its writing has failed on any rank.
        """
        if (writing := self._open.writing) is None:
            return
        if waits:
            writing.wait()
        if not writing.is_whole(self._run.control):
            return
        self._open.writing = None
        # as if it were the moment when it was taken: scripts make the checkpoint's name of the step
        now, self.state = self.state, writing.state
        is_due = self.control.should_save  # which is taken back by what is called
        try:
            if writing.is_pushed:
                super()._push_from_checkpoint(str(writing.folder))
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        finally:
            self.state = now
        self.control.should_save = self.control.should_save or is_due

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does. In a checkpoint all ranks know how it went, before Trainer has them wait for others.

        Raises:
            CollectiveFailed: a rank that was waited for has gone, or is late.
        """
        saving = self._saving
        if saving is None or output_dir is None:
            with named("Saving the model", all_ranks, limit=limit_of):  # sharded weights are gathered
                super().save_model(output_dir, _internal_call)
            return
        folder, taken = Path(output_dir), saving.taken

        def save() -> None:
            super(SavesWhole, self).save_model(output_dir, _internal_call)

        saving.together(save if taken is None else lambda: taken.model(folder), folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save their states as Trainer does, or take them to be written beside training."""
        saving = self._saving
        if saving is None or saving.taken is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            saving.taken.optimizer_and_scheduler(Path(output_dir))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint as Trainer does, once it is whole."""
        saving = self._saving
        if saving is None or saving.taken is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            saving.taken.is_pushed = True

    def _load_best_model(self) -> None:
        """Load it as Trainer does; delete the others, as Trainer would do next, if it is the only one to stay."""
        super()._load_best_model()
        self._drop_all_but_best()

    def _drop_all_but_best(self) -> None:
        """Delete all checkpoints but the best, where one is to stay, so that none is half removed at any moment."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and self.args.save_total_limit == 1 and best is not None and Path(best).exists():
            for path in newest_first(Path(best).parent):
                if not path.samefile(best):
                    discard(path)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End training as Trainer does, which may look for its best model, when nothing is being written any more."""
        with self._run.groups.relaxed():
            self._announce(waits=True)
        if not self.args.load_best_model_at_end:
            self._drop_all_but_best()
        return super()._finalize_training(*args, **kwargs)
