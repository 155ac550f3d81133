"""MLPs in chunks: the same numbers, only a chunk's inner tensors, no third forward pass, and only where it is exact."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import tiny_model, with_lora
from torch.utils.checkpoint import checkpoint

from hf_hetero.model.activations import Activations
from hf_hetero.model.chunked_mlp import INNER_TENSORS, ChunkedMLP, chunked_class, widest_inner

HIDDEN = 32


def layer_of(family: str = "llama", dtype: torch.dtype = torch.float64) -> Any:
    return tiny_model(family, "eager").model.layers[0].to(dtype)


def in_chunks(layer: Any, tokens: int) -> ChunkedMLP:
    """The layer's MLP, so many tokens at a time."""
    kind = chunked_class(layer)
    assert kind is not None
    layer.mlp.__class__ = kind
    layer.mlp.chunk_bytes = tokens * INNER_TENSORS * widest_inner(layer.mlp) * layer.mlp.down_proj.weight.element_size()
    return layer.mlp.train()


def hidden_states(num_tokens: int = 11, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(1, num_tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients(mlp: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of the input and the trainable weights."""
    out = mlp(x)
    weights = [p for p in mlp.parameters() if p.requires_grad]
    loss = (out.float() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [x, *weights] if x.requires_grad else weights)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("tokens", [1, 3, 11, 50])
def test_same_numbers(family: str, tokens: int) -> None:
    """Output and gradients equal those of the MLP as a whole, whatever the chunk."""
    layer = layer_of(family)
    expected = gradients(copy.deepcopy(layer.mlp), hidden_states())
    for ours, theirs in zip(gradients(in_chunks(layer, tokens), hidden_states()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_frozen_weights_and_frozen_input() -> None:
    """With adapters only they get gradients; where the input needs none, none is made."""
    model = with_lora(tiny_model(dtype=torch.float64), ["gate_proj", "down_proj"])
    layer = model.base_model.model.model.layers[0]
    for x in (hidden_states(), hidden_states().detach()):
        whole = copy.deepcopy(layer.mlp)
        for ours, theirs in zip(gradients(in_chunks(layer, 4), x), gradients(whole, x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_less_exact_in_bf16() -> None:
    """Chunks are added up in fp32: no further from fp64 than the whole MLP in bf16 is."""
    x64 = hidden_states(400)
    layer = layer_of("llama", torch.float32)
    exact = gradients(copy.deepcopy(layer.mlp).double(), x64)
    layer.bfloat16()
    x = x64.detach().bfloat16().requires_grad_()
    whole, ours = gradients(copy.deepcopy(layer.mlp), x), gradients(in_chunks(layer, 16), x)
    for name, a, b, true in zip("oxgud", ours, whole, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - true).norm() <= 1.1 * (b.double() - true).norm(), name


def test_autocast_holds_in_backward() -> None:
    """What autocast did forward it does in backward."""
    layer = layer_of("llama", torch.float32)
    x, whole = hidden_states(dtype=torch.float32), copy.deepcopy(layer.mlp)
    mlp = in_chunks(layer, 4)
    with torch.autocast("cpu", torch.bfloat16):
        expected, ours = gradients(whole, x), gradients(mlp, x)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_inner_tensors_never_exist_as_a_whole() -> None:
    """Nothing but the input is kept, and no more than a chunk of tokens is inside at a time."""
    mlp, rows, kept = in_chunks(layer_of(), 3), [], []
    mlp.gate_proj.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))  # type: ignore[operator]
    x = hidden_states()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = mlp(x)
    assert kept == [x.shape]
    out.sum().backward()
    assert rows == [3, 3, 3, 2] * 2
    whole = copy.deepcopy(mlp)
    whole.__class__ = type(mlp).__mro__[2]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        whole(x)
    assert any(shape[-1] == widest_inner(mlp) for shape in kept)  # the check above can fail


def test_a_recomputed_layer_computes_its_mlp_twice() -> None:
    """Not three times: the recompute stops at the MLP's input, which is the last thing kept."""
    layer, passes = layer_of(), []
    mlp = in_chunks(layer, 100)
    mlp.gate_proj.register_forward_hook(lambda *args: passes.append(torch._C._current_graph_task_id() != -1))  # type: ignore[operator]

    def block(x: torch.Tensor) -> torch.Tensor:
        return x + mlp(layer.post_attention_layernorm(x))

    x = hidden_states()
    expected = torch.autograd.grad(block(x).square().sum(), x)[0]
    passes.clear()
    found = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), x)[0]  # type: ignore[union-attr]
    assert passes == [False, True]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_names_weights_and_evaluation_stay() -> None:
    """The state dict is as it was; without gradients, in evaluation, or called in another way, so is the MLP."""
    layer = layer_of()
    before, whole = list(layer.state_dict()), copy.deepcopy(layer.mlp)
    mlp = in_chunks(layer, 3)
    assert isinstance(mlp, type(whole))
    assert list(layer.state_dict()) == before
    x = hidden_states()
    with torch.no_grad():
        assert torch.equal(mlp(x), whole(x))
    assert torch.equal(mlp(x=x), whole(x))
    assert torch.equal(mlp.eval()(x), whole(x))


def test_only_where_tokens_do_not_meet() -> None:
    """Experts, noise, and what is no MLP stay as they are."""
    assert chunked_class(layer_of("qwen3-moe", torch.float32)) is None
    noisy = layer_of()
    noisy.mlp.act_fn = torch.nn.Dropout(0.1)
    assert chunked_class(noisy) is None
    noisy.mlp.act_fn = torch.nn.Dropout(0.0)
    assert chunked_class(noisy) is not None
    assert chunked_class(torch.nn.Linear(2, 2)) is None
    strange = torch.nn.Module()
    strange.mlp = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert chunked_class(strange) is None


def hooked_gradients(policy: str | None, hang: Any) -> list[torch.Tensor]:
    """Gradients of a model whose layers follow a policy, with hooks on one MLP."""
    model = tiny_model(dtype=torch.float64).train()
    hang(model.model.layers[0].mlp)
    activations = Activations(model, recomputes=False, in_chunks=True, compiled=False)
    with activations.following(policy, None):
        model(torch.arange(3, 14)[None], use_cache=False).logits.square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def on_a_weight(mlp: Any) -> None:
    mlp.up_proj.weight.register_hook(lambda gradient: gradient / 2)


def on_a_part(mlp: Any) -> None:
    mlp.up_proj.register_forward_hook(lambda module, inputs, out: out - out.mean(-2, keepdim=True))


@pytest.mark.parametrize("hang", [on_a_weight, on_a_part])
def test_hooks_are_called_once(hang: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody hangs on the gradient of a weight, or on a part of an MLP, sees what it sees without chunks."""
    monkeypatch.setattr(ChunkedMLP, "chunk_bytes", 1 << 12)
    expected = hooked_gradients(None, hang)
    for ours, theirs in zip(hooked_gradients("recompute", hang), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
