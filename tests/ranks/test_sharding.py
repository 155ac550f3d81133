"""What accelerate will do with a trainer's model is read from its arguments, whatever release names them."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import LENGTHS, arguments, run_ranks, samples, shard_on_cpu, tiny_model
from hybrids import hybrid_model
from sights import seeing_model
from torch.distributed.fsdp import FSDPModule
from transformers.distributed import DistributedConfig

from hf_hetero import HeteroTrainer, UnsupportedModel
from hf_hetero.ranks import sharding
from hf_hetero.ranks.mesh import layer_classes, mesh_problems, wrapping_problems
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


@pytest.mark.parametrize("release", ["torch 2.11", "torch 2.11, no weights of its own", "later"])
def test_groups_of_weights_by_either_name(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of FSDP2 has one group of weights at most until torch 2.11, and a list of them since."""
    own = object()
    state = {
        "torch 2.11": SimpleNamespace(_fsdp_param_group=own),
        "torch 2.11, no weights of its own": SimpleNamespace(_fsdp_param_group=None),
        "later": SimpleNamespace(_fsdp_param_groups=[own]),
    }[release]
    monkeypatch.setattr(sharding, "_states", lambda _: [state, state])
    assert sharding.param_groups(torch.nn.Module()) == ([] if "no weights" in release else [own, own])


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


LAYERS = {  # models whose classes name layers that they do not have, and the layers that they have
    "llava": ["CLIPEncoderLayer", "LlamaDecoderLayer"],
    "paligemma": ["SiglipEncoderLayer", "GemmaDecoderLayer"],
    "gemma3": ["SiglipEncoderLayer", "Gemma3DecoderLayer"],
    "gemma4": ["Gemma4VisionEncoderLayer", "Gemma4TextDecoderLayer"],
    "qwen3_5": ["Qwen3_5DecoderLayer"],
}


def model_of(name: str) -> Any:
    return hybrid_model(name) if name == "qwen3_5" else seeing_model(name)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_a_model_does_not_have(name: str) -> None:
    """What its class would have FSDP2 wrap is refused, and its own layers are named; these are not refused."""
    model = model_of(name)
    assert layer_classes(model) == LAYERS[name]
    [said] = wrapping_problems(model, None)
    assert "transformer_layer_cls_to_wrap" in said
    assert str(LAYERS[name]) in said
    assert not list(wrapping_problems(model, LAYERS[name]))
    [said] = wrapping_problems(model, [*LAYERS[name], "OtherLayer"])
    assert said.startswith("FSDP2 is to wrap layers of class OtherLayer, which this")


def test_layers_of_most_models() -> None:
    """A model that has all layers that its class names is wrapped as it is."""
    assert not list(wrapping_problems(tiny_model(), None))
    assert layer_classes(tiny_model()) == ["LlamaDecoderLayer"]


def shard_by_layers() -> list[str]:
    shard_on_cpu()
    with tempfile.TemporaryDirectory() as folder:

        def trainer(**config: Any) -> HeteroTrainer:
            args = arguments(folder, 2, max_steps=1, fsdp=True, fsdp_config={"version": 2, **config})
            return HeteroTrainer(model=model_of("llava"), args=args, train_dataset=samples(LENGTHS, vocab=80))

        with pytest.raises(UnsupportedModel, match="set fsdp_config's transformer_layer_cls_to_wrap to"):
            trainer()
        sharded = trainer(transformer_layer_cls_to_wrap=LAYERS["llava"])
        sharded.train()
        assert sharded.model_wrapped is not None
        return [type(m).__name__ for m in sharded.model_wrapped.modules() if isinstance(m, FSDPModule)]


def test_the_layers_that_are_named_are_wrapped() -> None:
    """Refused when the trainer is made, and what the refusal says to set has FSDP2 run, layer by layer."""
    for wrapped in run_ranks(shard_by_layers, 2, timeout_s=120):
        assert wrapped.count("FSDPLlamaDecoderLayer") == 2
        assert wrapped.count("FSDPCLIPEncoderLayer") == 2
