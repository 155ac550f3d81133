"""Who waits long says so, ever more rarely, from one wait to the next anew."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from hf_hetero.ranks import waits
from hf_hetero.ranks.waits import Waits


class Looks:
    """The moments at which the thread looks; between them the clock goes on.

    Args:
        clock: of the waits.
        moments: seconds since the start, and what happens just before the thread looks.
    """

    def __init__(self, clock: Any, moments: list[tuple[float, Any]]) -> None:
        self.clock, self.moments = clock, iter(moments)

    def wait(self, _: float) -> bool:
        self.clock.now, act = next(self.moments, (None, None))
        if act is not None:
            act()
        return self.clock.now is None


def test_ever_more_rarely(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After a second, and when a wait has become twice as long; another wait begins anew; a short one is no word."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    watch = Waits(3, "HeteroConfig.group_timeout_s", word_after_s=1.0)
    watch.close()  # its thread: what it does is done here
    monkeypatch.setattr(waits, "time", clock)
    first, second = (watch.noted("all-to-all", f"step {step}") for step in (1, 2))

    def follows() -> None:
        first.__exit__(None, None, None)
        second.__enter__()

    first.__enter__()
    moments = [(t, None) for t in (0.5, 1.0, 1.5, 2.0, 3.5, 4.0, 8.5)]
    ends = lambda: second.__exit__(None, None, None)  # noqa: E731
    watch._ended = Looks(clock, [*moments, (9.0, follows), (9.9, None), (10.0, None), (10.5, ends), (99.0, None)])  # type: ignore[assignment]
    watch._look()
    said = [re.search(r"Rank 3 has waited ([\d.]+) s in all-to-all of (step \d)", text) for text in caplog.messages]
    assert [found.groups() for found in said if found] == [
        *((seconds, "step 1") for seconds in ("1", "2", "4", "8.5")),
        ("1", "step 2"),
    ]
    assert all("as long as HeteroConfig.group_timeout_s allows" in text for text in caplog.messages)
