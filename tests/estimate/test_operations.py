"""Operations and bytes are those of the model: counted by torch, or by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from helpers import tiny_model, with_lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_hetero.costs.volume import Heads, volume
from hf_hetero.estimate.memory import activation_bytes, model_state_bytes
from hf_hetero.estimate.model_shape import ModelShape, shape_of
from hf_hetero.estimate.operations import (
    LOGIT_BYTES,
    attention_flops,
    exchange_bytes,
    linear_flops,
    optimizer_bytes,
    query_bytes,
    traffic_bytes,
)
from hf_hetero.layout import asking, zigzag


def shape(checkpointing: bool = False, lora: bool = False) -> ModelShape:
    model = tiny_model()
    return shape_of(with_lora(model) if lora else model, model.config, 4, checkpointing)


def counted_flops(model: Any, tokens: int) -> int:
    """What torch counts in matrix products of linear layers, forward and backward; scores are batched products."""
    ids = torch.randint(0, 97, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return sum(counter.get_flop_counts()["Global"].get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_linear_flops_match_a_count(tied: bool, checkpointing: bool) -> None:
    """Torch counts the same products, embeddings looked up and head not recomputed; norms are a hundredth of them."""
    model = tiny_model(attention="eager", tie_word_embeddings=tied)
    if checkpointing:
        model.activation_checkpointing_enable()
    counted = counted_flops(model, 8) / 8
    found = shape_of(model, model.config, 4, checkpointing)
    # recompute stops at the last tensor that is needed: the MLP's last product is not made again
    again = 2 * found.num_layers * found.hidden * found.intermediate if checkpointing else 0
    assert linear_flops(found) - again == pytest.approx(counted, rel=0.02)
    assert 8 * found.num_params != pytest.approx(counted, rel=0.02)


def test_adapters_save_a_third_of_the_operations() -> None:
    """With adapters, frozen weights have no gradients: about 4 a weight instead of 6."""
    worked = shape().num_params - shape().looked_up_params
    assert linear_flops(shape()) == 6 * worked
    assert 4 * worked < linear_flops(shape(lora=True)) < 4.5 * worked


def test_traffic() -> None:
    """By hand, for two layers in fp32: hidden 32, queries 32, keys 16 and values 16, inner 48, vocabulary 97."""
    layer = 4 * (6 * 32 + 2 * (32 + 2 * 16) + 3 * 48)
    assert traffic_bytes(shape()) == 3 * 2 * layer * 4 + LOGIT_BYTES * 97
    assert traffic_bytes(shape(checkpointing=True)) == 4 * 2 * layer * 4 + LOGIT_BYTES * 97
    adapters = (3 * 32 + 32 + 2 * 32 + 48) + 4 * (32 + 2 * 16 + 32 + 2 * 48 + 32)
    assert traffic_bytes(shape(lora=True)) == 3 * 2 * (layer + adapters) * 4 + LOGIT_BYTES * 97
    assert optimizer_bytes(shape(), 4) == 40 * shape().num_params / 4


def test_attention_flops_match_a_count() -> None:
    """The quadratic part equals what torch counts for the two products of causal attention, halved and 3.5-fold."""
    s, layers, heads, dim = 64, 2, 4, 8
    q = torch.randn(1, heads, s, dim)
    with FlopCounterMode(display=False) as counter:
        (q @ q.transpose(-1, -2)) @ q
    assert attention_flops(shape()) * s * s == pytest.approx(3.5 * layers * counter.get_total_flops() / 2)


def test_exchange_bytes() -> None:
    """Queries, keys, values and outputs of two layers, in fp32, forward and backward."""
    assert exchange_bytes(shape()) == 2 * (4 + 2 + 2 + 4) * 8 * 2 * 4


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_query_bytes_are_what_a_token_ring_moves(element_bytes: int) -> None:
    """Five trips are no less than what is counted to the element, and at most 1 % more for heads of usual size."""
    wide = replace(shape(), head_dim=128, element_bytes=element_bytes)
    heads = Heads(wide.heads, wide.kv_heads, 128, 128, lse_elements=4 // element_bytes)
    layout = zigzag([4096], 4)
    moved = sum(volume(layout, "token_ring", heads, rank).total for rank in range(4)) * element_bytes * wide.num_layers
    lent = sum(s.num_tokens for a in range(4) for b in range(4) if a != b for s in asking(layout, a, b))
    assert moved <= 5 * query_bytes(wide) * lent <= 1.01 * moved


def test_kept_exchanges_cost_memory_and_save_traffic() -> None:
    """With recompute an exchange is made three times; kept, twice, for its tensors' memory in each layer."""
    model = tiny_model()
    repeats, keeps = (shape_of(model, model.config, 4, True, kept) for kept in (False, True))
    assert exchange_bytes(repeats) == 1.5 * exchange_bytes(keeps)
    assert activation_bytes(keeps) - activation_bytes(repeats) == (4 + 2 + 2 + 4) * 8 * 2 * 4
    whole = shape_of(model, model.config, 4, False, True)  # nothing is recomputed
    assert exchange_bytes(whole) == exchange_bytes(shape_of(model, model.config, 4, False, False))
    assert activation_bytes(whole) == activation_bytes(shape_of(model, model.config, 4, False, False))


class BetweenProducts(TorchDispatchMode):
    """Counts the bytes that operations read and write, without products, attention and what copies nothing."""

    OTHERS = ("mm.", "bmm.", "addmm.", "_scaled_dot", "view.", "reshape.", "t.", "transpose.", "expand.", "detach.")
    OTHERS += ("unsqueeze.", "squeeze.", "slice.", "alias.", "split.", "select.", "permute.", "as_strided.", "empty")
    OTHERS += ("_unsafe_view.", "unbind.", "zeros", "ones")

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.__name__.startswith(self.OTHERS):
            tensors = [x for x in tree_leaves((args, kwargs or {}, out)) if isinstance(x, torch.Tensor)]
            self.num_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def bytes_moved(kind: str, autocasts: bool, layers: int, tokens: int) -> tuple[int, ModelShape]:
    """Forward and backward between the products of a model's layers, and the model's shape."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"head_dim": 32, "vocab_size": 64, "num_hidden_layers": layers, "use_cache": False}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    dtype = torch.float32 if autocasts else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    x = torch.randn(1, tokens, 128, dtype=dtype, requires_grad=True)
    with BetweenProducts() as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            out = model.model(inputs_embeds=x).last_hidden_state
        out.sum().backward()
    return counter.num_bytes, shape_of(model, config, 2, checkpointing=False)


@pytest.mark.parametrize("autocasts", [False, True], ids=["16 bits", "autocast"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_traffic_is_what_operations_move(kind: str, autocasts: bool) -> None:
    """A layer's bytes of a token, by transformers' own operations; those of weights do not grow with tokens."""
    (small, _), (large, one) = (bytes_moved(kind, autocasts, 1, tokens) for tokens in (16, 32))
    (smaller, _), (larger, two) = (bytes_moved(kind, autocasts, 2, tokens) for tokens in (16, 32))
    counted = ((larger - large) - (smaller - small)) / 16
    assert (one.autocasts, one.norms_heads) == (autocasts, kind == "Qwen3")
    assert traffic_bytes(two) - traffic_bytes(one) == pytest.approx(counted, rel=0.05)
    fused = traffic_bytes(replace(two, compiled=True)) - traffic_bytes(replace(one, compiled=True))
    assert (fused == traffic_bytes(two) - traffic_bytes(one)) == (kind == "Llama" and not autocasts)


def test_checkpointing_saves_memory_and_costs_time() -> None:
    """Recompute trades activations for operations."""
    assert activation_bytes(shape(checkpointing=True)) < activation_bytes(shape())
    assert linear_flops(shape(checkpointing=True)) > linear_flops(shape())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_is_asked_forward(checkpointing: bool) -> None:
    """A pass through a reference takes a forward pass's operations and bytes more; its weights are held beside."""
    plain = shape(checkpointing)
    beside = replace(plain, reference_passes=1, reference_bytes=1000)
    worked = plain.num_params - plain.looked_up_params
    assert linear_flops(beside) - linear_flops(plain) == 2 * worked
    assert attention_flops(beside) - attention_flops(plain) == attention_flops(shape()) / 3.5
    assert exchange_bytes(beside) - exchange_bytes(plain) == exchange_bytes(shape()) / 2
    passes = traffic_bytes(shape(True)) - traffic_bytes(shape())  # one forward pass is what recompute adds
    assert traffic_bytes(beside) - traffic_bytes(plain) == passes
    assert model_state_bytes(beside) - model_state_bytes(plain) == 1000
    assert activation_bytes(beside) == activation_bytes(plain)
