"""Who misses a rank finds what it left word of, at the price of a few questions to the store that all ranks share."""

from __future__ import annotations

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
