"""This module makes the cost models that ship with the package: common clusters, by data sheets and assumptions.

    python -m hf_hetero.estimate.clusters [FOLDER]        writes every estimated file again (default: hf_hetero/costs)

Every speed is one that can be looked up; what share of it training reaches is fitted to others' training runs
(`shares`), with the kernel of attention that comes with torch, and each file's `source` says so.
`gpt-7b_64xa100_192k.json` is not made here: its numbers were measured and published.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from hf_hetero.costs import SHIPPED_FOLDER, CostModel
from hf_hetero.estimate.devices import Device, device_named
from hf_hetero.estimate.estimate import estimate_cost_model
from hf_hetero.estimate.memory import Shards
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.estimate.shares import DENSE, attention_share, reached
from hf_hetero.topology import Topology

USABLE_MEMORY = 0.9  # of the card's; the rest is for the allocator, NCCL and the CUDA context
NETWORK_SHARE = 0.75  # of the line rate that an all-to-all reaches: FlexSP's testbed measured 0.72 to 0.87
BF16_BYTES, FP32_BYTES = 2, 4
KERNEL = "torch_varlen"  # what runs where no flash-attn is installed


@dataclass(frozen=True, slots=True)
class Dense:
    """`Dense` is a dense decoder with a gated MLP, by the numbers of its config.

    Args:
        title: for people.
        tied: the head is the embedding.
        adapter_rank: None for full training; else LoRA of this rank on every linear layer, weights frozen in bf16.
    """

    title: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    adapter_rank: int | None = None

    def shape(self) -> ModelShape:
        """Count the weights, and return the shape as it is trained.

        Layers are recomputed, but not their exchanges; the loss goes in chunks; bf16 over fp32 master weights.
        """
        widths = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate)
        query, key_value, inner = ((self.hidden, width) for width in widths)
        linears = [query, query, key_value, key_value, inner, inner, inner]  # one of each pair the other way round
        layer = sum(rows * columns for rows, columns in linears) + 2 * self.hidden
        num_params = self.num_layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden
        trainable, param_bytes = num_params, FP32_BYTES * num_params
        if self.adapter_rank is not None:
            trainable = self.num_layers * self.adapter_rank * sum(rows + columns for rows, columns in linears)
            param_bytes = BF16_BYTES * num_params + FP32_BYTES * trainable
            num_params += trainable
        return ModelShape(
            num_layers=self.num_layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocab=self.vocab,
            num_params=num_params,
            active_params=num_params,
            trainable_params=trainable,
            param_bytes=param_bytes,
            element_bytes=BF16_BYTES,
            checkpointing=True,
            keeps_exchanged=True,
            chunked_loss=True,
        )


@dataclass(frozen=True, slots=True)
class Network:
    """A `Network` joins the nodes: its name for people, and a node's line rate one way, in bytes a second."""

    title: str
    node_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """A `Cluster` is machines with one kind of card, eight to a node.

    Args:
        name: of the cost model.
        model: what is trained.
        device: name in `devices.KNOWN_DEVICES`.
        card_bytes: memory of a card.
        num_ranks: cards.
        network: what joins the nodes; None for one node.
        link: what joins the cards of a node, for people.
        link_bytes_per_s: of one rank in an all-to-all inside the node; None is the table's.
        sharded: model states over all ranks (FSDP), else a copy on each (DDP).
    """

    name: str
    model: Dense
    device: str
    card_bytes: float
    num_ranks: int = 8
    network: Network | None = None
    link: str = "NVLink"
    link_bytes_per_s: float | None = None
    sharded: bool = True


LLAMA_8B = Dense("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_8B_LORA = replace(LLAMA_8B, title="Llama-3.1-8B, LoRA of rank 16", adapter_rank=16)
LLAMA_3B = Dense("Llama-3.2-3B", 28, 3072, 24, 8, 128, 8192, 128256, tied=True)

RANKS_PER_NODE = 8
PCIE_BYTES_PER_S = 12e9
IB = Network("InfiniBand, 400 Gb/s a node", 50e9)
IB_8 = Network("InfiniBand, 400 Gb/s a card", 400e9)
ETHERNET = Network("Ethernet, 100 Gb/s a node", 12.5e9)

CLUSTERS = (
    Cluster("llama-8b_8xa100_nvlink", LLAMA_8B, "A100", 80e9),
    Cluster("llama-8b_8xa100_pcie", LLAMA_8B, "A100", 80e9, link="PCIe 4.0", link_bytes_per_s=PCIE_BYTES_PER_S),
    Cluster("llama-8b_16xa100_ib", LLAMA_8B, "A100", 80e9, 16, IB),
    Cluster("llama-8b_64xa100_ib", LLAMA_8B, "A100", 80e9, 64, IB),
    Cluster("llama-8b_8xh100_nvlink", LLAMA_8B, "H100", 80e9),
    Cluster("llama-8b-lora_8xh100_nvlink", LLAMA_8B_LORA, "H100", 80e9, sharded=False),
    Cluster("llama-8b_8xh100_pcie", LLAMA_8B, "H100 PCIe", 80e9, link="PCIe 5.0"),
    Cluster("llama-8b_16xh100_ethernet", LLAMA_8B, "H100", 80e9, 16, ETHERNET),
    Cluster("llama-8b_16xh100_ib", LLAMA_8B, "H100", 80e9, 16, IB_8),
    Cluster("llama-8b_64xh100_ib", LLAMA_8B, "H100", 80e9, 64, IB_8),
    Cluster("llama-8b_8xh200_nvlink", LLAMA_8B, "H200", 141e9),
    Cluster("llama-8b_16xh200_ib", LLAMA_8B, "H200", 141e9, 16, IB_8),
    Cluster("llama-8b_64xh200_ib", LLAMA_8B, "H200", 141e9, 64, IB_8),
    Cluster("llama-3b_8xrtx4090_pcie", LLAMA_3B, "RTX 4090", 24e9, link="PCIe 4.0"),
)


def cluster_cost_model(cluster: Cluster) -> CostModel:
    """Estimate a cluster, and name all assumptions in `source`."""
    shape, device = cluster.model.shape(), _device(cluster)
    ranks_per_node = min(cluster.num_ranks, RANKS_PER_NODE)
    topology = Topology(cluster.num_ranks, ranks_per_node, int(USABLE_MEMORY * cluster.card_bytes))
    # a head is the least that an all-to-all of attention can give a rank
    degrees = tuple(degree for degree in topology.degrees if degree <= shape.heads)
    cost = estimate_cost_model(shape, device, topology, degrees, Shards() if cluster.sharded else None)
    return replace(cost, name=cluster.name, source=_source(cluster, shape, device, cost))


def write_estimates(folder: Path) -> None:
    """Write one JSON file for each cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    for cluster in CLUSTERS:
        cluster_cost_model(cluster).save(folder / f"{cluster.name}.json")


def _device(cluster: Cluster) -> Device:
    """Return what training reaches of the table's entry, with the cluster's links."""
    known = device_named(cluster.device)
    device = replace(reached(known, KERNEL), link_bytes_per_s=cluster.link_bytes_per_s or known.link_bytes_per_s)
    if cluster.network is None:
        return device
    return replace(device, network_bytes_per_s=NETWORK_SHARE * cluster.network.node_bytes_per_s / RANKS_PER_NODE)


def _source(cluster: Cluster, shape: ModelShape, device: Device, cost: CostModel) -> str:
    """Say what was assumed for a cluster."""
    card = device_named(cluster.device)
    assert card.card_bytes_per_s is not None
    num_nodes = -(-cluster.num_ranks // RANKS_PER_NODE)
    states = (
        "FSDP, 16 bytes a parameter over all ranks plus gathered layers" if cluster.sharded else "DDP, a copy a rank"
    )
    trained = (
        "trained in full" if cluster.model.adapter_rank is None else f"{shape.trainable_params / 1e6:.0f}M trained"
    )
    words = [
        f"estimated, not measured: {cluster.model.title} ({shape.num_params / 1e9:.2f}B parameters, {trained}) in "
        f"bf16 with layers recomputed but not their exchanges, a chunked loss, {states}; "
        f"{num_nodes} x 8 {cluster.device} of {cluster.card_bytes / 1e9:.0f} GB",
        f"{DENSE:.0%} of {card.flops / 1e12:.0f} TFLOP/s in products, {attention_share(card, KERNEL):.0%} in attention "
        f"by torch's own kernel, {card.card_bytes_per_s / 1e9:.0f} GB/s to memory, {device.layer_s * 1e3:.0f} ms for a "
        "layer of each micro-batch: shares fitted to others' training runs",
        f"{device.link_bytes_per_s / 1e9:.0f} GB/s a rank over {cluster.link}",
    ]
    if cluster.network is not None:
        words.append(f"{NETWORK_SHARE:.0%} of the line rate of {cluster.network.title}")
    words.append(f"{device.ring_overlap:.0%} of a ring's attention hides its exchange")
    free = (cost.memory_bytes_per_rank - cost.model_state_bytes_per_rank) / 1e9
    words.append(f"{USABLE_MEMORY:.0%} of the memory, {free:.1f} GB of it for activations")
    return "; ".join(words)


if __name__ == "__main__":
    write_estimates(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED_FOLDER)
