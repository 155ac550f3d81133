"""What of a trainer is large is taken as it is when a checkpoint is due, to be written while training goes on.

The rest (random numbers, the trainer's state, the cost model) is small, and written at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hf_hetero.checks.overrides import own
from hf_hetero.trainer.checkpoints import sharded
from hf_hetero.trainer.checkpoints.host_copies import HostCopies

WRITERS = (
    "save_model",
    "_save",
    "_save_checkpoint",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "_save_scaler",
    "_push_from_checkpoint",
)
"""Methods that write a checkpoint, or read what was written."""


def reason_against(trainer: Trainer) -> str | None:
    """Say why a trainer's checkpoints cannot be written beside training; None if they can."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    for name, owner in own(trainer, WRITERS).items():
        return f"{owner}.{name} is its own, and may look at the model, or at the files, while neither is as it expects"
    if trainer.is_fsdp_enabled and (kind := sharded.kind_of(trainer)) not in (sharded.FULL, sharded.SHARDED):
        return f"state_dict_type={kind} is written by accelerate alone"
    if is_peft_model(model):
        prompts = [name for name, config in model.peft_config.items() if config.is_prompt_learning]
        return f"peft reads the prompts of {prompts[0]!r} from the model itself" if prompts else None
    if getattr(model, "hf_quantizer", None) is not None:
        return "the weights of a quantised model are read from the model itself"
    return None


class Taken:
    """`Taken` is what was taken for a checkpoint, and what writes it.

    Args:
        trainer: whose it is.
        group: of all ranks, for what they do together beside training; None where weights are not sharded.

    Attributes:
        writes: what this rank is to write, in order; where weights are sharded, as many on each rank.
        is_pushed: Trainer has asked to push the checkpoint.
    """

    def __init__(self, trainer: Trainer, group: dist.ProcessGroup | None) -> None:
        self.writes: list[Callable[[], object]] = []
        self.is_pushed = False
        self._group = group
        self._trainer: Any = trainer
        groups: list[dict[str, Any]] = self._trainer.optimizer.param_groups
        model = cast("torch.nn.Module", trainer.model)
        self._copies = HostCopies(model, (weight for group in groups for weight in group["params"]))
        self.writes.append(self._copies.wait)

    def model(self, folder: Path) -> None:
        """Take the weights, as `Trainer.save_model` does."""
        trainer = self._trainer
        if self._group is None:
            if trainer.args.should_save:
                self.writes.append(partial(trainer._save, str(folder), self._copies.of(trainer.model.state_dict())))
        elif sharded.kind_of(trainer) == sharded.FULL:
            shards, group = self._copies.of(sharded.shards_of_model(trainer.model, False, is_full=True)), self._group

            def write() -> None:
                whole = sharded.gathered(shards, group)
                if trainer.args.should_save:
                    trainer._save(str(folder), whole)

            self.writes.append(write)

    def optimizer_and_scheduler(self, folder: Path) -> None:
        """Take their states, and under FSDP2 the weights as training needs them, as Trainer's method does."""
        trainer = self._trainer
        if self._group is None:
            if trainer.args.should_save:
                state = self._copies.of(trainer.optimizer.state_dict())
                self.writes.append(partial(torch.save, state, folder / OPTIMIZER_NAME))
        else:
            self._shards(folder, self._group)
        if trainer.args.should_save:
            state = copy.deepcopy(trainer.lr_scheduler.state_dict())
            self.writes.append(partial(torch.save, state, folder / SCHEDULER_NAME))
        elif self._group is not None:
            self.writes.append(lambda: None)  # each rank has as many, for they meet after each

    def is_all(self) -> None:
        """Note that nothing more is taken."""
        self._copies.asked_for()

    def _shards(self, folder: Path, group: dist.ProcessGroup) -> None:
        trainer, is_full = self._trainer, sharded.kind_of(self._trainer) == sharded.FULL
        model = sharded.shards_of_model(trainer.model, bool(is_peft_model(trainer.model)), is_full)
        optimizer = sharded.shards_of_optimizer(trainer.model, trainer.optimizer)
        for what, shards in (("model", model), ("optimizer", optimizer)):
            self.writes.append(partial(sharded.write, what, self._copies.of(shards), folder, is_full, group))
