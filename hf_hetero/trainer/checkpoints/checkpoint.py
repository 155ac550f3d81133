"""A checkpoint of a planned run holds more than Trainer's files, and tells whether it is whole.

    checkpoint-is-incomplete.txt    there while it is written, or removed; transformers' name for it
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

from hf_hetero.data.streams.reading import Position
from hf_hetero.errors import HeteroError
from hf_hetero.trainer.checkpoints.removing import (
    RUN_FILE,
    STATE_FILE,
    newest_first,
    problem_by_mark,
)
from hf_hetero.trainer.checkpoints.safekeeping import seals_of

logger = logging.getLogger(__name__)

FORMAT = "hf-hetero-run/1"
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
        settings: by which it learns (`resuming.settings_of`); None: they are not known.
    """

    num_ranks: int
    order: dict[str, Any] = field(default_factory=dict[str, Any])
    stream: Position | None = None
    calibration: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a form that is ready for JSON."""
        stream = None if self.stream is None else self.stream.to_dict()
        data = {"format": FORMAT, "num_ranks": self.num_ranks, "order": self.order, "stream": stream}
        more = {"calibration": self.calibration, "settings": self.settings}
        return {**data, **{name: value for name, value in more.items() if value is not None}}


def problem_of(folder: Path) -> str | None:
    """Say why a checkpoint cannot be resumed; None if it can."""
    if not folder.is_dir():
        return "it does not exist"
    if (problem := problem_by_mark(folder)) is not None:
        return problem
    if not (folder / RUN_FILE).exists():
        return _problem_of_a_plain_one(folder)
    try:
        files = _seals_in(folder)
        with suppress(HeteroError):  # another version's, which is said when it is resumed
            run_of(folder)
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
    for path in newest_first(output_dir):
        if (problem := problem_of(path)) is None:
            return path, problems
        problems.append(f"{path.name}: {problem}.")
    return None, problems


def run_of(folder: Path) -> Run | None:
    """Read where a checkpoint's run was; None: a plain Trainer wrote it."""
    if not (folder / RUN_FILE).exists():
        return None
    data = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise HeteroError(f"{folder / RUN_FILE} is of format {data.get('format')!r}; this version reads {FORMAT!r}.")
    order: Any = data.get("order", {})
    stream: Any = data.get("stream")
    position, settings = None if stream is None else Position(**stream), data.get("settings")
    run = Run(data["num_ranks"], order, position, data.get("calibration"), settings)
    counts = [run.num_ranks, *([run.stream.epoch, run.stream.batches, run.stream.rows] if run.stream else [])]
    are_known = isinstance(order, dict) and isinstance(settings, dict | None)
    if not are_known or not all(type(count) is int for count in counts):
        raise TypeError(f"{folder / RUN_FILE} does not say where its run was")
    return run
