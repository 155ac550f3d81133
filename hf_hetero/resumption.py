"""From data to checkpoint and back: the loader of planned steps, and a run that goes on where it was."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_hetero import checkpoint, sharding
from hf_hetero.agreement import broadcast
from hf_hetero.checkpoint import Run, Saving
from hf_hetero.errors import HeteroError
from hf_hetero.groups import GroupPool
from hf_hetero.loader import LOOKED_AT, TrainingData, sampler_of, streamed_data, training_data
from hf_hetero.machine import keep_cost_model
from hf_hetero.planning import planning_of
from hf_hetero.preparation import PreparedTrainer
from hf_hetero.rows import PACKED_COLUMN
from hf_hetero.safekeeping import Claim, claim
from hf_hetero.stopping import OneDecision, StopWhenAsked, ending_in_words
from hf_hetero.stream import is_stream

logger = logging.getLogger(__name__)


class ResumableTrainer(PreparedTrainer):
    """A Trainer whose loader gives planned steps, and whose checkpoints are known to be whole."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (theirs := self.pop_callback(JITCheckpointCallback)) is not None:
            theirs.on_train_end(self.args, self.state, self.control)  # gives SIGTERM back
        self._data: TrainingData | None = None
        self._is_training = False
        self._run_before: Run | None = None
        self._saving: Saving | None = None
        self._claim: Claim | None = None
        self._stop = StopWhenAsked()
        self.add_callback(self._stop)
        self._decision = OneDecision(lambda: self.groups.control if self.is_in_train else None)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's own loader, which says how long an epoch is and in which order; its batches can be read.

        While training, steps are drawn from a loader beside it, whose items are planned (`get_batch_samples`).

        Raises:
            BadSample: the dataset has no tokens, or an empty sample.
        """
        if self.train_dataset is None:
            raise HeteroError("Training needs a train_dataset.")
        loader = super().get_train_dataloader()
        if self._is_training and self._data is None:
            self._fit()
            broadcast(self._claim_folder, self.groups.control)
            self._data = self._training_data(loader)
        return loader

    def _claim_folder(self) -> None:
        """Notice another run in the output folder; those of a search have their own."""
        if self.hp_search_backend is None:
            self._claim = claim(Path(self.args.output_dir or "."), saves=self.args.save_strategy != SaveStrategy.NO)

    def _training_data(self, loader: DataLoader[Any]) -> TrainingData:
        """The planned steps of a run."""
        packer = self._packer(needs_labels=True)
        planning = planning_of(self.hetero, self._plan_source(), self.groups.control, packer.limits)
        before = self._run_before if not self.args.ignore_data_skip else None
        common: dict[str, Any] = {
            "collate": packer,
            "args": self.args,
            "batch_size": self.get_total_train_batch_size(self.args),
            "planning": planning,
            "global_step": lambda: self.state.global_step,
        }
        if is_stream(self.train_dataset):
            kept = before.stream if before is not None else None
            data = streamed_data(self.train_dataset, self._columns_kept(), kept=kept, **common)
        else:
            dataset: Any = self.train_dataset
            packer.check_padding(dataset[row] for row in range(min(len(dataset), LOOKED_AT)))
            columns = partial(self._remove_unused_columns, description="training")
            data = training_data(dataset, columns, names=self._columns_kept(), sampler=sampler_of(loader), **common)
        try:
            checkpoint.check_order(data.order, before.order if before is not None else {})
        except BaseException:
            data.close()
            raise
        return data

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As Trainer's; but how many epochs of a stream there were, only the checkpoint knows."""
        found: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        entered = self._data.entered if self._data is not None else None
        if entered is None:
            return found
        return entered.epoch, entered.batches * self.args.gradient_accumulation_steps

    def _columns_kept(self) -> list[str] | None:
        """Columns of a stream that are used; None: all."""
        if not self.args.remove_unused_columns:
            return None
        self._set_signature_columns_if_needed()
        return [*(self._signature_columns or []), PACKED_COLUMN]

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, from a checkpoint that is whole; it also brings its cost model and how far data was read.

        Raises:
            ConfigError: no such checkpoint, or its data were others; raised on every rank.
        """
        self._resumed_from, self._run_before = None, None
        self._is_training = True
        self.pop_callback(OneDecision)
        self.add_callback(self._decision)  # after all that were added meanwhile
        try:
            if resume_from_checkpoint:
                resume_from_checkpoint = self._resumed_from = self._find_checkpoint(resume_from_checkpoint)
            sharding.forget_evaluation(self)
            words = ending_in_words(lambda: self.state.global_step + 1)
            with words, sharding.saying_why_not_again(), self._stop.listening(self.args.enable_jit_checkpoint):
                return super().train(resume_from_checkpoint, *others, **kwargs)
        finally:
            self._is_training = False
            if self._data is not None:
                self._data.close()
            self._data = None
            if self._claim is not None:
                self._claim.close()
            self._claim = None
            self._give_back()

    def _find_checkpoint(self, asked: str | bool) -> str:
        # its cost model decides which groups there are, so they cannot carry this yet
        messengers = GroupPool((), self.hetero.group_timeout_s, self.args.ddp_timeout)
        output_dir = Path(self.args.output_dir or ".")
        folder, self._run_before, passed_over = broadcast(
            lambda: checkpoint.chosen(asked, output_dir), messengers.control
        )
        messengers.close()
        if passed_over and self.args.process_index == 0:
            logger.warning("Resuming from %s. Passed over: %s", folder, " ".join(passed_over))
        return str(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, but known to be whole, or removed."""
        assert self._data is not None
        assert self.cost_model is not None
        cost, step = self.cost_model, self.state.global_step
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        stream = self._data.stream.position(step) if self._data.stream is not None else None

        def save() -> None:
            super(ResumableTrainer, self)._save_checkpoint(model, trial)
            if self.args.should_save:
                keep_cost_model(folder, cost, self.args.world_size)

        self._saving = Saving(self.args, self.groups.control, may_wait=self._sharding.is_sharded)
        run = Run(self.args.world_size, self._data.order, stream)
        try:
            self._saving.write(save, folder, run, best=lambda: self.state.best_model_checkpoint)
        finally:
            self._saving = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. In a checkpoint all ranks know how it went, before Trainer has them wait for each other."""

        def save() -> None:
            super(ResumableTrainer, self).save_model(output_dir, _internal_call)

        if self._saving is not None and output_dir is not None:
            self._saving.together(save, Path(output_dir))
        else:
            save()
