"""What Trainer's loop counts by: samples of a step, batches of a step, steps of an epoch, and where it begins.

Trainer counts all of these by ranks: a step takes so many samples from each. A run whose ranks come and go says how
many samples a step takes over all of them (`HeteroConfig.global_batch_size`), and its steps stay what they were.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_hetero.config import HeteroConfig
from hf_hetero.data.loader import sampler_of
from hf_hetero.data.streams.stream import is_stream, num_rows_of
from hf_hetero.errors import ConfigError
from hf_hetero.step import StepBatch, StepPart
from hf_hetero.trainer.training import Training


@dataclass(frozen=True, slots=True)
class CountedLoader:
    """A `CountedLoader` is what Trainer asks of a loader when it counts.

    Args:
        dataset: that the loader draws from.
        num_batches: of an epoch.
    """

    dataset: Any
    num_batches: int

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        return self.num_batches


class CountsByStep(Trainer):
    """`CountsByStep` has Trainer's loop count the samples of a step as the settings say, by ranks or over all of them.

    Attributes:
        hetero: the settings.
        _training: what `train` has open; None otherwise.
    """

    hetero: HeteroConfig
    _training: Training | None

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the samples of an optimizer step, over all ranks."""
        return self.hetero.global_batch_size or super().get_total_train_batch_size(args)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader[Any]) -> Any:
        """Count steps and epochs as Trainer does, where batches take as many samples as the settings say."""
        counted: Any = dataloader
        if self.hetero.global_batch_size is not None:
            counted = _counted(self, args, dataloader)
        return super().set_initial_training_values(args, counted)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Begin as Trainer does; but how many epochs of a stream there were, only the checkpoint knows."""
        trained: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self._training is None:
            return trained
        # a step is over before Trainer asks whether it was the last: where a job ended after that, it would do another
        if self._training.resumes_by_itself and self.state.global_step >= max_steps:
            return num_train_epochs, 0
        data = self._training.data
        if data is None or data.entered is None:
            return trained
        return data.entered.epoch, data.entered.batches * self.args.gradient_accumulation_steps

    def _parts_of(self, batch: StepBatch, num_batches: int) -> list[StepPart]:
        """Return a step as so many batches as Trainer's own loader has of its rows, because its loop counts them.

        Args:
            batch: this rank's share of the step.
            num_batches: that Trainer asks for.
        """
        args, planned = self.args, self._training.accumulation if self._training is not None else None
        if planned is not None and args.gradient_accumulation_steps != planned:
            raise ConfigError(
                f"gradient_accumulation_steps was {planned} and is {args.gradient_accumulation_steps}: it was changed "
                "while training, and coming steps are planned already. Change it between two calls of train()."
            )
        return [*batch.parts(min(num_batches, -(-batch.share.step.drawn.num_rows // rows_at_once(self))))]


def rows_at_once(trainer: Trainer) -> int:
    """Return the rows of one batch, over all ranks."""
    args = trainer.args
    return trainer.get_total_train_batch_size(args) // args.gradient_accumulation_steps


def check_global_batch(global_batch_size: int | None, args: TrainingArguments) -> None:
    """Refuse a step that cannot be cut into as many batches as were asked for.

    Raises:
        ConfigError: with both numbers.
    """
    if global_batch_size is not None and global_batch_size % args.gradient_accumulation_steps:
        raise ConfigError(
            f"HeteroConfig.global_batch_size={global_batch_size} does not divide by gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: Trainer counts so many batches a step. Leave that at 1: plans cut a "
            "step into micro-batches as memory asks for."
        )


def _counted(trainer: Trainer, args: TrainingArguments, loader: DataLoader[Any]) -> Any:
    """Return what stands for a loader where Trainer counts its batches; the loader, where it has no length."""
    dataset: Any = trainer.train_dataset
    source: Sized = dataset if is_stream(dataset) else sampler_of(loader)
    if (num_rows := num_rows_of(source)) is None:
        return loader
    whole, rest = divmod(num_rows, rows_at_once(trainer))
    return CountedLoader(loader.dataset, whole + bool(rest and not args.dataloader_drop_last))
