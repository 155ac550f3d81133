"""A checkpoint of a planned run holds more than Trainer's files, and tells whether it is whole.

    checkpoint-is-incomplete.txt    there while it is written; transformers' name for it
    hetero_cost_model.json          the cost model that its plans were made by
    hetero_run.json                 written last: where the run was, and every file's size and checksum

A checkpoint is whole if the first is absent and all files are as the second says. One without either was written by a
plain Trainer and is taken as it is, if it has weights and trainer_state.json.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_hetero.data.streams.reading import Position
from hf_hetero.errors import ConfigError, HeteroError
from hf_hetero.ranks.agreement import broadcast
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.trainer.checkpoints.safekeeping import seals_of, steps_of

logger = logging.getLogger(__name__)

FORMAT = "hf-hetero-run/1"
RUN_FILE = "hetero_run.json"
INCOMPLETE_FILE = "checkpoint-is-incomplete.txt"
STATE_FILE = "trainer_state.json"
WEIGHTS = (".safetensors", ".bin", ".index.json", ".distcp")
"""Ends of the names of files with weights, as transformers, peft and torch write them."""
WHOLE = 2
"""Numbers of a file's seal: size and checksum. Where there are more, they are of its ends."""


@dataclass(frozen=True, slots=True)
class Run:
    """A `Run` says where a run was.

    Args:
        num_ranks: it ran on.
        order: what decides which samples make which step.
        stream: how far its stream was read; None: the dataset is no stream.
        calibration: what the next refit of its cost model needs (`CalibrationCallback.state`); None: there is none.
    """

    num_ranks: int
    order: dict[str, Any] = field(default_factory=dict[str, Any])
    stream: Position | None = None
    calibration: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a form that is ready for JSON."""
        stream = None if self.stream is None else self.stream.to_dict()
        data = {"format": FORMAT, "num_ranks": self.num_ranks, "order": self.order, "stream": stream}
        return data if self.calibration is None else {**data, "calibration": self.calibration}


def problem_of(folder: Path) -> str | None:
    """Say why a checkpoint cannot be resumed; None if it can."""
    if not folder.is_dir():
        return "it does not exist"
    if (folder / INCOMPLETE_FILE).exists():
        return "its writing was cut short"
    if not (folder / RUN_FILE).exists():
        return _problem_of_a_plain_one(folder)
    try:
        files = _seals_in(folder)
        with suppress(HeteroError):  # another version's, which is said when it is resumed
            _run_of(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"its {RUN_FILE} cannot be read"
    if not files:
        return f"its {RUN_FILE} names no file"
    for name, seal in files.items():
        path = folder / name
        if not os.path.isfile(path):  # also a name that no file can have
            return f"{name} is missing"
        if path.stat().st_size != seal[0]:
            return f"{name} has {path.stat().st_size} bytes instead of {seal[0]}"
    seals = seals_of({folder / name: len(seal) > WHOLE for name, seal in files.items()}, "Checking a checkpoint")
    for (name, seal), now in zip(files.items(), seals, strict=True):
        if now != seal:
            return f"the content of {name} has changed"
    return None


def _problem_of_a_plain_one(folder: Path) -> str | None:
    """Say what a checkpoint that a plain Trainer wrote lacks of what it cannot do without; more cannot be known."""
    if not (folder / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}"
    if not any(path.name.endswith(WEIGHTS) and path.name != "training_args.bin" for path in folder.rglob("*")):
        return "it has no weights"
    return None


def _seals_in(folder: Path) -> dict[str, list[int]]:
    """Return the seals of a checkpoint's files, by name, as it has them written down.

    Raises:
        ValueError: it has not.
    """
    data: Any = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not isinstance(files := data.get("files"), dict):
        raise ValueError("no files")
    for name, seal in files.items():
        # names are read from a file that may come from anywhere: they must not lead out of the checkpoint
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError("a file elsewhere")
        if not isinstance(seal, list) or len(seal) < WHOLE or not all(type(number) is int for number in seal):
            raise ValueError("no seal")
    return files


def newest_whole(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run, and why those after it cannot be resumed."""
    problems: list[str] = []
    for _, path in sorted(steps_of(output_dir).items(), reverse=True):
        if (problem := problem_of(path)) is None:
            return path, problems
        problems.append(f"{path.name}: {problem}.")
    return None, problems


def chosen(requested: str | bool, output_dir: Path) -> tuple[Path, Run | None, list[str]]:
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
        return newest, _run_of(newest), problems
    folder = Path(str(requested))
    if (problem := problem_of(folder)) is not None:
        other = newest_whole(output_dir)[0] or newest_whole(folder.parent)[0]
        remedy = f"The newest whole one is {other}" if other is not None else "There is no whole one beside it"
        raise ConfigError(
            f"The checkpoint {folder} cannot be resumed: {problem}. {remedy}. (If its files were changed on purpose, "
            f"remove {RUN_FILE}.)"
        )
    return folder, _run_of(folder), []


@dataclass(frozen=True, slots=True)
class Resumed:
    """A `Resumed` is a checkpoint that a run goes on from.

    Args:
        folder: of the checkpoint.
        run: where its run was; None: a plain Trainer wrote it.
    """

    folder: Path
    run: Run | None


def chosen_together(requested: str | bool, args: TrainingArguments, timeout_s: float) -> Resumed:
    """Choose the checkpoint to resume, the same on all ranks. A collective of all of them.

    Args:
        requested: a folder; or True: the newest whole one.
        args: of the run.
        timeout_s: seconds that ranks may wait for each other.

    Raises:
        ConfigError: the folder cannot be resumed, or there is none; raised on every rank.
    """
    # its cost model decides which groups there are, so they cannot carry this yet
    messengers = GroupPool((), timeout_s, args.ddp_timeout)
    try:
        output_dir = Path(args.output_dir or ".")
        folder, run, passed_over = broadcast(lambda: chosen(requested, output_dir), messengers.control)
    finally:
        messengers.close()
    if passed_over and args.process_index == 0:
        logger.warning("Resuming from %s. Passed over: %s", folder, " ".join(passed_over))
    return Resumed(folder, run)


def _run_of(folder: Path) -> Run | None:
    """Read where a checkpoint's run was; None: a plain Trainer wrote it."""
    if not (folder / RUN_FILE).exists():
        return None
    data = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise HeteroError(f"{folder / RUN_FILE} is of format {data.get('format')!r}; this version reads {FORMAT!r}.")
    order: Any = data.get("order", {})
    stream: Any = data.get("stream")
    run = Run(data["num_ranks"], order, None if stream is None else Position(**stream), data.get("calibration"))
    counts = [run.num_ranks, *([run.stream.epoch, run.stream.batches, run.stream.rows] if run.stream else [])]
    if not isinstance(order, dict) or not all(type(count) is int for count in counts):
        raise TypeError(f"{folder / RUN_FILE} does not say where its run was")
    return run
