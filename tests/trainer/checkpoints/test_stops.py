"""A process that ends at any operation on files leaves checkpoints that are whole, or known not to be, and a whole one.

No moment is left to chance: a process is forked for each operation, and ends right before it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import often

from hf_hetero import HeteroError
from hf_hetero.trainer.checkpoints import saving
from hf_hetero.trainer.checkpoints.checkpoint import Run, newest_whole, problem_of
from hf_hetero.trainer.checkpoints.removing import INCOMPLETE_FILE, RUN_FILE
from hf_hetero.trainer.checkpoints.saving import Saving

EMPTY, CUT_SHORT, REMOVED = "it is empty", "its writing was cut short", "its removal was cut short"
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
"""Operations that change what is there, as `sys.audit` calls them; files that are opened to be written come beside."""
STOPPED, CUT = 9, 17
"""How a process ends that was stopped; bytes that it has then written of a file, which has more."""
FILES = ("trainer_state.json", "model.safetensors", "shards/rank_0.distcp", "optimizer.pt")
STEPS = {2: b"two" * 50, 4: b"four" * 50, 6: b"six" * 50, 8: b"eight" * 50, 104: b"four again" * 50}
"""What the files of each step hold; those of step 4, written again, stand under 104."""


class Stops:
    """Ends the process right before the operation of a number, in a folder.

    Args:
        folder: others' operations do not count.
        number: from 0.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.left = str(folder), number

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and self._is_in_folder(event, args):
            self.count()

    def _is_in_folder(self, event: str, args: tuple[Any, ...]) -> bool:
        # what `rmtree` removes is named within a folder that it has open
        within = args[-1] if event in ("os.remove", "os.rmdir") else -1
        path = os.fspath(args[0]) if not isinstance(args[0], int) else ""
        return (isinstance(within, int) and within >= 0) or str(path).startswith(self.folder)

    def count(self) -> None:
        if not self.left:
            os._exit(STOPPED)
        self.left -= 1


def stopped_at_each(act: Callable[[Callable[[], None]], None], folder: Path) -> Iterator[int]:
    """Give control back after each stop of `act`, with what it left in the folder, and at last after its end.

    Args:
        act: what is stopped; it is given what counts as one more operation, for what the interpreter does not tell.
        folder: in which it acts; it is as it was at each start.
    """
    kept, number, ended = folder.with_name("kept"), 0, STOPPED
    shutil.copytree(folder, kept)
    while ended == STOPPED:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        if not (child := os.fork()):
            stops = Stops(folder, number)
            sys.addaudithook(stops)
            try:
                act(stops.count)
            except BaseException:
                os._exit(1)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, STOPPED), ended
        yield number
        number += 1


def save(folder: Path, weights: bytes, count: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """What a trainer writes, the state before the weights; each file may stay half-written."""

    def saved() -> None:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        for name in FILES:
            with (folder / name).open("wb") as file:
                file.write(weights[:CUT])
                file.flush()
                count()
                file.write(weights[CUT:])

    return saved


def write(output: Path, step: int, limit: int | None = None, count: Callable[[], None] = lambda: None) -> None:
    folder, args = output / f"checkpoint-{step % 100}", SimpleNamespace(should_save=True, save_total_limit=limit)
    Saving(args, None, may_wait=False).write(save(folder, STEPS[step], count), folder, Run(2), lambda: None)  # type: ignore[arg-type]


def write_beside(output: Path, step: int, limit: int | None, count: Callable[[], None]) -> None:
    """The same, by what a thread calls later."""
    folder, args = output / f"checkpoint-{step}", SimpleNamespace(should_save=True, save_total_limit=limit)
    taken = SimpleNamespace(writes=[save(folder, STEPS[step], count)])

    def small() -> None:
        (folder / "trainer_state.json").write_bytes(STEPS[step])

    beside = Saving(args, None, may_wait=False, taken=taken)  # type: ignore[arg-type]
    beside.begin(small, folder, Run(2), lambda: None, None)()


def write_on_a_full_disk(output: Path, step: int, limit: int | None, count: Callable[[], None]) -> None:
    folder, args = output / f"checkpoint-{step % 100}", SimpleNamespace(should_save=True, save_total_limit=limit)

    def full() -> None:
        save(folder, STEPS[step], count)()
        raise OSError(28, "No space left on device")

    with pytest.raises(HeteroError, match="No space left"):
        Saving(args, None, may_wait=False).write(full, folder, Run(2), lambda: None)  # type: ignore[arg-type]


def cut_short(output: Path, step: int) -> None:
    """Leave a checkpoint whose last file was not written to its end."""
    write(output, step)
    folder = output / f"checkpoint-{step}"
    (folder / RUN_FILE).unlink()
    (folder / INCOMPLETE_FILE).touch()
    os.truncate(folder / "model.safetensors", CUT)


def plain(output: Path, step: int) -> None:
    save(output / f"checkpoint-{step}", STEPS[step])()


Leave = Callable[[Path], object]
Write = Callable[[Path, int, int | None, Callable[[], None]], None]
CASES: dict[str, tuple[Leave, Write, int, int | None, list[int]]] = {
    # what is there, how a checkpoint is written, its step, the limit, and which are there in the end
    "the first": (lambda output: None, write, 2, 1, [2]),
    "the next": (lambda output: write(output, 2), write, 4, 1, [4]),
    "beside training": (lambda output: write(output, 2), write_beside, 4, 1, [4]),
    "of several": (lambda output: [write(output, step) for step in (2, 4, 6)], write, 8, 2, [6, 8]),
    "again after a cut": (lambda output: (write(output, 2), cut_short(output, 4)), write, 4, 1, [4]),
    "past a cut": (lambda output: (write(output, 2), cut_short(output, 4)), write, 6, 2, [2, 6]),
    "again": (lambda output: write(output, 4), write, 104, 1, [104]),
    "again without a limit": (lambda output: write(output, 4), write, 104, None, [104]),
    "back from later ones": (lambda output: [write(output, step) for step in (2, 6, 8)], write, 4, 2, [2, 4]),
    "after a plain trainer's": (lambda output: plain(output, 8), write, 4, 1, [4]),
    "again a plain trainer's": (lambda output: plain(output, 4), write, 104, 1, [104]),
    "on a full disk": (lambda output: write(output, 2), write_on_a_full_disk, 4, 1, [2]),
    "again on a full disk": (lambda output: write(output, 4), write_on_a_full_disk, 104, 1, [4]),
}


def steps_in(output: Path) -> list[int]:
    """Steps of the checkpoints that are said to be whole, each of which must be."""
    found = []
    for folder in sorted(output.iterdir()):
        if (problem := problem_of(folder)) is not None:
            assert problem in (EMPTY, CUT_SHORT, REMOVED), (folder.name, problem)
            continue
        held = [(folder / name).read_bytes() if (folder / name).exists() else None for name in FILES]
        step = next((step for step, weights in STEPS.items() if held == [weights] * len(FILES)), None)
        assert step is not None, f"{folder.name} is said to be whole, and is not"
        found.append(step)
    return sorted(found)


def check_each_stop(tmp_path: Path, case: str) -> int:
    """Stop what a case writes at each operation; return at how many."""
    leave, act, step, limit, end = CASES[case]
    output = tmp_path / "output"
    output.mkdir()
    leave(output)
    before, number = steps_in(output), 0
    for number in stopped_at_each(lambda count: act(output, step, limit, count), output):
        there = steps_in(output)
        # a whole one goes only for the new one, or once the new one is whole
        assert step in there or set(before) <= set(there), (number, there)
        newest = newest_whole(output)[0]
        assert (newest is not None) == bool(there), number
        # and the run that is started again ends as it would have
        if act is not write_on_a_full_disk:
            write(output, step, limit)
            assert steps_in(output) == end, number
            assert all(problem_of(folder) is None for folder in output.iterdir()), number
    if act is write_on_a_full_disk:
        assert steps_in(output) == end
        assert len(list(output.iterdir())) == len(end)
    return number


FAST = ("the first", "the next", "again after a cut", "again on a full disk")


@pytest.mark.parametrize("case", often(CASES, *FAST))
def test_stopped_at_each_operation(tmp_path: Path, case: str) -> None:
    """What is there says that it is whole only if it is; what was whole stays until the new one is."""
    assert check_each_stop(tmp_path, case) > 10


def rmtree(folder: Path, stays_marked: bool = False) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def begin_in_place(folder: Path) -> None:
    """Mark a checkpoint where one stands that is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    saving.mark(folder, saving.WRITTEN)
    saving.clear(folder)


def begin_late(folder: Path) -> None:
    """Clear a folder before it is marked."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").touch()
    saving.mark(folder, saving.WRITTEN)


WRONG: list[tuple[str, Any, str, str]] = [
    ("removing.discard", rmtree, "the next", "it has no|is missing|is said to be whole"),
    ("removing.discard", rmtree, "back from later ones", "it has no|is missing|is said to be whole"),
    ("saving._begin", begin_in_place, "again", r"\[\]"),
    ("saving._begin", begin_late, "the first", "it has no"),
    ("saving._begin", begin_late, "again after a cut", "it has no|is said to be whole"),
]


@pytest.mark.parametrize(("what", "instead", "case", "problem"), WRONG)
def test_other_ways_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, instead: Any, case: str, problem: str
) -> None:
    """Folders that are removed at once, written over, or marked late leave what the law forbids."""
    monkeypatch.setattr(f"hf_hetero.trainer.checkpoints.{what}", instead)
    with pytest.raises(AssertionError, match=problem):
        check_each_stop(tmp_path, case)
