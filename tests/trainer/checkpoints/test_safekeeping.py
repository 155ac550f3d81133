"""Nothing that was trained is lost: not to clocks, to older files, to a power cut, or to another run."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import forked

from hf_hetero.errors import ConfigError
from hf_hetero.trainer.checkpoints import safekeeping
from hf_hetero.trainer.checkpoints.safekeeping import LOCK_FILE, claim, settle


def test_settling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without fsync is as it is; one that cannot write says so."""
    (tmp_path / "file").write_text("x")
    settle([tmp_path / "file", tmp_path])

    def failing(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", lambda _: failing(errno.EINVAL))
    settle([tmp_path / "file"])
    monkeypatch.setattr(os, "fsync", lambda _: failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        settle([tmp_path / "file"])


def hold(folder: Path, saves: bool, tell: Any) -> None:
    mine = claim(folder, saves=saves)
    tell.send(mine is not None)
    time.sleep(60)


@contextmanager
def other_run(folder: Path, saves: bool) -> Iterator[Any]:
    """Another process that has claimed the folder, until the block ends."""
    context = forked()
    told, tell = context.Pipe(duplex=False)
    other = context.Process(target=hold, args=(folder, saves, tell))
    other.start()
    tell.close()
    try:
        with told:
            assert told.recv()
        yield other
    finally:
        other.kill()
        other.join()


def test_two_runs_in_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of two that save, the second is refused, with who the first is; a killed one is no hindrance."""
    with other_run(tmp_path, saves=True) as other:
        with pytest.raises(ConfigError, match=rf"Another run trains into .* \(process {other.pid} on .*output_dir"):
            claim(tmp_path, saves=True)
        assert claim(tmp_path, saves=False) is None
        assert "Another run trains into" in caplog.text
        other.kill()
    mine = claim(tmp_path, saves=True)
    assert mine is not None
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    """Ranks that a launcher started again come to the folder while those that they replace may still be ending."""
    with other_run(tmp_path, saves=True) as other:
        threading.Timer(1.0, other.kill).start()
        mine = claim(tmp_path, saves=True, patience_s=60.0)
    assert mine is not None
    mine.close()


def test_a_run_that_saves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It does no harm that a word would not do for."""
    with other_run(tmp_path, saves=False):
        assert claim(tmp_path, saves=True) is None
        assert "Give each its own output_dir" in caplog.text


def test_readers_hold_no_claim(tmp_path: Path) -> None:
    """Processes that a run forked may outlive it by seconds; they do not keep the next one out."""
    outer = os.fork()
    if not outer:
        assert claim(tmp_path, saves=True) is not None
        if not os.fork():
            time.sleep(5)
        os._exit(0)
    os.waitpid(outer, 0)
    mine = claim(tmp_path, saves=True)
    assert mine is not None
    mine.close()


def test_where_there_are_no_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be written, or a system without such locks: training goes on as it would."""
    assert claim(tmp_path / "none" / "such", saves=True) is None
    monkeypatch.setattr(safekeeping, "fcntl", None)
    assert claim(tmp_path, saves=True) is None
