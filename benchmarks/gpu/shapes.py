"""Models with random weights in the sizes of well-known ones, and samples of real lengths, without any file of data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from hf_hetero.what_if.mixes import MIXES, draw_lengths

QWEN = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960}
LLAMA = {"head_dim": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 4096}
LORA_RANK = 16


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Args:
        kind: its config's class.
        sizes: of the config.
        lora: frozen bf16 weights with adapters on every linear layer of a block; else all weights train, in fp32.
    """

    kind: Any
    sizes: dict[str, Any] = field(default_factory=dict)
    lora: bool = False

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of queries, of keys and values, and their size."""
        return self.sizes["num_attention_heads"], self.sizes["num_key_value_heads"], self.sizes["head_dim"]


SHAPES = {
    "qwen3-0.6b": Shape(
        Qwen3Config,
        QWEN
        | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
        | {"tie_word_embeddings": True},
    ),
    "llama-3.2-1b": Shape(
        LlamaConfig,
        LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"tie_word_embeddings": True},
    ),
    "qwen3-8b-lora": Shape(
        Qwen3Config,
        QWEN
        | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"tie_word_embeddings": False},
        lora=True,
    ),
}
MINIATURES = {"tiny-qwen3": Shape(Qwen3Config, SMALL), "tiny-qwen3-lora": Shape(Qwen3Config, SMALL, lora=True)}


class Adapter(torch.nn.Module):
    """A frozen linear layer with a trainable product of two thin ones beside it (LoRA, arXiv:2106.09685).

    As peft makes them, written out, because peft may be absent.
    """

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.down = torch.nn.Linear(base.in_features, LORA_RANK, bias=False, device=device, dtype=torch.float32)
        self.up = torch.nn.Linear(LORA_RANK, base.out_features, bias=False, device=device, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the product to what the frozen layer gives."""
        out = self.base(x)
        # autocast gives both the type that it computes in, without a copy of x in fp32
        thin = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.weight.dtype)
        return out + self.up(self.down(thin)).to(out.dtype)


def make_model(shape: Shape, device: torch.device, attention: str = "sdpa", **changes: Any) -> Any:
    """A model on the device; the same weights for the same shape."""
    torch.manual_seed(0)
    config = shape.kind(**{**shape.sizes, **changes}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.use_cache = False
    dtype = torch.bfloat16 if shape.lora and device.type == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if shape.lora:
        model.requires_grad_(False)
        for parent in [m for layer in model.model.layers for m in layer.modules()]:
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear and not isinstance(parent, Adapter):
                    setattr(parent, name, Adapter(child))
    return model


def model_flops(model: Any, shape: Shape, lengths: list[int]) -> float:
    """Operations that training on these samples needs, whatever a method computes twice or pads.

    Two a weight forward, two for the gradients of activations, two for those of weights that train; embeddings that are
    only looked up need none. Causal attention: 2 H D s^2 a layer forward, twice as many backward.
    """
    heads, _, head_dim = shape.heads
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    if shape.sizes.get("tie_word_embeddings"):
        matrices.append(model.get_output_embeddings().weight)
    a_token = sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)
    a_square = 6 * heads * head_dim * shape.sizes["num_hidden_layers"]
    return float(sum(a_token * n + a_square * n * n for n in lengths))


def mix_lengths(mix: str, num_samples: int, most: int, seed: int = 0) -> list[int]:
    """Lengths as those of a named mix, the longest at most `most` tokens."""
    lengths, _ = draw_lengths(MIXES[mix], num_samples, seed, most)
    return [max(2, int(n)) for n in lengths]


def mix_pack(mix: str, num_tokens: int, most: int, seed: int = 0) -> list[int]:
    """Lengths of a mix that add up to exactly so many tokens; the last one is cut."""
    found: list[int] = []
    for length in mix_lengths(mix, num_tokens, most, seed):
        found.append(min(length, num_tokens - sum(found)))
        if sum(found) == num_tokens:
            break
    return found


def samples(lengths: list[int], vocab: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random tokens of these lengths: what is learned does not matter here, only how fast."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": list(row)} for row in rows]


@contextmanager
def held(model: Any) -> Iterator[Any]:
    """A model whose memory is free afterwards, though somebody still holds on to it."""
    try:
        yield model
    finally:
        model.to("meta")
