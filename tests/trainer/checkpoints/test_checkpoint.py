"""A checkpoint is known to be whole, or why not; the newest whole one is found; other data are refused."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from hf_hetero import HeteroError
from hf_hetero.data.streams.reading import Position
from hf_hetero.data.training_steps import check_order
from hf_hetero.errors import CollectiveFailed, ConfigError
from hf_hetero.trainer.checkpoints.checkpoint import Run, newest_whole, problem_of
from hf_hetero.trainer.checkpoints.removing import INCOMPLETE_FILE, RUN_FILE
from hf_hetero.trainer.checkpoints.resuming import chosen
from hf_hetero.trainer.checkpoints.safekeeping import END_BYTES
from hf_hetero.trainer.checkpoints.saving import Saving

ORDER = {"rows": 20, "batch_size": 8, "seed": 7, "shuffle": True, "drop_last": False, "lengths": "ab12"}
RUN = Run(4, ORDER, Position(1, 2, 16, {"examples": 3}))


def arguments_of(limit: int | None = None, should_save: bool = True) -> Any:
    return SimpleNamespace(should_save=should_save, save_total_limit=limit)


def files_of(folder: Path) -> Callable[[], None]:
    """Writes what a trainer would."""

    def save() -> None:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20000)
        (folder / "shards" / "rank_0.distcp").write_bytes(b"weights")
        (folder / "trainer_state.json").write_text("{}")

    return save


def write(output: Path, step: int, limit: int | None = None, best: str | None = None, save: Any = None) -> Path:
    folder = output / f"checkpoint-{step}"
    Saving(arguments_of(limit), None, may_wait=False).write(save or files_of(folder), folder, RUN, lambda: best)
    return folder


def test_whole(tmp_path: Path) -> None:
    """What was written is whole, and says where the run was."""
    folder = write(tmp_path, 3)
    assert problem_of(folder) is None
    assert not (folder / INCOMPLETE_FILE).exists()
    assert chosen(True, tmp_path) == (folder, RUN, [])
    assert chosen(str(folder), tmp_path) == (folder, RUN, [])
    data = json.loads((folder / RUN_FILE).read_text())
    assert data["format"] == "hf-hetero-run/1"
    assert set(data["files"]) == {"model.safetensors", "shards/rank_0.distcp", "trainer_state.json"}


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def zero_tail(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))


def spoil_head(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"<html>" + path.read_bytes()[6:])


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (cut, "model.safetensors has 5119999 bytes instead of 5120000"),
    (zero_tail, "the content of model.safetensors has changed"),
    (spoil_head, "the content of model.safetensors has changed"),
    (lambda folder: (folder / "shards" / "rank_0.distcp").unlink(), "shards/rank_0.distcp is missing"),
    (lambda folder: (folder / INCOMPLETE_FILE).touch(), "its writing was cut short"),
    (lambda folder: (folder / RUN_FILE).write_text("{"), f"its {RUN_FILE} cannot be read"),
    (lambda folder: (folder / RUN_FILE).write_text("[]"), f"its {RUN_FILE} cannot be read"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES)
def test_damaged(tmp_path: Path, damage: Callable[[Path], Any], problem: str) -> None:
    """A damaged checkpoint is passed over, with the reason; asked for by name, it is refused with the one to take."""
    older, newer = write(tmp_path, 2), write(tmp_path, 10)
    damage(newer)
    assert problem_of(newer) == problem
    assert newest_whole(tmp_path) == (older, [f"checkpoint-10: {problem}."])
    assert chosen(True, tmp_path)[0] == older
    with pytest.raises(ConfigError) as refused:
        chosen(str(newer), tmp_path)
    assert problem in str(refused.value)
    assert str(older) in str(refused.value)


ODD_RUNS: list[dict[str, Any]] = [
    *({"files": files} for files in (None, [], 3, {"a": None}, {"a": []}, {"a": ["1", 2]}, {"a": {"b": 1}})),
    *({"files": {name: [1, 2]}} for name in ("/etc/passwd", "../other", "a/../../b")),
    *({"num_ranks": ranks} for ranks in (None, "4", 1.5, True)),
    *({"order": order} for order in (None, [], "x")),
    *({"settings": settings} for settings in ([], "x", 3)),
    *({"stream": stream} for stream in ([], "x", 3, {"epochs": 1}, {"epoch": "1"}, {"rows": None})),
]


@pytest.mark.parametrize("changes", ODD_RUNS)
def test_odd_runs_are_passed_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever stands where a run should: the checkpoint before it is taken, and no file elsewhere is looked at."""
    older, newer = write(tmp_path, 2), write(tmp_path, 10)
    data = json.loads((newer / RUN_FILE).read_text())
    (newer / RUN_FILE).write_text(json.dumps({**data, **changes}))
    assert chosen(True, tmp_path) == (older, RUN, [f"checkpoint-10: its {RUN_FILE} cannot be read."])


@pytest.mark.parametrize(
    "content", [b"null", b"3", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": "hf-hetero-run/1"}']
)
def test_what_is_no_run_is_passed_over(tmp_path: Path, content: bytes) -> None:
    """The same for any content of the file, and for names that no file can have."""
    older, newer = write(tmp_path, 2), write(tmp_path, 10)
    data = json.loads((newer / RUN_FILE).read_text())
    (newer / RUN_FILE).write_bytes(content)
    assert chosen(True, tmp_path)[0] == older
    for name in ("x" * 5000, "a\0b"):
        (newer / RUN_FILE).write_text(json.dumps({**data, "files": {name: [1, 2]}}))
        assert chosen(True, tmp_path) == (older, RUN, [f"checkpoint-10: {name} is missing."])


@pytest.mark.parametrize("at", [0, 1 << 20, 2_500_000, 5_119_999])
def test_every_byte_counts(tmp_path: Path, at: int) -> None:
    """One bit that changed anywhere in a file is known."""
    folder = write(tmp_path, 1)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert problem_of(folder) == "the content of model.safetensors has changed"


def test_seals_of_older_checkpoints(tmp_path: Path) -> None:
    """They are of a file's ends; such a checkpoint is read as it was meant."""
    folder = write(tmp_path, 1)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    data = json.loads((folder / RUN_FILE).read_text())
    ends = [zlib.crc32(content[:END_BYTES]), zlib.crc32(content[-END_BYTES:])]
    data["files"]["model.safetensors"] = [len(content), *ends]
    (folder / RUN_FILE).write_text(json.dumps(data))
    assert problem_of(folder) is None
    content[END_BYTES - 5] ^= 1
    path.write_bytes(content)
    assert problem_of(folder) == "the content of model.safetensors has changed"


def test_none(tmp_path: Path) -> None:
    """No checkpoint, or none that is whole, is said with the reasons."""
    with pytest.raises(ConfigError, match="There is none"):
        chosen(True, tmp_path)
    cut(write(tmp_path, 4))
    with pytest.raises(ConfigError, match=r"checkpoint-4: model\.safetensors has"):
        chosen(True, tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint-9 cannot be resumed: it does not exist.*no whole one"):
        chosen(str(tmp_path / "checkpoint-9"), tmp_path)


def test_of_a_plain_trainer(tmp_path: Path) -> None:
    """A checkpoint that says nothing is taken as it is."""
    files_of(tmp_path / "checkpoint-5")()
    assert chosen(True, tmp_path) == (tmp_path / "checkpoint-5", None, [])


def leave_nothing(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


PARTS: list[tuple[Callable[[Path], Any], str]] = [
    (leave_nothing, "it has no trainer_state.json"),
    (lambda folder: (folder / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    (
        lambda folder: [path.unlink() for path in (*folder.glob("*.safetensors"), *folder.rglob("*.distcp"))],
        "it has no weights",
    ),
    (lambda folder: (folder / RUN_FILE).write_text('{"files": {}}'), f"its {RUN_FILE} names no file"),
]


@pytest.mark.parametrize(("damage", "problem"), PARTS)
def test_parts_of_a_checkpoint(tmp_path: Path, damage: Callable[[Path], Any], problem: str) -> None:
    """A folder without what a run cannot do without is no checkpoint, whoever wrote it."""
    files_of(tmp_path / "checkpoint-5")()
    files_of(tmp_path / "checkpoint-6")()
    damage(tmp_path / "checkpoint-6")
    assert problem_of(tmp_path / "checkpoint-6") == problem
    assert chosen(True, tmp_path) == (tmp_path / "checkpoint-5", None, [f"checkpoint-6: {problem}."])


def test_on_the_disk_before_older_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut at any moment leaves a whole checkpoint: the new one is on the disk before any other is deleted."""
    write(tmp_path, 1)
    events: list[str] = []
    sync, remove, unlink = os.fsync, shutil.rmtree, Path.unlink

    def synced(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def removed(path: Any, *args: Any, **kwargs: Any) -> None:
        events.append(f"{path} goes")
        remove(path, *args, **kwargs)

    def unlinked(path: Path, *args: Any, **kwargs: Any) -> None:
        events.append(f"{path} goes")
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(shutil, "rmtree", removed)
    monkeypatch.setattr(Path, "unlink", unlinked)
    folder = write(tmp_path, 2, limit=1)
    marked = events.index(f"{folder / INCOMPLETE_FILE} goes")
    written = {str(path) for path in folder.rglob("*")} | {str(folder), str(tmp_path)}
    assert written <= set(events[:marked])
    older = tmp_path / "checkpoint-1"
    assert events[marked + 1 : marked + 4] == [str(folder), str(older / INCOMPLETE_FILE), str(older)]
    # what goes is marked on the disk before, until all else is gone
    gone = events[marked + 4 :]
    assert all(event.startswith(str(older)) and event.endswith(" goes") for event in gone)
    assert gone[-1] == f"{older / INCOMPLETE_FILE} goes"
    assert not older.exists()


def test_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    """What could not be written is removed; older checkpoints stay, and the limit is as it was."""
    older = write(tmp_path, 1)
    folder = tmp_path / "checkpoint-2"
    args = arguments_of(limit=1)

    def save() -> None:
        files_of(folder)()
        raise OSError(28, "No space left on device")

    with pytest.raises(HeteroError, match=r"Saving .*checkpoint-2 failed: OSError: .*No space left"):
        Saving(args, None, may_wait=False).write(save, folder, RUN, lambda: None)
    assert not folder.exists()
    assert problem_of(older) is None
    assert args.save_total_limit == 1


def test_a_rank_that_is_missed_while_saving(tmp_path: Path) -> None:
    """Who waits for another while it saves says that it has gone, not that its own writing failed."""

    def save() -> None:
        raise DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.")

    with pytest.raises(CollectiveFailed, match=r"^Saving failed .*checkpoint-2: Failed to recv.* A rank has gone"):
        Saving(arguments_of(), None, may_wait=True).write(save, tmp_path / "checkpoint-2", RUN, lambda: None)


def test_older_ones_go_last(tmp_path: Path) -> None:
    """Older checkpoints are deleted when the new one is whole, and not before; the best one stays."""
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    folder = tmp_path / "checkpoint-3"
    args, there = arguments_of(limit=2), list[bool]()

    def save() -> None:
        there.extend([args.save_total_limit is None, first.exists(), second.exists(), problem_of(folder) is not None])
        files_of(folder)()

    Saving(args, None, may_wait=False).write(save, folder, RUN, lambda: str(first))
    assert there == [True] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_written_again(tmp_path: Path) -> None:
    """A folder left behind half-written is written over."""
    cut(write(tmp_path, 1))
    assert problem_of(write(tmp_path, 1)) is None


OTHER = {
    "rows": (21, "rows was 20"),
    "lengths": ("cd", "tokenizer"),
    "batch_size": (4, "accumulation_steps x ranks"),
    "seed": (8, "set it to 7"),
    "shuffle": (False, "set it to True"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_data(name: str) -> None:
    """Other rows, lengths, batches or order are refused, with what differs."""
    check_order(ORDER, ORDER)
    check_order(ORDER, {})
    value, words = OTHER[name]
    with pytest.raises(ConfigError, match=words):
        check_order({**ORDER, name: value}, ORDER)


def test_other_contents() -> None:
    """Rows that are known to hold something else are refused, with the first of them; rows not compared are not."""
    kept = {**ORDER, "contents": {"0": 11, "7": 12, "19": 13}}
    for same in ({"0": 11, "7": 12, "19": 13}, {"7": 12, "3": 99}, {}):
        check_order({**ORDER, "contents": same}, kept)
    check_order({**ORDER, "contents": {"0": 1}}, ORDER)
    check_order(ORDER, kept)
    with pytest.raises(ConfigError, match=r"Row 7 .*\(2 of 3 rows .*tokenizer.*ignore_data_skip=True"):
        check_order({**ORDER, "contents": {"0": 11, "7": 1, "19": 2}}, kept)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    """A file of another version is not guessed at."""
    folder = write(tmp_path, 1)
    data = json.loads((folder / RUN_FILE).read_text())
    (folder / RUN_FILE).write_text(json.dumps({**data, "format": "hf-hetero-run/9"}))
    with pytest.raises(HeteroError, match="hf-hetero-run/9"):
        chosen(True, tmp_path)
