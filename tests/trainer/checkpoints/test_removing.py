"""What is removed is marked first, and stays marked where it cannot be removed; which ones go is a matter of steps."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import LENGTHS, samples, tiny_model, trained

from hf_hetero import HeteroError, HeteroTrainer
from hf_hetero.trainer.checkpoints import removing
from hf_hetero.trainer.checkpoints.checkpoint import Run, newest_whole, problem_of
from hf_hetero.trainer.checkpoints.removing import INCOMPLETE_FILE, aside, discard, drop_older, mark
from hf_hetero.trainer.checkpoints.saving import Saving

CUT_SHORT, REMOVED = "its writing was cut short", "its removal was cut short"


def checkpoints(folder: Path, *steps: int) -> dict[int, Path]:
    found = {step: folder / f"checkpoint-{step}" for step in steps}
    for step, path in found.items():
        path.mkdir()
        (path / "trainer_state.json").touch()
        os.utime(path, (1e9 - step, 1e9 - step))  # by the clock, the newest are the oldest
    return found


@pytest.mark.parametrize(
    ("there", "newest", "limit", "kept", "left"),
    [
        ((2, 4, 10), 10, 2, (), [4, 10]),
        ((2, 4, 10), 10, 1, (), [10]),
        ((2, 4, 10), 10, 5, (), [2, 4, 10]),
        ((2, 4, 10), 10, 1, (2,), [2, 10]),
        ((2, 4, 10), 10, 2, (2,), [2, 10]),
        ((2, 4, 6, 8), 4, 2, (), [2, 4]),  # trained again from 2: 6 and 8 are of the run before
        ((2, 100), 2, 1, (100,), [2, 100]),
    ],
)
def test_the_newest_stay(
    tmp_path: Path, there: tuple[int, ...], newest: int, limit: int, kept: tuple[int, ...], left: list[int]
) -> None:
    """Which checkpoints stay is a matter of steps, never of clocks; what was just written always stays."""
    found = checkpoints(tmp_path, *there)
    (tmp_path / "checkpoint-best").mkdir()
    drop_older(found[newest], limit, [str(found[step]) for step in kept])
    assert [step for step in there if found[step].exists()] == left
    assert (tmp_path / "checkpoint-best").exists()  # no checkpoint of a step


def test_what_is_not_whole_goes_first(tmp_path: Path) -> None:
    """It is no reason for a whole one to go, and counts for none."""
    found = checkpoints(tmp_path, 2, 4, 6, 8)
    (found[4] / "trainer_state.json").unlink()
    mark(found[8], removing.WRITTEN)  # and 4 is empty
    aside(found[2]).mkdir()
    drop_older(found[6], 2, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


def plain(folder: Path) -> Path:
    (folder / "shards").mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors", "shards/rank_0.distcp"):
        (folder / name).write_text("x")
    return folder


def test_discarded(tmp_path: Path) -> None:
    """It is gone; what a link leads to is not the run's; what is not there, or no folder, is left alone."""
    discard(plain(tmp_path / "checkpoint-2"))
    kept, link = plain(tmp_path / "kept"), tmp_path / "checkpoint-4"
    link.symlink_to(kept)
    discard(link)
    discard(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-8").touch()
    discard(tmp_path / "checkpoint-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8", "kept"]
    assert problem_of(kept) is None


def test_what_cannot_be_removed_stays_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another program holds a file of it open, on file systems that keep it then."""
    folder, unlink = plain(tmp_path / "checkpoint-2"), Path.unlink

    def held(path: Path, missing_ok: bool = False) -> None:
        if path.name == "model.safetensors":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    discard(folder)
    assert sorted(path.name for path in folder.iterdir()) == [INCOMPLETE_FILE, "model.safetensors"]
    assert problem_of(folder) == REMOVED
    monkeypatch.undo()
    discard(folder)
    assert not folder.exists()


def test_removed_from_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for the mark, a file becomes it."""
    folder, write, seen = plain(tmp_path / "checkpoint-2"), Path.write_bytes, list[str | None]()

    def full(path: Path, data: bytes) -> int:
        if path.name == INCOMPLETE_FILE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    def cleared(path: Path) -> bool:
        seen.append(problem_of(path))
        return clear(path)

    clear = removing.clear
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(removing, "clear", cleared)
    discard(folder)
    assert seen == [CUT_SHORT]
    assert not folder.exists()


def test_others_may_still_write(tmp_path: Path) -> None:
    """Where a rank cannot tell the others at once that it has failed, what they write on stays marked."""
    folder, args = tmp_path / "checkpoint-2", SimpleNamespace(should_save=True, save_total_limit=1)

    def save() -> None:
        plain(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(HeteroError, match="No space left"):
        Saving(args, None, may_wait=True).write(save, folder, Run(2), lambda: None)  # type: ignore[arg-type]
    assert [path.name for path in folder.iterdir()] == [INCOMPLETE_FILE]
    (folder / "rank_1.distcp").write_text("x")
    assert problem_of(folder) == REMOVED


def test_set_aside(tmp_path: Path) -> None:
    """One that is set aside is found, after the one in its place, and before older ones."""
    folder = plain(tmp_path / "checkpoint-4")
    plain(tmp_path / "checkpoint-2")
    removing.set_aside(folder)
    assert newest_whole(tmp_path) == (aside(folder), [])
    mark(plain(folder), removing.WRITTEN)
    assert newest_whole(tmp_path) == (aside(folder), [f"checkpoint-4: {CUT_SHORT}."])
    discard(folder)
    removing.put_back(folder)
    assert newest_whole(tmp_path) == (folder, [])
    assert not aside(folder).exists()


class Worsening(HeteroTrainer):
    """Each evaluation is worse than the one before."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, eval_dataset=samples(LENGTHS[:4]))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"eval_loss": float(self.state.global_step)}


@pytest.mark.parametrize("is_loaded", [True, False])
def test_the_best_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_loaded: bool) -> None:
    """Where Trainer deletes all but the best at the end of training, they are removed as all others are."""
    removed, rmtree = list[str](), shutil.rmtree

    def watched(path: Any, *args: Any, **kwargs: Any) -> None:
        removed.append(Path(str(path)).name)
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": is_loaded, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    trained(tiny_model(), samples(LENGTHS), Worsening, output_dir=str(tmp_path), save_total_limit=1, **steps, **best)
    assert {path.name: problem_of(path) for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1": None}
    assert not [name for name in removed if name.startswith("checkpoint-")]
