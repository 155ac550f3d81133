"""A forecast is what a trainer on such GPUs would start from; what does not fit is refused with what would."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers import tiny_model, with_lora
from transformers import AutoConfig

from hf_hetero import HeteroConfig, UnsupportedModel
from hf_hetero.checks.outline import config_of, outline_of
from hf_hetero.errors import ConfigError
from hf_hetero.estimate import memory
from hf_hetero.estimate.devices import device_named
from hf_hetero.estimate.model_shape import shape_of
from hf_hetero.estimate.shares import reached
from hf_hetero.forecast.forecast import forecast, machines_named, trained_shape
from hf_hetero.forecast.setting import Setting
from hf_hetero.model import lm_head
from hf_hetero.model.activations import Activations
from hf_hetero.ranks.sharding import Sharding
from hf_hetero.trainer import machine

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


def saved(folder: Path, **changes: Any) -> str:
    """A folder with the config of the tiny model, and no weights."""
    config = {**tiny_model().config.to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_an_estimate_needs_no_trainer() -> None:
    """What a trainer brings, such as `datasets`, takes a while to import, and nobody who estimates uses it."""
    code = (
        "import sys, hf_hetero.forecast.forecast; "
        "print([name for name in ('torch', 'transformers.trainer', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "['torch']", done.stderr


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_what_a_trainer_starts_from(tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the card that it names, a trainer of the model with its weights has the same cost model, to the bit."""
    card, model = device_named("H100"), tiny_model()
    monkeypatch.setattr(machine, "cuda_device", lambda device, dtype, kernel: reached(card, kernel, dtype))
    monkeypatch.setattr(memory, "host_memory_bytes", lambda device, ranks: None)
    properties = SimpleNamespace(total_memory=card.card_bytes)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    lm_head.install(model)
    args: Any = SimpleNamespace(
        world_size=1,
        process_index=0,
        device=torch.device("cuda"),
        use_liger_kernel=False,
        torch_compile=False,
        ddp_timeout=60,
    )
    found = machine.set_up(
        model,
        args,
        HeteroConfig(),
        torch.bfloat16,
        Sharding(checkpointing=checkpointing),
        Activations(model, checkpointing, in_chunks=True, compiled=False),
    )
    expected = found.cost_model.to_dict()
    made = forecast(saved(tmp_path), "1xH100", Setting(checkpointing=checkpointing)).cost.to_dict()
    del made["ranks_per_node"]  # a single process was started by nobody who says how many share a node
    assert made == expected
    other = forecast(str(tmp_path), "1xH100", Setting(checkpointing=not checkpointing)).cost.to_dict()
    assert other["linear_s_per_token"] != expected["linear_s_per_token"]


def test_adapters_are_those_of_peft(tmp_path: Path) -> None:
    """Counted on the outline, adapters on all linear layers but the head are what peft makes."""
    config = config_of(saved(tmp_path))
    counted, policies = trained_shape(outline_of(config), config, Setting(lora_r=4, dtype="float32"))
    adapted = with_lora(tiny_model(), LINEARS)
    made = shape_of(adapted, config, 4, False, keeps_exchanged=True, chunked_loss=True, chunked_mlp=True)
    assert counted == made
    assert policies == ("recompute",)
    assert trained_shape(outline_of(config), config, Setting(offload=True))[1] == ("recompute", "offload")


@pytest.mark.parametrize(("setting", "casts"), [({}, True), ({"lora_r": 4}, False), ({"dtype": "float32"}, False)])
def test_what_is_frozen_is_not_cast(setting: dict[str, Any], casts: bool, tmp_path: Path) -> None:
    """Autocast casts weights that are trained; frozen ones are in the type of products already, as with LoRA."""
    config = config_of(saved(tmp_path))
    assert trained_shape(outline_of(config), config, Setting(**setting))[0].autocasts is casts


NAMED = {
    "H100": (1, 1, "H100", "1xH100"),
    "8xh100": (1, 8, "H100", "8xH100"),
    "2x8xA100-40GB": (2, 8, "A100 40GB", "2x8xA100 40GB"),
    "1x72xGB200": (1, 72, "GB200", "1x72xGB200"),
    "4 x RTX 4090": (1, 4, "RTX 4090", "4xRTX 4090"),
}


@pytest.mark.parametrize("gpus", NAMED)
def test_machines_are_named(gpus: str) -> None:
    """A number of GPUs, or of nodes and GPUs in each; the name can be read again."""
    nodes, ranks, card, name = NAMED[gpus]
    found = machines_named(gpus)
    assert (found.num_nodes, found.ranks_per_node, found.card.name, found.name) == (nodes, ranks, card, name)
    assert machines_named(found.name) == found


REFUSED = {
    "16xH100": "how many share a node's links.*2x8xH100.*1x16xH100",
    "0xH100": "names no GPUs.*Write 8xH100",
    "": "names no GPUs",
    "8x": "No GPU is known as '8x'",
    "8xH1000": "did you mean H100",
    "9999x9999xH100": "99,980,001 GPUs; at most 65,536",
}


@pytest.mark.parametrize("gpus", REFUSED)
def test_machines_that_are_none(gpus: str) -> None:
    """What is no number of a known GPU is refused with how to write it."""
    with pytest.raises(ConfigError, match=REFUSED[gpus]):
        machines_named(gpus)


def test_settings_that_cannot_be() -> None:
    """A value out of range is named with its range."""
    for changes, words in (
        ({"lora_r": 0}, "rank of adapters of 0: it must be from 1"),
        ({"network_gbps": -1.0}, "network of -1 Gb/s"),
        ({"network_gbps": float("nan")}, "network of nan Gb/s"),
        ({"dtype": "int8"}, "dtype 'int8': choose one of bfloat16"),
        ({"kernel": "fa9"}, "kernel 'fa9': choose one of fa2"),
    ):
        with pytest.raises(ConfigError, match=words):
            Setting(**cast("dict[str, Any]", changes))


def test_what_is_set_is_estimated(tmp_path: Path) -> None:
    """A faster network and kernel, weights whole or sharded: each changes what it is about, and nothing else."""
    name = saved(tmp_path)
    plain = forecast(name, "2x4xH100").cost
    fast = forecast(name, "2x4xH100", Setting(network_gbps=3200)).cost
    assert fast.network_bytes_per_s == pytest.approx(0.75 * 3200e9 / 8 / 4)
    assert fast.all_to_all_bytes_per_s[8] > plain.all_to_all_bytes_per_s[8]
    assert fast.linear_s_per_token == plain.linear_s_per_token
    third = forecast(name, "2x4xH100", Setting(kernel="fa3")).cost
    assert third.attention_s_per_token2 == pytest.approx(plain.attention_s_per_token2 * 0.34 / 0.63)
    whole = forecast(name, "2x4xH100", Setting(sharded=False))
    assert whole.cost.model_state_bytes_per_rank != plain.model_state_bytes_per_rank
    assert "whole on each rank" in whole.trained
    assert "sharded over 8 ranks" in forecast(name, "2x4xH100").trained
    assert "whole on each rank" in forecast(name, "2x4xH100", Setting(lora_r=4)).trained


def test_replicas_of_shards(tmp_path: Path) -> None:
    """Over every four of eight ranks, each rank holds twice as much, and waits less for a slow network."""
    name = saved(tmp_path)
    over_all, over_nodes = (forecast(name, "2x4xH100", Setting(network_gbps=10, shards=shards)) for shards in (8, 4))
    assert over_all.cost == forecast(name, "2x4xH100", Setting(network_gbps=10, sharded=True)).cost
    assert over_nodes.is_sharded
    assert "sharded over 4 ranks in each of 2 replicas" in over_nodes.trained
    shape, _ = trained_shape(outline_of(config := config_of(name)), config, Setting())
    more = over_nodes.cost.model_state_bytes_per_rank - over_all.cost.model_state_bytes_per_rank
    assert more == pytest.approx(memory.model_state_bytes(shape) / 8)
    assert over_nodes.cost.micro_batch_s < over_all.cost.micro_batch_s
    computed = {dtype: Setting(dtype=dtype, shards=4, network_gbps=10) for dtype in ("float32", "bfloat16")}
    sums = {}
    for dtype, setting in computed.items():
        whole = forecast(name, "2x4xH100", replace(setting, network_gbps=1e6)).cost
        sums[dtype] = forecast(name, "2x4xH100", setting).cost.micro_batch_s - whole.micro_batch_s
    assert sums["float32"] == 0  # replicas add up once a step, which every plan pays alike
    assert sums["bfloat16"] > 0


def test_replicas_that_cannot_be(tmp_path: Path) -> None:
    """Sizes that do not divide the ranks are named with those that do; a replica too small, with what is not."""
    name = saved(tmp_path, **LLAMA_70B, num_key_value_heads=8, head_dim=128, vocab_size=128256)
    with pytest.raises(ConfigError, match=r"16 ranks make no replicas of 3\. Choose one of 2, 4, 8, 16\."):
        forecast(name, "2x8xH100", Setting(shards=3))
    with pytest.raises(ConfigError, match=r"1 ranks make no replicas of 2\. Leave --shards out"):
        forecast(name, "1xH100", Setting(shards=2))
    with pytest.raises(ConfigError, match="Weights over 1 ranks: 2 at least; --ddp"):
        Setting(shards=1)
    with pytest.raises(ConfigError, match="--ddp alone"):
        Setting(shards=8, sharded=False)
    with pytest.raises(ConfigError, match=r"GiB over 2 ranks, .* instead of those of a replica \(--fsdp\)"):
        forecast(name, "4x8xH100", Setting(shards=2))
    assert forecast(name, "4x8xH100").cost.capacity_tokens > 0


def test_a_model_too_large_is_refused_with_what_would_do(tmp_path: Path) -> None:
    """Every way that is named does do: more GPUs, sharding, adapters; what would not is not named."""
    name = saved(tmp_path, **LLAMA_70B, num_key_value_heads=8, head_dim=128, vocab_size=128256)
    with pytest.raises(ConfigError, match=r"does not fit on 8xH100: .* GiB over all ranks") as caught:
        forecast(name, "8xH100")
    words = str(caught.value)
    more = re.search(r"GPUs \((.*?)\)", words)
    assert more is not None
    assert forecast(name, more[1]).cost.capacity_tokens > 0
    assert "--lora-r 16" in words
    assert forecast(name, "8xH100", Setting(lora_r=16)).cost.capacity_tokens > 0
    with pytest.raises(ConfigError, match="--fsdp"):
        forecast(name, "8xH100", Setting(lora_r=16, sharded=False))
    with pytest.raises(ConfigError) as small:
        forecast(name, "1xT4")
    assert "--lora-r" not in str(small.value)


@pytest.mark.parametrize("kind", ["bloom", "rwkv", "gptj"])
def test_a_model_whose_samples_no_ranks_share(kind: str, tmp_path: Path) -> None:
    """Its estimate offers single ranks, as its trainer does; it says so, and why; another's offers groups."""
    config: Any = AutoConfig.for_model(kind, attention_dropout=0.0, attn_pdrop=0.0)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    found = forecast(str(tmp_path), "8xH100")
    assert found.cost.degrees(8) == (1,)
    assert "each sample on one" in found.trained
    assert found.cost.capacity_tokens > 0
    (other := tmp_path / "other").mkdir()
    assert forecast(saved(other), "8xH100").cost.degrees(8) == (1, 2, 4, 8)
    assert "each sample" not in forecast(saved(other), "8xH100").trained


def test_a_model_that_is_refused(tmp_path: Path) -> None:
    """What cannot be trained under plans is not estimated."""
    with pytest.raises(UnsupportedModel, match="attention_dropout"):
        forecast(saved(tmp_path, attention_dropout=0.1), "8xH100")
    with pytest.raises(ConfigError, match="hf-hetero check"):
        forecast(saved(tmp_path, model_type="t5", is_encoder_decoder=True), "8xH100")
