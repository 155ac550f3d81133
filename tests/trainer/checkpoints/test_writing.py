"""What a thread writes is whole when it has ended; what went wrong there is raised where training goes on."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from transformers import TrainerState

from hf_hetero import HeteroError
from hf_hetero.trainer.checkpoints import writing
from hf_hetero.trainer.checkpoints.writing import Writing

FOLDER = Path("checkpoint-7")


def test_whole_when_it_has_ended() -> None:
    """It is not whole before its writing has ended, and training does not wait to learn that."""
    may_end = threading.Event()
    one = Writing(may_end.wait, FOLDER, TrainerState(), is_pushed=False)
    assert not one.is_whole(None)
    may_end.set()
    one.wait()
    assert one.is_whole(None)


def test_what_goes_wrong_is_raised_in_training(caplog: pytest.LogCaptureFixture) -> None:
    """In its own words; where training ends with another error, it is said, and otherwise not said again."""

    def fail() -> None:
        raise HeteroError("Saving checkpoint-7 failed")

    one = Writing(fail, FOLDER, TrainerState(), is_pushed=False)
    one.wait()
    with pytest.raises(HeteroError, match=r"^Saving checkpoint-7 failed$"):
        one.is_whole(None)
    one.end()
    assert not caplog.records
    Writing(fail, FOLDER, TrainerState(), is_pushed=False).end()
    assert "Saving checkpoint-7 failed" in caplog.text


def test_a_long_wait_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever waits long for a checkpoint says for which, and what can be done; who does not wait long says nothing."""
    monkeypatch.setattr(writing, "WORD_AFTER_S", 0.05)
    may_end = threading.Event()

    class Ends(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            may_end.set()

    writing.logger.addHandler(handler := Ends())
    try:
        Writing(lambda: None, FOLDER, TrainerState(), is_pushed=False).wait()
        assert not caplog.records
        Writing(lambda: may_end.wait(20), FOLDER, TrainerState(), is_pushed=False).wait()
    finally:
        writing.logger.removeHandler(handler)
    assert len(caplog.records) == 1
    assert "checkpoint-7, which is still being written" in caplog.text
