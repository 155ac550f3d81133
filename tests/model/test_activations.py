"""What groups do to hold more tokens: less is kept, as the estimate has it; the layers are left as they were."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from helpers import gradients_of, kept_by_autograd, largest_difference, tiny_model

from hf_hetero.estimate.memory import activation_bytes, boundary_bytes
from hf_hetero.estimate.model_shape import shape_of
from hf_hetero.model.activations import Activations
from hf_hetero.model.chunked_mlp import ChunkedMLP
from hf_hetero.model.offload import HostStore
from hf_hetero.plan import ACTIVATIONS

TOKENS = 64
CPU = torch.device("cpu")


def deep_model() -> Any:
    return tiny_model(hidden_size=64, intermediate_size=160, num_hidden_layers=5, vocab_size=11).train()


def under(policy: str | None, model: Any, in_chunks: bool = True) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd keeps on the device after forward, weights aside, and gradients, of one micro-batch."""
    activations = Activations(model, recomputes=False, in_chunks=in_chunks, compiled=False)
    store = activations.store(policy, CPU, TOKENS, 64)
    ids = torch.randint(0, 11, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with kept_by_autograd(model) as kept, activations.following(policy, store):
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state
        num_bytes = sum(kept.values())
        out.square().sum().backward()
    return num_bytes, gradients_of(model)


def test_each_policy_keeps_less_and_learns_the_same() -> None:
    """On the device stay: all; the inputs of layers; next to nothing. Gradients are the same numbers."""
    plain, expected = under(None, deep_model(), in_chunks=False)
    recomputed, by_recompute = under("recompute", deep_model())
    offloaded, by_offload = under("offload", deep_model())
    assert plain > 4 * recomputed > 16 * offloaded
    for found in (by_recompute, by_offload):
        assert largest_difference(found, expected) <= 1e-6
    shape = shape_of(deep_model(), deep_model().config, 4, True)
    # beside them: what norms and embeddings outside of layers keep
    assert boundary_bytes(shape) * 5 * TOKENS <= recomputed <= 1.5 * boundary_bytes(shape) * 5 * TOKENS
    assert activation_bytes(shape) < activation_bytes(shape_of(deep_model(), deep_model().config, 4, False))


def test_a_wrong_offload_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: what comes back from the host decides the gradients."""
    _, expected = under(None, deep_model())
    get = HostStore.get
    monkeypatch.setattr(HostStore, "get", lambda store, saved: get(store, saved) * 1.01)
    _, found = under("offload", deep_model())
    assert largest_difference(found, expected) > 1e-4


def look_of(model: Any) -> list[tuple[bool, type, bool]]:
    """Of each layer: whether it is recomputed, its MLP's class, and whether it knows how to be recomputed."""
    return [
        (layer.gradient_checkpointing, type(layer.mlp), hasattr(layer, "_gradient_checkpointing_func"))
        for layer in model.model.layers
    ]


@pytest.mark.parametrize("policy", [None, *ACTIVATIONS])
def test_layers_are_changed_for_one_micro_batch(policy: str | None) -> None:
    """While it runs, and back to what they were, even after an error; a pickled model shows nothing of it."""
    model = deep_model()
    model.model.layers[1].gradient_checkpointing = True
    before = look_of(model)
    activations = Activations(model, recomputes=False, in_chunks=True, compiled=False)
    seen: list[tuple[bool, bool]] = []

    def micro_batch() -> None:
        with activations.following(policy, None):
            seen.extend(
                (layer.gradient_checkpointing, isinstance(layer.mlp, ChunkedMLP)) for layer in model.model.layers
            )
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        micro_batch()
    on = policy is not None
    assert seen == [(on or number == 1, on) for number in range(5)]
    assert look_of(model) == before
    assert look_of(pickle.loads(pickle.dumps(model))) == before


def test_what_a_run_offers() -> None:
    """Not what all its layers do anyway; nothing where a compiler took over, or no layer can; chunks where wanted."""
    kinds = {"in_chunks": True, "compiled": False}
    assert Activations(deep_model(), recomputes=False, **kinds).policies == ACTIVATIONS
    assert Activations(deep_model(), recomputes=True, **kinds).policies == ("offload",)
    assert Activations(torch.nn.Linear(2, 2), recomputes=False, **kinds).policies == ()
    compiled = Activations(deep_model(), recomputes=False, in_chunks=True, compiled=True)
    assert not compiled.policies
    assert not compiled.chunked_mlps
    model = deep_model()
    assert not Activations(model, recomputes=True, in_chunks=False, compiled=False).chunked_mlps
    every = Activations(model, recomputes=True, in_chunks=True, compiled=False)
    with every.following(None, None):
        assert all(isinstance(layer.mlp, ChunkedMLP) for layer in model.model.layers)
        assert not any(layer.gradient_checkpointing for layer in model.model.layers)  # somebody else arranges it
