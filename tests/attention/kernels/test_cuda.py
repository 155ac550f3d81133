"""Kernels for CUDA are called as their libraries want it; what they compute is tested on a GPU (tests/gpu)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from attention.kernels.stand_ins import RUNS, backward, forward, results
from transformers import modeling_flash_attention_utils as lookup

from hf_hetero.attention.kernels import cuda
from hf_hetero.attention.kernels.contract import SOFTCAP, WINDOW, Scores, Segments
from hf_hetero.attention.kernels.cuda import TORCH_VARLEN, refusal, through_transformers, torch_varlen
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.errors import UnsupportedModel

FORWARD = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
    "Tensor? alibi_slopes=None{}) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, "
    "Tensor debug_attn_mask)"
)
BACKWARD = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)
PAGED = FORWARD.format(", Tensor? block_table=None, int? num_splits=None")
SCHEMAS = {  # torch's version -> its operators, from native_functions.yaml in its wheel
    "2.11": (FORWARD.format(""), BACKWARD),
    "2.12": (PAGED, BACKWARD),
    "2.13": (PAGED, BACKWARD),
    "2.14": (PAGED, BACKWARD),
    "2.15": (PAGED, BACKWARD),
}
OTHERS = {  # what other versions have been, or could be -> what the refusal says of it
    "before 2.7": ((PAGED, BACKWARD.replace("rng_state", "philox_seed").replace("unused", "philox_offset")), "philox"),
    "renamed": ((PAGED.replace("window_size_left", "left"), BACKWARD), "'window_size_left'"),
    "one more": ((PAGED.replace("bool return_debug_mask", "bool return_debug_mask, int k_cache"), BACKWARD), "k_cache"),
    "one less": ((PAGED, BACKWARD.replace("float? scale=None, ", "")), "'scale'"),
    "other results": ((PAGED.replace("Tensor softmax_logsumexp, ", ""), BACKWARD), "'rng_state'"),
}


def operator(schema: str) -> Any:
    return SimpleNamespace(_schema=torch._C.parse_schema(schema))


@pytest.mark.parametrize("version", SCHEMAS)
def test_torchs_operators_take_the_call(version: str) -> None:
    """The call that each step makes is one that the operators of every known version take."""
    assert refusal(*map(operator, SCHEMAS[version])) is None


def test_the_table_is_true_of_this_torch() -> None:
    """What the table says of the version at hand is what its operators say."""
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in SCHEMAS:
        pytest.skip(f"torch {version} is not in the table")
    assert [str(operator._schema) for operator in cuda.operators()] == [
        str(torch._C.parse_schema(schema)) for schema in SCHEMAS[version]
    ]
    assert torch_varlen() is TORCH_VARLEN


@pytest.mark.parametrize("change", OTHERS)
def test_other_operators_are_not_called(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Operators with another signature are refused in words that name torch's version and the argument."""
    schemas, named = OTHERS[change]
    monkeypatch.setattr(cuda, "operators", lambda: tuple(map(operator, schemas)))
    offer = torch_varlen()
    assert isinstance(offer, str)
    assert named in offer
    assert f"torch {torch.__version__} is installed" in offer
    assert "torch 2.11 to 2.15 is wanted" in offer


def test_a_torch_without_the_operators() -> None:
    """One that has no such operators is refused, too."""
    assert "has no aten::_flash_attention_forward" in str(refusal(None, None))


def call(cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, causal: bool, **options: Any) -> tuple[Any, ...]:
    """What the operators' arguments mean, as flash-attn's; and what they would not take."""
    assert options["dropout_p"] == 0
    left, right = options["window_size_left"], options["window_size_right"]
    assert causal == ((left, right) == (-1, 0))  # as torch itself calls them
    is_causal = right == 0
    window = (left, right) if left >= 0 else (-1, -1)
    return cum_seq_q, cum_seq_k, max_q, max_k, options["scale"], is_causal, window, 0.0


@pytest.fixture
def stand_in() -> Iterator[None]:
    """Operators for the CPU, called through torch's dispatcher, that compute by the definition."""

    def run_forward(
        query: Any,
        key: Any,
        value: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        **options: Any,
    ) -> Any:
        assert not return_debug_mask
        arguments = call(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, dropout_p=dropout_p, **options)
        nothing = query.new_empty(0)
        return *forward(query, key, value, *arguments), nothing, nothing, nothing

    def run_backward(
        grad_out: Any,
        query: Any,
        key: Any,
        value: Any,
        out: Any,
        logsumexp: Any,
        cum_seq_q: Any,
        cum_seq_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Any,
        unused: Any,
        **options: Any,
    ) -> Any:
        assert (rng_state.dtype, rng_state.shape) == (torch.uint64, (2,))
        arguments = call(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, dropout_p=dropout_p, **options)
        return backward(grad_out, query, key, value, out, logsumexp, *arguments)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", run_forward, "CPU")
        library.impl("_flash_attention_backward", run_backward, "CPU")
        yield


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("head_dim", [8, 12])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("runs", RUNS)
def test_torchs_kernel_equals_the_definition(runs: str, window: int | None, head_dim: int) -> None:
    """Forward and merged backward, whole samples, gathered keys and ring blocks, heads of sizes that are filled up."""
    scores = Scores(0.3, window if RUNS[runs][2] else None)  # only causal runs have windows
    found, expected = (results(kernel, runs, scores, head_dim) for kernel in (TORCH_VARLEN, PLAIN))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_shapes_by_torchs_own_word() -> None:
    """What torch itself says of the results' shapes, where it computes nothing, is what the contract wants."""
    device = torch.device("meta")
    q, k, v, grad = (torch.empty(12, h, 64, device=device, dtype=torch.bfloat16) for h in (4, 2, 2, 4))
    segments, scores = Segments.packed((5, 7), device), Scores(0.125, window=3)
    assert TORCH_VARLEN.forward is not None
    assert TORCH_VARLEN.backward is not None
    out, lse = TORCH_VARLEN.forward(q, k, v, segments, scores)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (12, 4), torch.float32)
    grads = TORCH_VARLEN.backward(grad, q, k, v, out, lse, segments, scores)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_what_transformers_cannot_load_is_refused_with_the_remedy() -> None:
    """A flash-attn of the hub without the package that loads it: an error that says what to install."""
    with pytest.raises(
        UnsupportedModel, match=r"'kernels-community/flash-attn2' cannot be loaded.*hf-hetero\[kernels\]"
    ):
        through_transformers("kernels-community/flash-attn2")


def test_flash_attn_through_transformers_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed flash-attn is found by transformers' name and called with its keywords; a stand-in for FA3."""
    calls: list[dict[str, object]] = []

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> tuple[torch.Tensor, None]:
        calls.append({"scale": softmax_scale, "causal": causal, "window": window_size, "max": max_seqlen_q})
        lengths = cu_seqlens_q.diff().tolist()
        window = None if window_size == (-1, -1) else window_size[0] + 1
        return PLAIN(
            q, k, v, Segments.packed(lengths, q.device), Scores(softmax_scale or 1.0, window, softcap or None)
        ), None

    module = ModuleType("flash_attn_interface")
    module.__dict__.update(
        flash_attn_func=flash_attn_varlen_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_varlen_func,
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(lookup, "_loaded_implementation", None)
    kernel = through_transformers("flash_attention_3")
    assert (kernel.name, kernel.features) == ("flash_attention_3", {WINDOW, SOFTCAP})
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    scores = Scores(0.3, window=4, softcap=2.0)
    segments = Segments.packed([5, 7], q.device)
    found = kernel(q, k, v, segments, scores)
    assert torch.allclose(found, PLAIN(q, k, v, segments, scores))
    assert calls == [{"scale": 0.3, "causal": True, "window": (3, 3), "max": 7}]
    assert not kernel.has_lse  # nothing for a ring
    monkeypatch.setattr(lookup, "_loaded_implementation", None)
