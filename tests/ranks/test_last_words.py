"""Who misses a rank finds what it left word of, at the price of a few questions to the store that all ranks share."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from hf_hetero.ranks import last_words


class Store:
    """A job's store, which counts what it is asked."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.num_asked = 0

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def add(self, key: str, amount: int) -> int:
        self.num_asked += 1
        self.values[key] = str(int(self.values.get(key, "0")) + amount)
        return int(self.values[key])

    def check(self, keys: list[str]) -> bool:
        self.num_asked += 1
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        self.num_asked += 1
        return self.values[key].encode()

    def delete_key(self, key: str) -> bool:
        return self.values.pop(key, None) is not None


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """That of a job of ten thousand ranks."""
    found = Store()
    monkeypatch.setattr(last_words, "job_store", lambda: found)
    monkeypatch.setattr(last_words, "PATIENCE_S", 0.2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 10_000)
    return found


def told_by(rank: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    last_words.tell(error)


def test_the_first_to_end_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several the first, which the others may have ended because of."""
    told_by(7000, KeyError("row 7"), monkeypatch)
    told_by(12, ValueError("later"), monkeypatch)
    assert last_words.why_gone() == "Rank 7000 had ended with KeyError: 'row 7'"


def test_words_that_were_taken_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that went on is not named for what it said before; it may have to say something again."""
    told_by(12, ValueError("memory ran out"), monkeypatch)
    last_words.forget_errors()
    assert last_words.why_gone().startswith("A rank has gone")
    told_by(7000, KeyError("row 7"), monkeypatch)
    assert last_words.why_gone() == "Rank 7000 had ended with KeyError: 'row 7'"


def test_a_rank_that_is_about_to_speak(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has been counted and has not said its name yet is not waited for in the store."""
    store.add(last_words.NUM_TOLD, 1)
    assert last_words.why_gone().startswith("A rank has gone")


def test_the_store_is_asked_little(store: Store) -> None:
    """A look does not ask for each rank: all that are left look at the same time."""
    assert last_words.why_gone().startswith("A rank has gone")
    assert 1 <= store.num_asked <= 2 * (0.2 / last_words.LOOK_S + 2)


class Silent(Store):
    """A store that answers no question until it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer, self.num_begun = threading.Event(), 0

    def check(self, keys: list[str]) -> bool:
        self.num_begun += 1
        self.may_answer.wait(60)
        return super().check(keys)


def test_a_store_that_answers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks is told so within the limit, the next one at once; once it answers, all is as before."""
    monkeypatch.setattr(last_words, "ANSWER_S", 0.5)
    silent = Silent()
    store = last_words.JobStore(silent)
    assert store.add("count", 2) == 2
    for _ in range(3):
        with pytest.raises(dist.DistStoreError, match=r"has not answered for 0\.5 s"):
            store.check(["count"])
    assert silent.num_begun == 1, "behind an open question there are no more"
    silent.may_answer.set()
    until = time.monotonic() + 30
    while store._open_since_s < math.inf and time.monotonic() < until:
        time.sleep(0.01)
    assert store.check(["count"])
    assert store.get("count") == b"2"
    assert store.delete_key("count")
    assert not store.check(["count"])


def test_a_store_is_asked_by_several_at_once() -> None:
    """No one of them takes the others' questions for silence."""
    silent = Silent()
    silent.may_answer.set()
    store = last_words.JobStore(silent)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: store.add("count", 1), range(400)))
    assert sorted(found) == list(range(1, 401))


def raises(*args: Any) -> int:
    raise RuntimeError("can't start new thread")


def dies(*args: Any) -> int:
    """A thread that began, and found no memory for its first line."""
    return 1


@pytest.mark.parametrize("start", [raises, dies])
def test_where_no_thread_can_begin(monkeypatch: pytest.MonkeyPatch, start: Any) -> None:
    """A process that has no memory left, or may have no more threads, asks by itself, each question once."""
    monkeypatch.setattr(last_words, "BEGIN_S", 0.1)
    store = last_words.JobStore(Store())
    with monkeypatch.context() as patch:
        for module, name in ((threading, "_start_new_thread"), (last_words, "start_new_thread")):
            patch.setattr(module, name, start)
        assert [store.add("count", 1) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(KeyError, match="missing"):
            store.get("missing")
    assert store.add("count", 1) == 4


def test_a_thread_that_begins_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds its question asked, and leaves it."""
    monkeypatch.setattr(last_words, "BEGIN_S", 0.1)
    late: list[Any] = []
    monkeypatch.setattr(last_words, "start_new_thread", lambda ask, _: late.append(ask))
    store = last_words.JobStore(Store())
    assert store.add("count", 1) == 1
    for ask in late:
        ask()
    assert store.add("count", 1) == 2


def test_what_a_store_says_is_passed_on() -> None:
    """Errors are torch's own, whoever asks."""
    store = last_words.JobStore(Store())
    with pytest.raises(KeyError, match="missing"):
        store.get("missing")
    assert not store.check(["missing"])


def test_whose_store_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the process group of now; there is none where ranks have met without one."""
    first, second = Store(), Store()
    for store in (first, second):
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda store=store: store)
        assert last_words.job_store().store is store
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    assert last_words.job_store() is None
