"""A checkpoint that is written or removed is marked meanwhile, so that what is left of it is known not to be whole.

The mark is there before anything else of the folder changes, and goes last. So whatever ends the process, at whatever
moment, a folder is whole, marked, or empty.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from hf_hetero.trainer.checkpoints.safekeeping import settle

INCOMPLETE_FILE = "checkpoint-is-incomplete.txt"
"""The mark; transformers' name for it."""
RUN_FILE = "hetero_run.json"
STATE_FILE = "trainer_state.json"
WRITTEN = b"It is being written, or its writing was cut short.\n"
REMOVED = b"It is being removed, or its removal was cut short.\n"
BEFORE = ".before"
"""Ends the name of a whole checkpoint whose step is being written again."""
CHECKPOINT = re.compile(rf"checkpoint-(\d+)({re.escape(BEFORE)})?")


def mark(folder: Path, text: bytes) -> None:
    """Mark a folder as not whole."""
    (folder / INCOMPLETE_FILE).write_bytes(text)


def problem_by_mark(folder: Path) -> str | None:
    """Say why a folder is not whole by its mark, or being empty: so it is before the mark comes and after it goes."""
    path = folder / INCOMPLETE_FILE
    if not path.exists():
        return None if any(folder.iterdir()) else "it is empty"
    with suppress(OSError):
        if path.read_bytes() == REMOVED:
            return "its removal was cut short"
    return "its writing was cut short"


def steps_of(output_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder, by their steps; without those that are set aside."""
    return {step: path for step, is_aside, path in _found(output_dir) if not is_aside}


def newest_first(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a folder, with those that are set aside, each after the one in its place."""
    return [path for *_, path in sorted(_found(output_dir), key=lambda one: (-one[0], one[1]))]


def _found(output_dir: Path) -> list[tuple[int, bool, Path]]:
    """Return step, whether it is set aside, and path of each checkpoint."""
    names = {path: CHECKPOINT.fullmatch(path.name) for path in output_dir.glob("checkpoint-*")}
    return [(int(name[1]), name[2] is not None, path) for path, name in names.items() if name is not None]


def aside(folder: Path) -> Path:
    """Return where a checkpoint is set aside."""
    return folder.with_name(folder.name + BEFORE)


def set_aside(folder: Path) -> None:
    """Keep a checkpoint whose step is about to be written again, under another name, until the new one is whole."""
    if not folder.is_symlink():
        discard(aside(folder))
        with suppress(OSError):  # a file system that renames no folder: it is written over
            folder.rename(aside(folder))


def put_back(folder: Path) -> None:
    """Give a checkpoint that is set aside its place again, if that is free."""
    with suppress(OSError):
        aside(folder).rename(folder)


def clear(folder: Path) -> bool:
    """Remove all that is in a folder, but the mark; return whether that is so."""
    for path in folder.iterdir():
        if path.name == INCOMPLETE_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    return [path.name for path in folder.iterdir()] == [INCOMPLETE_FILE]


def discard(folder: Path, stays_marked: bool = False) -> None:
    """Remove a checkpoint, as far as that can be done; what cannot be removed stays marked.

    Args:
        folder: of the checkpoint; a link is left alone, with what it leads to.
        stays_marked: the empty folder stays, with its mark, for others may still write into it.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    with suppress(OSError):
        try:
            mark(folder, REMOVED)
            settle([folder / INCOMPLETE_FILE, folder])
        except OSError:  # on a full disk: this takes no room
            if not (folder / INCOMPLETE_FILE).exists():
                (folder / STATE_FILE).replace(folder / INCOMPLETE_FILE)
        if clear(folder) and not stays_marked:
            (folder / INCOMPLETE_FILE).unlink()
            folder.rmdir()


def drop_older(newest: Path, limit: int, others: Collection[str]) -> None:
    """Delete all but some checkpoints: first what is not whole, then those of a run before, then by their steps.

    Their times are not looked at: clocks go back, and copies have other ones.

    Args:
        newest: the one that was just written; it stays. Later ones are of a run before.
        limit: how many stay.
        others: that stay, whatever their steps.
    """
    steps = steps_of(newest.parent)
    now = next(step for step, path in steps.items() if path == newest)
    oldest_first = [*(s for s in sorted(steps) if s > now), *(s for s in sorted(steps) if s < now)]
    stay = {os.path.realpath(path) for path in others}
    may_go = [steps[step] for step in oldest_first if os.path.realpath(steps[step]) not in stay]
    # of no use to anybody, and no reason for a whole one to go
    useless = [path for path in may_go if problem_by_mark(path) is not None]
    set_apart = [path for _, is_aside, path in _found(newest.parent) if is_aside]
    whole = [path for path in may_go if path not in useless]
    for path in [*useless, *set_apart, *whole[: max(0, len(steps) - len(useless) - limit)]]:
        discard(path)
