"""What accelerate will do with a trainer's model is read from its arguments, whatever release names them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.distributed import DistributedConfig

from hf_hetero.ranks.mesh import mesh_problems
from hf_hetero.ranks.sharding import sharding_of


def trainer(**arguments: Any) -> Any:
    """A trainer without a wrapper, whose release of transformers knows these arguments."""
    return SimpleNamespace(
        args=SimpleNamespace(**arguments), accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None))
    )


@pytest.mark.parametrize("recomputes", [True, False])
def test_recomputed_layers_by_either_name(recomputes: bool) -> None:
    """Older releases have only `gradient_checkpointing`, where it is a later one's alias the new name counts."""
    old = trainer(gradient_checkpointing=recomputes)
    new = trainer(gradient_checkpointing=None, activation_checkpointing=recomputes)
    assert sharding_of(old, None).checkpointing is recomputes
    assert sharding_of(new, None).checkpointing is recomputes


MESHES: dict[str, tuple[dict[str, int], list[str]]] = {  # sizes of axes, and what is said of them
    "sharded only": ({"fsdp_size": 4}, ["let accelerate shard it"]),
    "replicas": ({"fsdp_size": 2, "dp_replicate_size": 2}, ["let accelerate shard it"]),
    "tensors": ({"tp_size": 2, "fsdp_size": 2}, ["tp_size=2", "by FSDP2"]),
    "pipeline": ({"pp_size": 2}, ["pp_size=2", "by FSDP2"]),
    "experts": ({"fsdp_size": 4, "ep_size": 4}, ["ep_size=4", "by FSDP2"]),
    "experts of a node": ({"fsdp_size": 4, "ep_size": 2}, ["ep_size=2", "by FSDP2"]),
    "experts where tensors are": ({"tp_size": 2, "ep_size": 2, "fsdp_size": 2}, ["tp_size=2", "by FSDP2"]),
    "experts beyond tensors": ({"tp_size": 2, "ep_size": 4, "fsdp_size": 2}, ["tp_size=2", "ep_size=4", "by FSDP2"]),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_refused_by_axis(name: str) -> None:
    """Of a model that was sharded while loading, each axis that cannot be right is named, and what can be done."""
    sizes, words = MESHES[name]
    said = list(mesh_problems(DistributedConfig(**sizes)))
    assert len(said) == len(words)
    for problem, word in zip(said, words, strict=True):
        assert word in problem
    assert [axis for axis in ("tp_size", "pp_size", "ep_size") if any(axis in p for p in said)] == [
        word.split("=")[0] for word in words if "=" in word
    ]


def test_a_mesh_that_is_not_known() -> None:
    """A model that only says that it was sharded is refused with the usual remedy."""
    [said] = mesh_problems(None)
    assert "let accelerate shard it" in said
