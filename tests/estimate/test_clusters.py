"""Every shipped estimate is what the function makes, its model is the one it names, and its source hides nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_hetero import CostModel, Planner
from hf_hetero.costs import SHIPPED_FOLDER, shipped_names
from hf_hetero.estimate.clusters import (
    CLUSTERS,
    LLAMA_3B,
    LLAMA_8B,
    LLAMA_8B_LORA,
    USABLE_MEMORY,
    Cluster,
    Dense,
    cluster_cost_model,
    write_estimates,
)
from hf_hetero.estimate.memory import activation_bytes, gathered_bytes
from hf_hetero.estimate.model_shape import shape_of

PUBLISHED = {"gpt-7b_64xa100_192k"}


def test_files_are_what_the_function_makes(tmp_path: Path) -> None:
    """Byte for byte, and there is no other file but the published one."""
    write_estimates(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    shipped = {path.name: path.read_text() for path in SHIPPED_FOLDER.glob("*.json") if path.stem not in PUBLISHED}
    assert made == shipped
    assert set(shipped_names()) == {cluster.name for cluster in CLUSTERS} | PUBLISHED


@pytest.mark.parametrize("name", shipped_names())
def test_shipped(name: str) -> None:
    """Each can be loaded by name, says whether it was measured, and plans a batch that needs all its degrees."""
    cost = CostModel.load(name)
    assert cost.name == name
    assert cost.source.startswith(
        "estimated, not measured" if name not in PUBLISHED else "measured by FlexSP's authors"
    )
    num_ranks = int(name.split("_")[1].split("x")[0])
    degree = cost.degrees(num_ranks)[-1]
    plan = Planner(cost, num_ranks).plan([cost.capacity_tokens * degree, 100, 2000])
    assert plan.num_samples == 3
    assert cost.ranks_per_node == 8


@pytest.mark.parametrize(("dense", "rope"), [(LLAMA_8B, 5e5), (LLAMA_3B, 5e5)], ids=["8B", "3B"])
def test_weights_are_counted_right(dense: Dense, rope: float) -> None:
    """The shape from the config's numbers is the shape read from the model itself."""
    config = LlamaConfig(
        num_hidden_layers=dense.num_layers,
        hidden_size=dense.hidden,
        num_attention_heads=dense.heads,
        num_key_value_heads=dense.kv_heads,
        head_dim=dense.head_dim,
        intermediate_size=dense.intermediate,
        vocab_size=dense.vocab,
        tie_word_embeddings=dense.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    read = shape_of(model, config, 2, True, True, True)
    # its weights are sharded, and gathered in 16 bits
    assert dense.shape() == replace(read, autocasts=False)


def test_adapters_are_counted() -> None:
    """LoRA of rank 16 on the seven linear layers of 32: 41.9M weights get a gradient; the base lies there in bf16."""
    shape, base = LLAMA_8B_LORA.shape(), LLAMA_8B.shape()
    assert shape.trainable_params == 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert shape.num_params == base.num_params + shape.trainable_params
    assert shape.param_bytes == 2 * base.num_params + 4 * shape.trainable_params


def test_memory() -> None:
    """FSDP: 16 bytes a parameter over the ranks, and the gathered layers; what is left holds activations.

    A rank is full when a layer is in backward: the loss's chunks are gone by then.
    """
    cost, shape = CostModel.load("llama-8b_8xa100_nvlink"), LLAMA_8B.shape()
    fixed = gathered_bytes(shape)
    assert cost.model_state_bytes_per_rank == pytest.approx(16 * 8.03e9 / 8 + fixed, rel=1e-3)
    assert cost.memory_bytes_per_rank == USABLE_MEMORY * 80e9
    left = cost.memory_bytes_per_rank - cost.model_state_bytes_per_rank
    assert cost.capacity_tokens == int(left / activation_bytes(shape))
    wider = CostModel.load("llama-8b_64xh100_ib")
    assert wider.model_state_bytes_per_rank == pytest.approx(16 * 8.03e9 / 64 + fixed, rel=1e-3)
    adapters = CostModel.load("llama-8b-lora_8xh100_nvlink")
    assert adapters.model_state_bytes_per_rank == pytest.approx(2 * 8.03e9 + 16 * 41.9e6, rel=1e-2)


def test_links() -> None:
    """PCIe is slower than NVLink by the ratio of their speeds; a network counts by the share that leaves the node."""
    nvlink, pcie = CostModel.load("llama-8b_8xa100_nvlink"), CostModel.load("llama-8b_8xa100_pcie")
    assert nvlink.all_to_all_bytes_per_s[8] / pcie.all_to_all_bytes_per_s[8] == pytest.approx(110 / 12)
    assert nvlink.linear_s_per_token == pcie.linear_s_per_token
    across = CostModel.load("llama-8b_64xh100_ib").all_to_all_bytes_per_s
    inside = across[8]
    # 0.75 of 50 GB/s a card; half leaves the node at 16; 16 ranks share 8 key-value heads, so each travels twice
    assert across[16] == pytest.approx(0.75 * 50e9 / 0.5 * 40 / 48)
    assert across[32] == pytest.approx(0.75 * 50e9 / 0.75 * 40 / 64)
    assert inside == 180e9


def test_source_says_what_was_assumed() -> None:
    """Model, weights, sharding, peak and the share of it, links, memory."""
    source = CostModel.load("llama-8b_16xa100_ib").source
    for words in (
        "Llama-3.1-8B",
        "8.03B",
        "FSDP",
        "59% of 312 TFLOP/s",
        "62% in attention",
        "NVLink",
        "75% of",
        "InfiniBand",
        "90% of",
    ):
        assert words in source
    assert "DDP" in CostModel.load("llama-8b-lora_8xh100_nvlink").source


def test_the_published_constants() -> None:
    """The shipped file is arithmetic on what FlexSP's released solver holds, in its units."""
    cost, mib = CostModel.load("gpt-7b_64xa100_192k"), 2**20
    assert cost.attention_s_per_token2 == pytest.approx(5.128e-6 / 1000)
    assert cost.linear_s_per_token == pytest.approx(0.18396 / 1000, rel=1e-4)
    assert cost.micro_batch_s == pytest.approx(0.6294, rel=1e-4)
    assert cost.all_to_all_bytes_per_token == 4 * 2 * 32 * 4096 * 2
    published = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}  # thousands of MiB a second
    for degree, speed in published.items():
        assert cost.all_to_all_bytes_per_s[degree] == pytest.approx(1000 * mib * speed)
    assert cost.activation_bytes_per_token == pytest.approx(4.4804 * mib, rel=1e-4)
    assert cost.model_state_bytes_per_rank == pytest.approx(7.12 * 16 / 64 * 1024 * mib, rel=1e-3)
    assert cost.memory_bytes_per_rank == 28 * 1024 * mib


def test_a_cluster_of_your_own() -> None:
    """The function takes any cluster; slower links make slower exchanges and nothing else."""
    fast = cluster_cost_model(Cluster("mine", LLAMA_3B, "L40S", 48e9))
    slow = cluster_cost_model(Cluster("mine", LLAMA_3B, "L40S", 48e9, link="PCIe 3.0", link_bytes_per_s=6e9))
    assert slow.all_to_all_bytes_per_s[8] == fast.all_to_all_bytes_per_s[8] / 2
    assert slow.capacity_tokens == fast.capacity_tokens
    assert json.loads(json.dumps(slow.to_dict()))["name"] == "mine"
