"""flash-attn's pairs are called as the libraries want it, and give what the definition gives.

The libraries are stand-ins with the signatures of the real ones (of August 2026), which compute by the definition; what
the real ones compute is tested on a GPU (tests/gpu).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_hetero.attention.kernels import flash
from hf_hetero.attention.kernels.contract import SOFTCAP, Kernel, Scores, Segments
from hf_hetero.attention.kernels.plain import PLAIN

assert PLAIN.forward is not None
assert PLAIN.backward is not None


def call_of(cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, scale: Any, causal: bool, window: Any, softcap: float) -> Any:
    """What flash-attn's arguments mean, in ours; and what none of its versions would take."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    q_lengths, k_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max_q, max_k) == (max(q_lengths), max(k_lengths))
    left, right = window
    no_end = left in (None, -1)
    assert right in ((None, -1) if no_end else (0,))
    segments = Segments.of(q_lengths, k_lengths, cu_q.device, causal)
    return segments, Scores(scale, None if no_end else left + 1, softcap or None)


def check_heads(*tensors: torch.Tensor) -> None:
    assert all(x.shape[-1] % 8 == 0 and x.is_contiguous() for x in tensors)


def forward(q: Any, k: Any, v: Any, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    check_heads(q, k, v)
    out, lse = PLAIN.forward(q, k, v, *call_of(*call))  # type: ignore[misc]
    return out, lse.T.contiguous()


def backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *call: Any) -> Any:
    check_heads(dout, q, k, v, out)
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    return PLAIN.backward(dout, q, k, v, out, lse.T, *call_of(*call))  # type: ignore[misc]


def fa2_forward(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
    block_table: Any = None,
    leftpad_k: Any = None,
    seqused_k: Any = None,
    zero_tensors: bool = False,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*forward(q, k, v, *call), None, None)


def fa2_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Any,
    deterministic: bool,
    rng_state: Any = None,
    zero_tensors: bool = False,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    for into, found in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *call), strict=True):
        into.copy_(found)


def fa3_forward(
    q: Any,
    k: Any,
    v: Any,
    k_new: Any = None,
    v_new: Any = None,
    qv: Any = None,
    out_: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    cu_seqlens_k_new: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    softmax_scale: Any = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*forward(q, k, v, *call), None, None)


def fa3_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    softmax_lse: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    sequed_q: Any = None,
    sequed_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    softmax_scale: Any = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, is_causal, window, softcap)
    for into, found in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *call), strict=True):
        into.copy_(found)


def fa4_forward(
    q: Any,
    k: Any,
    v: Any,
    qv: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    min_seqlen_k: Any = None,
    page_table: Any = None,
    softmax_scale: Any = None,
    causal: bool = False,
    softcap: Any = None,
    window_size_left: Any = None,
    window_size_right: Any = None,
    learnable_sink: Any = None,
    return_lse: bool = False,
) -> Any:
    assert return_lse
    assert -1 not in (window_size_left, window_size_right)  # there, -1 is a window
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*forward(q, k, v, *call), None, None)


def fa4_backward(
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    dout: Any,
    lse: Any,
    softmax_scale: Any = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: Any = None,
    window_size_right: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    deterministic: bool = False,
) -> Any:
    window = (window_size_left, window_size_right)
    call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
    return (*backward(dout, q, k, v, out, lse, *call), None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put stand-ins of some versions in the place of what is installed, which is nothing."""
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def put(*versions: str, fa2_version: str = "2.8.3", **changes: Any) -> None:
        package = ModuleType("flash_attn")
        package.__path__ = []
        modules = {"flash_attn": package}
        if "fa2" in versions:
            package.__dict__["__version__"] = fa2_version
            module = modules["flash_attn.flash_attn_interface"] = ModuleType("flash_attn.flash_attn_interface")
            module.__dict__["_flash_attn_varlen_forward"] = fa2_forward
            module.__dict__["_flash_attn_varlen_backward"] = fa2_backward
        if "fa3" in versions:
            module = modules["flash_attn_interface"] = ModuleType("flash_attn_interface")
            module.__dict__.update(
                {"_flash_attn_forward": fa3_forward, "_flash_attn_backward": fa3_backward, **changes}
            )
        if "fa4" in versions:
            modules["flash_attn.cute"] = ModuleType("flash_attn.cute")
            module = modules["flash_attn.cute.interface"] = ModuleType("flash_attn.cute.interface")
            module.__dict__.update({"_flash_attn_fwd": fa4_forward, "_flash_attn_bwd": fa4_backward, **changes})
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    return put


def pair_of(name: str) -> Kernel:
    kernel = getattr(flash, name)()
    assert kernel is not None
    assert kernel.name == name
    assert kernel.has_lse
    return kernel


VERSIONS = ("fa2", "fa3", "fa4")
RUNS = {
    "whole samples": ((3, 1, 9), (3, 1, 9), True),
    "more keys than queries": ((3, 2), (5, 9), True),
    "every query sees every key": ((3, 2), (5, 9), False),
}


def results(kernel: Kernel, runs: str, scores: Scores, head_dim: int) -> list[torch.Tensor]:
    """Output and log-sum-exp, and gradients against an output and a log-sum-exp merged over more keys than these."""
    q_lengths, k_lengths, causal = RUNS[runs]
    segments = Segments.of(q_lengths, k_lengths, torch.device("cpu"), causal)
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(q_lengths), 4), (sum(k_lengths), 2), (sum(k_lengths), 2), (sum(q_lengths), 4))
    q, k, v, grad = (torch.randn(n, h, head_dim, generator=generator, dtype=torch.float64) for n, h in shapes)
    assert kernel.forward is not None
    assert kernel.backward is not None
    out, lse = kernel.forward(q, k, v, segments, scores)
    return [out, lse, *kernel.backward(grad, q, k, v, 0.7 * out, lse + 0.3, segments, scores)]


@pytest.mark.parametrize("head_dim", [8, 12])
@pytest.mark.parametrize("scores", [Scores(0.3), Scores(0.3, window=2), Scores(0.3, window=3, softcap=1.5)])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("version", VERSIONS)
def test_equals_the_definition(
    install: Callable[..., None], version: str, runs: str, scores: Scores, head_dim: int
) -> None:
    """Forward and backward, for whole samples, gathered keys and ring blocks; heads of odd sizes are filled up."""
    if not RUNS[runs][2] and scores.window is not None:
        scores = Scores(0.3, softcap=scores.softcap)  # only causal runs have windows
    install(version)
    for found, expected in zip(
        results(pair_of(version), runs, scores, head_dim), results(PLAIN, runs, scores, head_dim), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_comparison_can_fail(install: Callable[..., None]) -> None:
    """A window wider by one token is seen."""
    install("fa2")
    found = results(pair_of("fa2"), "whole samples", Scores(0.3, window=3), 8)
    expected = results(PLAIN, "whole samples", Scores(0.3, window=2), 8)
    assert all((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("version", VERSIONS)
def test_full_determinism_reaches_the_kernel(install: Callable[..., None], version: str) -> None:
    """`torch.use_deterministic_algorithms` asks for the kernels' deterministic backward passes."""
    asked: list[bool] = []
    install(version)
    module, name = {
        "fa2": ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward"),
        "fa3": ("flash_attn_interface", "_flash_attn_backward"),
        "fa4": ("flash_attn.cute.interface", "_flash_attn_bwd"),
    }[version]
    real = getattr(sys.modules[module], name)

    def spy(*args: Any, softcap: float = 0.0, **kwargs: Any) -> Any:
        asked.append(kwargs["deterministic"])
        return real(*args, softcap=softcap, **kwargs)

    setattr(sys.modules[module], name, spy)
    kernel = pair_of(version)
    results(kernel, "whole samples", Scores(1.0), 8)
    torch.use_deterministic_algorithms(True)
    try:
        results(kernel, "whole samples", Scores(1.0), 8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def test_not_installed(install: Callable[..., None]) -> None:
    """Nothing is offered that is not there; FA4 alone makes `import flash_attn` succeed, which is not FA2."""
    assert flash.flash_kernels((9, 0)) == []
    install("fa4")
    assert flash.fa2() is None
    assert [kernel.name for kernel in flash.flash_kernels((9, 0))] == ["fa4"]


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ((7, 5), []),
        ((8, 0), ["fa2"]),
        ((8, 9), ["fa2"]),
        ((9, 0), ["fa3", "fa4", "fa2"]),
        ((10, 0), ["fa4", "fa2"]),
        ((12, 0), ["fa4", "fa2"]),
    ],
)
def test_best_first(install: Callable[..., None], capability: tuple[int, int], names: list[str]) -> None:
    """Each GPU gets what runs on it, fastest first; FA4 has no softcap on consumer Blackwell."""
    install(*VERSIONS)
    found = flash.flash_kernels(capability)
    assert [kernel.name for kernel in found] == names
    assert [kernel.name for kernel in found if SOFTCAP not in kernel.features] == ["fa4"] * (capability[0] == 12)


def test_names_of_transformers(install: Callable[..., None]) -> None:
    """Transformers' names lead to the pairs; other names to nothing."""
    install(*VERSIONS)
    for number in (2, 3, 4):
        kernel = flash.named_flash_kernel(f"flash_attention_{number}")
        assert kernel is not None
        assert kernel.name == f"fa{number}"
    assert flash.named_flash_kernel("kernels-community/flash-attn2") is None


@pytest.mark.parametrize("version", ["2.6.3", "2.5", "unknown"])
def test_old_fa2(install: Callable[..., None], caplog: pytest.LogCaptureFixture, version: str) -> None:
    """Before 2.7 the log-sum-exp has another shape: not used, and said."""
    install("fa2", fa2_version=version)
    assert flash.fa2() is None
    assert f"flash-attn {version} is too old" in caplog.text


def test_old_fa3_and_fa4(install: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """Versions with other signatures are left alone, and named."""
    install("fa3", _flash_attn_forward=lambda q, k, v, window_size=(-1, -1): None)
    assert flash.fa3() is None
    assert "flash-attn 3 is too old" in caplog.text
    install("fa4", _flash_attn_bwd=lambda q, k, v: None)
    assert flash.fa4() is None
    assert "flash-attn 4 is too old" in caplog.text


def test_operators_of_torch_library(install: Callable[..., None]) -> None:
    """The real functions are operators of torch.library, whose keywords are in their schema."""

    @torch.library.custom_op("hf_hetero_test::forward", mutates_args=())
    def operator(q: torch.Tensor, window_size_left: int = -1) -> torch.Tensor:
        return q.clone()

    install("fa3", _flash_attn_forward=operator)
    assert flash.fa3() is not None
