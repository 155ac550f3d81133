"""Which checkpoint a run goes on from: the one that is asked for; or, where a job is started again, its own newest.

A job may be started again without a word: by `torchrun`, after a rank was lost or a node came; by whoever schedules
jobs. With `HeteroConfig.auto_resume` it goes on from the newest whole checkpoint of its output folder. That must be its
own: the settings by which it learns are compared here, and its data once they are open (`training_steps.check_order`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_hetero.config import HeteroConfig
from hf_hetero.errors import ConfigError
from hf_hetero.model.wrapped import base_model
from hf_hetero.ranks.agreement import broadcast, raise_together
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.trainer.checkpoints.checkpoint import RUN_FILE, Run, newest_whole, problem_of, run_of

logger = logging.getLogger(__name__)

Choice = tuple[Path | None, Run | None, list[str]]
"""A checkpoint, where its run was, and why newer ones are passed over; None: there is none to resume."""
LEARNS_BY = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
)
"""Those of `TrainingArguments` by which a run is known again: another value is another run."""
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""How often `torchrun` has started the ranks of this node again because one failed."""
MOST_RESTARTS = "TORCHELASTIC_MAX_RESTARTS"
SHARES_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Whether ranks meet at a store of `torchrun` itself, which it keeps while it starts them again."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """A `Resumed` is a checkpoint that a run goes on from.

    Args:
        folder: of the checkpoint.
        run: where its run was; None: a plain Trainer wrote it.
        is_own: it was found to be of this run, which goes on by itself; nobody asked for it.
    """

    folder: Path
    run: Run | None
    is_own: bool = False


def to_resume(
    trainer: Trainer, hetero: HeteroConfig, requested: str | bool | None, has_trained: bool
) -> Resumed | None:
    """Choose the checkpoint that `train` goes on from. A collective of all ranks.

    Args:
        trainer, hetero: of the run.
        requested: of `train`: a folder; True: the newest whole one; False: none; None: by the settings.
        has_trained: the trainer has, in this process: what it does now is no job that was started again.

    Raises:
        ConfigError: what was asked for cannot be resumed, or the newest is of another run; raised on every rank.
    """
    args, output_dir = trainer.args, Path(trainer.args.output_dir or ".")
    if requested:
        return chosen_together(lambda: chosen(requested, output_dir), args, hetero.group_timeout_s)
    if requested is False or has_trained or trainer.hp_search_backend is not None:
        return None
    if not hetero.auto_resume:
        _say_what_is_left(output_dir, args)
        return None
    if args.ignore_data_skip:
        raise ConfigError(
            "HeteroConfig.auto_resume goes on at the sample where the run was, and ignore_data_skip=True would begin "
            "its data anew: choose one of them."
        )
    _say_what_would_fail(args)
    settings = settings_of(trainer)
    found = chosen_together(lambda: _own(output_dir, settings), args, hetero.group_timeout_s)
    if args.process_index == 0:
        _say_where(found, output_dir, args.world_size)
    return None if found is None else replace(found, is_own=True)


# ------------------------------------------------------------------------------------------------------ asked for


def chosen(requested: str | bool, output_dir: Path) -> Choice:
    """Choose the checkpoint to resume; return it, where its run was, and why newer ones are passed over.

    Args:
        requested: a folder; or True: the newest whole one.
        output_dir: of the run.

    Raises:
        ConfigError: the folder cannot be resumed, or there is none, with the reason and a remedy.
    """
    if requested is True:
        newest, problems = newest_whole(output_dir)
        if newest is None:
            reasons = " ".join(problems) or "There is none."
            raise ConfigError(f"No checkpoint of {output_dir} can be resumed. {reasons} Train without it.")
        return newest, run_of(newest), problems
    folder = Path(str(requested))
    if (problem := problem_of(folder)) is not None:
        other = newest_whole(output_dir)[0] or newest_whole(folder.parent)[0]
        remedy = f"The newest whole one is {other}" if other is not None else "There is no whole one beside it"
        raise ConfigError(
            f"The checkpoint {folder} cannot be resumed: {problem}. {remedy}. (If its files were changed on purpose, "
            f"remove {RUN_FILE}.)"
        )
    return folder, run_of(folder), []


def chosen_together(choose: Callable[[], Choice], args: TrainingArguments, timeout_s: float) -> Resumed | None:
    """Choose the checkpoint to resume, the same on all ranks. A collective of all of them.

    Args:
        choose: is called on rank 0.
        args: of the run.
        timeout_s: seconds that ranks may wait for each other.

    Returns:
        The checkpoint; None: there is none to resume.

    Raises:
        ConfigError: what `choose` raises, or a rank does not see the folder; raised on every rank.
    """
    # its cost model decides which groups there are, so they cannot carry this yet
    messengers = GroupPool((), timeout_s, args.ddp_timeout)
    try:
        folder, run, passed_over = broadcast(choose, messengers.control)
        unseen = f"does not see the checkpoint {folder}. Let output_dir be on a file system that all nodes share."
        is_seen = folder is None or folder.is_dir()
        raise_together(None if is_seen else ConfigError(f"This node {unseen}"), messengers.control)
    finally:
        messengers.close()
    if passed_over and args.process_index == 0:
        logger.warning("Resuming from %s. Passed over: %s", folder or "no checkpoint", " ".join(passed_over))
    return None if folder is None else Resumed(folder, run)


# ------------------------------------------------------------------------------------------------- found to be its own


def settings_of(trainer: Trainer) -> dict[str, Any]:
    """Return, ready for JSON, the settings by which a run is known again."""
    config: Any = base_model(trainer.model).config
    found = {name: _plain(getattr(trainer.args, name)) for name in LEARNS_BY if hasattr(trainer.args, name)}
    return {"model_type": config.model_type, "model": str(config.name_or_path), **found}


def _plain(value: Any) -> Any:
    """Return a setting as JSON keeps it."""
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _own(output_dir: Path, settings: dict[str, Any]) -> Choice:
    """Choose the newest whole checkpoint of a folder, if the run that wrote it learns by these settings.

    Raises:
        ConfigError: it is of another run, or cannot be told from one; with what differs, and what to do.
    """
    newest, problems = newest_whole(output_dir)
    if newest is None:
        return None, None, problems
    run = run_of(newest)
    if run is None or run.settings is None:
        raise ConfigError(_of_another_run(newest, "it does not say by which settings its run learned"))
    for name, value in settings.items():
        if name in run.settings and run.settings[name] != value:
            was = f"its run had {name}={run.settings[name]!r}, and this one has {value!r}"
            raise ConfigError(_of_another_run(newest, was))
    return newest, run, problems


def _of_another_run(folder: Path, difference: str) -> str:
    """Say why a checkpoint is not resumed by itself, and what to do."""
    return (
        f"HeteroConfig.auto_resume does not go on from {folder}: {difference}. To go on from it, ask for it: "
        f"train(resume_from_checkpoint={str(folder)!r}). To begin anew, choose another output_dir, or remove it."
    )


def _say_where(found: Resumed | None, output_dir: Path, num_ranks: int) -> None:
    """Log where a run goes on by itself: nobody has asked for it by name."""
    if found is None:
        logger.warning(
            "No whole checkpoint in %s: training begins at the start (HeteroConfig.auto_resume).", output_dir
        )
        return
    assert found.run is not None
    before = found.run.num_ranks
    ranks = f"{num_ranks} ranks" if before == num_ranks else f"{num_ranks} ranks, {before} before"
    logger.warning("Going on from %s, on %s (HeteroConfig.auto_resume).", found.folder, ranks)


def _say_what_is_left(output_dir: Path, args: TrainingArguments) -> None:
    """Log that a job that was started again begins anew, where it could go on."""
    restarts = os.environ.get(RESTARTS, "0")
    if args.process_index == 0 and restarts != "0" and any(output_dir.glob("checkpoint-*")):
        logger.warning(
            "torchrun has started this job again (%s = %s), and it begins anew, though %s has checkpoints. "
            "HeteroConfig.auto_resume=True would go on from the newest whole one.",
            RESTARTS,
            restarts,
            output_dir,
        )


def _say_what_would_fail(args: TrainingArguments) -> None:
    """Log, at the first start, why a launcher's next one would fail: then it is torch that ends, in words of its own.

    gloo, and NCCL, leave in the store where a rank is to be reached, and take the address of a rank that is gone for
    that of the one in its place.
    """
    may_restart = os.environ.get(MOST_RESTARTS, "0") != "0" and args.world_size > 1
    if args.process_index == 0 and may_restart and os.environ.get(SHARES_STORE) == "True":
        logger.warning(
            "torchrun keeps the store in which ranks find each other when it starts them again, and they would look "
            "for those that are gone. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 beside --rdzv-backend c10d."
        )
