"""Shards come together on rank 0 as torch puts them together, whatever the mesh, and beside other exchanges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_hetero.trainer.checkpoints.host_copies import HostCopies
from hf_hetero.trainer.checkpoints.sharded import gathered

MESHES: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "shards": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "replicas of shards": ((2, 2), [Replicate(), Shard(0)]),
    "replicas": ((4,), [Replicate()]),
    "blocks": ((2, 2), [Shard(0), Shard(1)]),
}


def together(name: str) -> dict[str, Any]:
    shape, placements = MESHES[name]
    mesh = init_device_mesh("cpu", shape)
    torch.manual_seed(0)
    wholes: dict[str, Any] = {"even": torch.randn(8, 8), "uneven": torch.randn(5, 7), "one row": torch.randn(1, 3)}
    wholes |= {"half": torch.randn(6, 4).to(torch.bfloat16), "counts": torch.arange(12).reshape(3, 4)}
    parts = {key: distribute_tensor(whole.clone(), mesh, placements) for key, whole in wholes.items()}
    tree = {"state": [parts, ({"step": torch.tensor(3.0)}, parts["even"])], "lr": 0.1}
    copied = HostCopies(torch.nn.Linear(1, 1), []).of(tree)
    for part in parts.values():
        part.to_local().zero_()
    own: Any = dist.new_group(backend="gloo")
    return {"wholes": wholes, "found": gathered(copied, own)}


@pytest.mark.parametrize("name", MESHES)
def test_gathered(name: str) -> None:
    """Rank 0 has every tensor whole, with what it held when it was copied; the others have nothing."""
    first, *others = run_ranks(together, 4, name)
    assert [rank["found"] for rank in others] == [{}, {}, {}]
    [parts, (rest, again)], wholes = first["found"]["state"], first["wholes"]
    assert list(parts) == list(wholes)
    for key, whole in wholes.items():
        assert not isinstance(parts[key], DTensor)
        assert parts[key].dtype == whole.dtype
        assert torch.equal(parts[key], whole), key
    assert torch.equal(again, wholes["even"])
    assert (rest["step"].item(), first["found"]["lr"]) == (3.0, 0.1)
