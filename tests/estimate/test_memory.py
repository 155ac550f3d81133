"""Bytes of models and tokens against torch and by hand; what a rank has is shared and read from the system."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from estimate.test_operations import shape
from helpers import kept_by_autograd, tiny_model, with_lora

from hf_hetero.estimate.memory import (
    ALLOCATOR_SETTINGS,
    LEVERS,
    activation_bytes,
    allocator_advice,
    free_memory_bytes,
    gathered_bytes,
    host_memory_bytes,
    logits_bytes,
    loss_bytes,
    memory_of,
    mlp_bytes,
    moments,
    peak_bytes,
    tokens_by_lever,
    tokens_in_chunk,
    usable_bytes,
    waiting_bytes,
)
from hf_hetero.estimate.model_shape import shape_of
from hf_hetero.model import chunked_mlp
from hf_hetero.model.chunked_loss import CHUNK_BYTES


def test_a_chunked_loss_keeps_no_logits() -> None:
    """A token costs the head's input and its gradient instead of logits; a chunk and the head's gradient come once.

    Of a token's bytes those count that are there at once: a layer's in backward, or the loss's before it.
    """
    model = tiny_model()
    whole, chunked = (shape_of(model, model.config, 4, False, False, chunks) for chunks in (False, True))
    assert logits_bytes(whole) == 3 * 4 * 97
    assert logits_bytes(chunked) == 2 * 32 * 4
    in_backward = (3 * 48 + 2 * 32) * 4
    assert activation_bytes(whole) - activation_bytes(chunked) == 3 * 4 * 97 - in_backward
    assert loss_bytes(whole) == 0
    assert loss_bytes(chunked) == 3 * CHUNK_BYTES + 4 * 97 * 32
    frozen = with_lora(tiny_model())
    assert loss_bytes(shape_of(frozen, model.config, 4, False, False, True)) == 3 * CHUNK_BYTES


def test_a_rank_too_small_for_a_chunk_counts_the_logits_it_holds() -> None:
    """Little memory holds tokens, too; where a chunk just fills it, both ways to count give the same tokens."""
    model = tiny_model()
    tiny = shape_of(model, model.config, 4, False, False, True)
    a_token = waiting_bytes(tiny) + logits_bytes(tiny)
    _, (token, fixed) = moments(tiny, 1000.0, 2.0**28)
    assert fixed == 1000 + 4 * 97 * 32
    assert token == a_token + 97 * 12
    edge = 1000 + loss_bytes(tiny) + tokens_in_chunk(tiny) * a_token
    (_, (small, small_fixed)), (_, (large, large_fixed)) = (moments(tiny, 1000.0, edge + more) for more in (-1, 1))
    assert small > large
    assert (edge - small_fixed) / small == pytest.approx((edge - large_fixed) / large)


@pytest.mark.parametrize("chunked_loss", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_fits_is_what_the_peak_leaves(chunked_loss: bool, checkpointing: bool) -> None:
    """A rank holds as many tokens as its memory has room for when most bytes are there, and not one more.

    It is not always the same moment that decides.
    """
    model = tiny_model(hidden_size=64, vocab_size=4000, dtype=torch.bfloat16)
    tiny = shape_of(model, model.config, 2, checkpointing, True, chunked_loss, True)
    for gib in (8, 64):
        memory_bytes = gib * 2.0**30
        token, fixed = memory_of(tiny, 1e6, memory_bytes)
        tokens = int((memory_bytes - fixed) / token)
        assert peak_bytes(tiny, 1e6, tokens) <= memory_bytes < peak_bytes(tiny, 1e6, tokens + 1)
    binding = memory_of(tiny, 1e6, memory_bytes)
    assert moments(tiny, 1e6, memory_bytes).index(binding) == (0 if chunked_loss else 1)


def test_activation_bytes_against_torch() -> None:
    """The memory of a token is within a factor of two of what autograd really keeps, logits left out."""
    model, tokens = tiny_model(hidden_size=64, intermediate_size=160, num_hidden_layers=4, vocab_size=11), 256
    with kept_by_autograd(model) as kept:
        out = model.model(input_ids=torch.randint(0, 11, (1, tokens)), use_cache=False).last_hidden_state
    found = shape_of(model, model.config, 4, False)
    estimated = waiting_bytes(found) * tokens
    assert 0.5 < estimated / sum(kept.values()) < 2
    assert out.requires_grad


def test_gathered_layers() -> None:
    """Two layers' weights and one's gradients, and the embeddings' and the head's: counted on the model itself."""
    model = tiny_model()
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    everything = sum(p.numel() for p in model.parameters())
    outside = everything - len(model.model.layers) * layer
    assert gathered_bytes(shape()) == pytest.approx(4 * (3 * layer + 2 * outside), rel=0.02)


def test_chunks_of_mlps() -> None:
    """Where layers are recomputed their inner tensors do not count, but for a chunk; not where memory ends before."""
    model = tiny_model()
    whole, chunked = (shape_of(model, model.config, 4, True, False, True, chunks) for chunks in (False, True))
    assert activation_bytes(whole) - activation_bytes(chunked) == (4 + 3) * 48 * 4  # kept, and gradients
    assert mlp_bytes(whole) == 0
    assert mlp_bytes(chunked) == 2 * chunked_mlp.CHUNK_BYTES + 4 * 3 * 32 * 48
    assert moments(chunked, 0.0, 2.0**34)[0] == (activation_bytes(chunked), mlp_bytes(chunked))
    assert moments(chunked, 0.0, 2.0**29)[0] == moments(whole, 0.0, 2.0**29)[0]
    kept = shape_of(model, model.config, 4, False, False, True, True)
    assert (mlp_bytes(kept), activation_bytes(kept)) == (0, activation_bytes(replace(kept, chunked_mlp=False)))


def test_a_gpu_gives_memory_to_communicators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes half a GB; a card never counts as less than half free; the host gives half, shared by its ranks."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 40))
    gpu = torch.device("cuda", 0)
    assert free_memory_bytes(gpu, 8) == int(76e9)
    # of 8 ranks: of degrees 1 (torch's own), 2, 4, 8, and one more for gradients
    assert free_memory_bytes(gpu, 8, num_ranks=8) == int(73.5e9)
    assert usable_bytes(4e9, 8) == 2e9
    assert host_memory_bytes(gpu, 8) == (1 << 40) // 16
    assert host_memory_bytes(torch.device("cpu"), 8) is None


def test_cached_files_do_not_count_as_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that holds files read before can be given to a rank."""
    told = SimpleNamespace(free=1 << 20, available=1 << 34)
    monkeypatch.setattr("psutil.virtual_memory", lambda: told)
    assert free_memory_bytes(torch.device("cpu"), 2) == int(0.9 * (1 << 33))


def test_each_lever_adds_tokens() -> None:
    """A model of 8 billion weights on 8 cards: each way to save memory holds more than those before it.

    A card that the weights alone fill holds nothing.
    """
    large = replace(
        shape(),
        **{"num_layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336},
        **{"vocab": 128256, "num_params": 8 * 10**9, "active_params": 8 * 10**9, "trainable_params": 8 * 10**9},
        **{"param_bytes": 32 * 10**9, "element_bytes": 2},
    )
    held = tokens_by_lever(large, 8, 80 * 2.0**30)
    assert list(held) == list(LEVERS)
    assert list(held.values()) == sorted(set(held.values()))
    assert held["offloaded"] > 5 * held["MLPs in chunks"] > 25 * held["chunked loss"]
    assert set(tokens_by_lever(large, 1, 24 * 2.0**30).values()) == {0}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_advice_on_the_allocator(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It is given on a GPU, unless it has been followed under either of the two names; other settings do not matter."""
    for variable in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    assert allocator_advice(torch.device("cpu")) == ""
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert "expandable_segments:True" in allocator_advice(torch.device("cuda"))
    monkeypatch.setenv(name, "max_split_size_mb:128,expandable_segments:True")
    assert allocator_advice(torch.device("cuda")) == ""
