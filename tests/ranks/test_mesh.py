"""The mesh that is asked for is read from arguments or the launcher; what cannot be is refused in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig

from hf_hetero.ranks.mesh import Mesh, mesh_asked_for, replica_problems


def arguments(world: int, **sizes: int) -> Any:
    return SimpleNamespace(world_size=world, parallelism_config=ParallelismConfig(**sizes) if sizes else None)


def launched(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for axis, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{axis.upper()}", str(size))


def test_a_mesh_is_read_from_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments go before the launcher, as in accelerate; releases of transformers that know no mesh ask for none."""
    assert mesh_asked_for(arguments(4)) is None
    assert mesh_asked_for(SimpleNamespace(world_size=4)) is None  # pyright: ignore[reportArgumentType]
    assert mesh_asked_for(arguments(4, dp_replicate_size=2, dp_shard_size=2)) == Mesh(2, 2)
    launched(monkeypatch, dp_replicate_size=2, dp_shard_size=8)
    assert mesh_asked_for(arguments(16)) == Mesh(replicas=2, shards=8)
    assert mesh_asked_for(arguments(4, dp_replicate_size=1, dp_shard_size=4)) == Mesh(1, 4)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "false")
    assert mesh_asked_for(arguments(16)) is None


CASES: dict[str, tuple[int, dict[str, int], bool, str | None]] = {  # ranks, sizes, FSDP, what is said
    "replicas of shards": (4, {"dp_replicate_size": 2, "dp_shard_size": 2}, True, None),
    "shards alone": (4, {"dp_shard_size": 4}, True, None),
    "replicas alone": (4, {"dp_replicate_size": 4}, False, None),
    "nothing, FSDP": (4, {}, True, None),
    "sizes of 1": (4, {"dp_shard_size": 1}, False, None),
    "one rank": (1, {"dp_shard_size": 4}, True, "is a mesh of 4 ranks, and there are 1: choose sizes"),
    "another axis": (4, {"dp_shard_size": 2, "tp_size": 4}, True, None),  # which is refused as what it is
    "too many": (
        4,
        {"dp_replicate_size": 2, "dp_shard_size": 4},
        True,
        "=2 x .*=4 .* of 8 ranks, and there are 4",
    ),
    "too few": (4, {"dp_replicate_size": 2}, False, "is a mesh of 2 ranks, and there are 4: choose sizes"),
    "replicas under FSDP": (4, {"dp_replicate_size": 4}, True, "leaves FSDP no ranks to spread weights over.*DDP"),
    "sizes of 1 under FSDP": (4, {"dp_shard_size": 1}, True, "leaves FSDP no ranks"),
    "shards without FSDP": (4, {"dp_shard_size": 4}, False, "by FSDP2 alone, .* ask for it, too, by .*fsdp_version: 2"),
}


@pytest.mark.parametrize("by_launcher", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_is_refused(name: str, by_launcher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh of other ranks, one in which FSDP has nothing to do, and one that only FSDP could make; others are not."""
    world, sizes, fsdp, words = CASES[name]
    if by_launcher and sizes:
        launched(monkeypatch, **sizes)
    problems = list(replica_problems(arguments(world, **({} if by_launcher else sizes)), fsdp))
    assert len(problems) == (words is not None)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            raise ValueError(problems[0])
