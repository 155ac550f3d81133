"""Mixers go over a pack at once where kernels keep its samples apart, and only there.

No package with such kernels is needed: functions stand for them that are handed to transformers in a module of the
package's name, and compute each sample by transformers' own code, between the borders that they are given.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hybrids import HYBRIDS, InFloat64, hybrid_model
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.layout import contiguous
from hf_hetero.state_layers import packs
from hf_hetero.state_layers.families import mixers_of
from hf_hetero.state_layers.packs import borders_of, gap_of, spread_of
from hf_hetero.state_layers.planned import StateLayers

LENGTHS = [3, 1, 12, 2, 9]
PACKED = ("qwen3_5", "qwen3_next", "kimi_linear", "bamba", "lfm2")
"""Families that pack, one of each kind of kernel."""
GAPPED = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid", "lfm2")
"""Families that pack without causal-conv1d."""


class Seen:
    """What stand-ins were called with: the lengths of the samples of each call, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []


def lengths_of(seq_idx: torch.Tensor | None, cu_seqlens: torch.Tensor | None, num: int) -> list[int]:
    """The tokens between borders, of either form."""
    if cu_seqlens is not None:
        assert cu_seqlens.dtype == torch.int32
        assert (int(cu_seqlens[0]), int(cu_seqlens[-1])) == (0, num)
        return cu_seqlens.diff().tolist()
    if seq_idx is not None:
        assert (seq_idx.dtype, seq_idx.shape) == (torch.int32, (1, num))
        assert (seq_idx.diff() >= 0).all()
        return torch.unique_consecutive(seq_idx, return_counts=True)[1].tolist()
    return [num]


def convolution(plain: Callable[..., Any], seen: Seen, obeys: bool) -> Callable[..., Any]:
    def causal_conv1d_fn(x: Any, weight: Any, bias: Any = None, activation: Any = None, seq_idx: Any = None) -> Any:
        lengths = lengths_of(seq_idx, None, x.shape[-1])
        seen.calls.append(("convolution", lengths))
        parts = x.split(lengths, dim=-1) if obeys else [x]
        more = {} if activation is None else {"activation": activation}
        return torch.cat([plain(part, weight, bias, **more) for part in parts], dim=-1)

    return causal_conv1d_fn


def rule(plain: Callable[..., Any], seen: Seen, obeys: bool) -> Callable[..., Any]:
    def chunk_rule(
        q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, cu_seqlens: Any = None, **others: Any
    ) -> Any:
        lengths = lengths_of(None, cu_seqlens, q.shape[1])
        seen.calls.append(("rule", lengths))
        whole = (q, k, v, g, beta)
        pieces = zip(*(x.split(lengths, dim=1) for x in whole), strict=True) if obeys else [whole]
        outs = [plain(*piece[:3], g=piece[3], beta=piece[4], **others)[0] for piece in pieces]
        return torch.cat(outs, dim=1), None

    # what transformers hands on is what a function says that it takes
    def taken(
        q: Any,
        k: Any,
        v: Any,
        g: Any = None,
        beta: Any = None,
        initial_state: Any = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Any = None,
    ) -> Any:
        assert initial_state is None
        assert not output_final_state
        return chunk_rule(q, k, v, g, beta, cu_seqlens, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)

    return taken


def scan(plain: Callable[..., Any], seen: Seen, obeys: bool) -> Callable[..., Any]:
    def mamba_chunk_scan(
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        chunk_size: Any,
        D: Any = None,
        z: Any = None,
        dt_bias: Any = None,
        initial_states: Any = None,
        seq_idx: Any = None,
        dt_softplus: bool = False,
        dt_limit: Any = (0.0, float("inf")),
        return_final_states: bool = False,
    ) -> Any:
        lengths = lengths_of(seq_idx, None, x.shape[1])
        seen.calls.append(("scan", lengths))
        whole = (x, dt, B, C)
        pieces = zip(*(one.split(lengths, dim=1) for one in whole), strict=True) if obeys else [whole]
        options = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        outs = [plain(a, b, A, c, d, chunk_size=chunk_size, **options) for a, b, c, d in pieces]
        return torch.cat([out[0] if isinstance(out, tuple) else out for out in outs], dim=1)

    return mamba_chunk_scan


def fused(plain: Callable[..., Any], seen: Seen, obeys: bool) -> Callable[..., Any]:
    """The fused kernel of Mamba 2, which here leaves the work to the others, as transformers' own does."""

    def mamba_split(zxbcdt: Any, seq_idx: Any = None, **others: Any) -> None:
        return None

    return mamba_split


STAND_INS = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": rule,
    "chunk_kimi_delta_attention": rule,
    "mamba2_chunk_scan": scan,
    "mamba2_split_conv1d_scan_combined": fused,
}


def install(monkeypatch: pytest.MonkeyPatch, mixer: Any, seen: Seen, obeys: bool = True, but: str = "") -> None:
    """Let the functions of a mixer's module be those of a package, as transformers finds them when it is imported."""
    module = importlib.import_module(type(mixer).__module__)
    for name, make in STAND_INS.items():
        if name == but or not hasattr(module, name):
            continue
        plain = getattr(module, name)
        package = ModuleType("stands_for_a_package")
        package.function = make(plain.__wrapped__, seen, obeys)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stands_for_a_package", package)
        decorate = use_kernel_func_from_hub_with_fallback("function", "stands_for_a_package")
        monkeypatch.setattr(module, name, decorate(plain.__wrapped__))


def mixer_of(family: str) -> tuple[Any, Any]:
    model = hybrid_model(family).eval()
    mixer = next(mixers_of(model))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in mixer.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model, mixer


def hidden_states() -> torch.Tensor:
    return torch.randn(1, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def planned(model: Any, mixer: Any, x: torch.Tensor, times: int = 1) -> list[torch.Tensor]:
    """Outputs of a pack on one rank, in some micro-batches one after the other."""
    layers, found = StateLayers(model), []
    for _ in range(times):
        context = AttentionContext(contiguous(LENGTHS, 1), (0,), 0, None, "gather", CPU, torch.device("cpu"))
        with layers.planned(context), InFloat64():
            out = mixer(x, attention_mask=None)
        found.append(out[0] if isinstance(out, tuple) else out)
    return found


def alone(mixer: Any, x: torch.Tensor, lengths: Sequence[int] = LENGTHS) -> torch.Tensor:
    with InFloat64():
        outs = [mixer(part, attention_mask=None) for part in x.split(list(lengths), dim=1)]
    return torch.cat([out[0] if isinstance(out, tuple) else out for out in outs], dim=1)


@pytest.mark.parametrize("family", PACKED)
def test_a_pack_at_once(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Outputs and gradients are those of each sample alone; after the first pack, each kernel is called once a pack."""
    model, mixer = mixer_of(family)
    leaf = hidden_states().requires_grad_()
    expected = alone(mixer, leaf)
    [gradient] = torch.autograd.grad(expected.square().sum(), leaf)
    seen = Seen()
    install(monkeypatch, mixer, seen)
    assert gap_of(mixer, type(mixer)) == 0
    first, second = planned(model, mixer, leaf, times=2)
    [found] = torch.autograd.grad(second.square().sum(), leaf)
    for out in (first, second):
        assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (found - gradient).abs().max() <= 1e-12 * gradient.abs().max()
    kernels = {name for name, _ in seen.calls}
    assert kernels
    for kernel in kernels:
        calls = [lengths for name, lengths in seen.calls if name == kernel]
        # the first pack is computed both ways, then at once; the second at once
        assert calls == [*([n] for n in LENGTHS), LENGTHS, LENGTHS, LENGTHS]


@pytest.mark.parametrize("family", ["qwen3_5", "bamba", "lfm2"])
def test_kernels_that_ignore_borders_are_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    """What takes borders and does not keep samples apart is seen in the first pack, said, and not used."""
    model, mixer = mixer_of(family)
    expected = alone(mixer, hidden_states())
    seen = Seen()
    install(monkeypatch, mixer, seen, obeys=False)
    with caplog.at_level(logging.WARNING):
        outs = planned(model, mixer, hidden_states(), times=2)
    for out in outs:
        assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert len([record for record in caplog.records if "goes over samples one by one" in record.getMessage()]) == 1


def test_kernels_that_refuse_a_pack_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the first pack at once is said, and ends no run."""
    model, mixer = mixer_of("lfm2")
    expected = alone(mixer, hidden_states())
    seen = Seen()
    install(monkeypatch, mixer, seen)
    module = importlib.import_module(type(mixer).__module__)
    kernel = module.causal_conv1d_fn

    def refusing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("seq_idx") is not None:
            raise RuntimeError("no packs on this device")
        return kernel(*args, **kwargs)

    is_new_implementation, applicable_params = True, ("seq_idx",)

    def stands_for(*args: Any, **kwargs: Any) -> Any:
        assert is_new_implementation
        assert applicable_params
        return refusing(*args, **kwargs)

    monkeypatch.setattr(module, "causal_conv1d_fn", stands_for)
    assert gap_of(mixer, type(mixer)) == 0
    [out] = planned(model, mixer, hidden_states())
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert "no packs on this device" in caplog.text


def test_one_kernel_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of two functions is transformers' own, which knows no borders, samples go one by one."""
    model, mixer = mixer_of("qwen3_5")
    expected = alone(mixer, hidden_states())
    seen = Seen()
    install(monkeypatch, mixer, seen, but="torch_chunk_gated_delta_rule")
    assert gap_of(mixer, type(mixer)) is None
    [out] = planned(model, mixer, hidden_states())
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert [lengths for _, lengths in seen.calls] == [[n] for n in LENGTHS]


@pytest.mark.parametrize("family", list(HYBRIDS))
def test_without_packages_only_convolutions_pack(family: str) -> None:
    """Transformers' own functions are told from a package's; this environment has none of the packages."""
    _, mixer = mixer_of(family)
    assert gap_of(mixer, type(mixer)) == (2 if family == "lfm2" else None)


def gapped(monkeypatch: pytest.MonkeyPatch, mixer: Any, seen: Seen) -> None:
    """Install all packages but the one of the convolution, which stays transformers' own."""
    install(monkeypatch, mixer, seen, but="causal_conv1d_fn")


@pytest.mark.parametrize("family", GAPPED)
def test_a_pack_with_gaps(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Beside transformers' own convolution, outputs and all gradients are those of each sample alone."""
    model, mixer = mixer_of(family)
    leaf = hidden_states().requires_grad_()
    leaves = [leaf, *mixer.parameters()]
    expected = alone(mixer, leaf)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    seen = Seen()
    gapped(monkeypatch, mixer, seen)
    _, out = planned(model, mixer, leaf, times=2)
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    for found, gradient in zip(torch.autograd.grad(out.square().sum(), leaves), gradients, strict=True):
        assert (found - gradient).abs().max() <= 1e-12 * gradient.abs().max()
    calls = [lengths for name, lengths in seen.calls if name == "rule"]
    width = gap_of(mixer, type(mixer))
    with_gaps = [length + width for length in LENGTHS]
    assert calls == ([] if family == "lfm2" else [*([n] for n in LENGTHS), with_gaps, with_gaps, with_gaps])


@pytest.mark.parametrize("family", GAPPED)
def test_a_gap_that_is_too_narrow_is_seen(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """One row less, and samples see each other: the comparison above can fail, and a first pack finds it out."""
    model, mixer = mixer_of(family)
    expected = alone(mixer, hidden_states())
    gapped(monkeypatch, mixer, Seen())
    narrow = gap_of(mixer, type(mixer)) - 1
    monkeypatch.setattr(packs, "gap_of", lambda *_: narrow)
    [out] = planned(model, mixer, hidden_states())
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()
    monkeypatch.setattr(packs, "_agree", lambda *_: True)
    [out] = planned(model, mixer, hidden_states())
    assert (out - expected).abs().max() > 0.01 * expected.abs().max()


def test_where_no_gap_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias fills rows of zeros; a mixer that hands one name on to all functions cannot tell some and not others."""
    _, mixer = mixer_of("lfm2")
    mixer.in_proj.bias = torch.nn.Parameter(torch.zeros(mixer.in_proj.out_features))
    assert gap_of(mixer, type(mixer)) is None
    for family in ("kimi_linear", "bamba"):
        _, mixer = mixer_of(family)
        gapped(monkeypatch, mixer, Seen())
        assert gap_of(mixer, type(mixer)) is None


def test_spread() -> None:
    """Where rows lie with two rows after each sample."""
    assert spread_of((2, 1, 3), 2, torch.device("cpu")).tolist() == [0, 1, 4, 7, 8, 9]


def test_mamba_1_has_no_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that it trains with takes none, so that its samples would see each other."""
    _, mixer = mixer_of("mamba")
    module = importlib.import_module(type(mixer).__module__)

    def kernel(xz: Any, conv1d_weight: Any) -> Any:
        raise AssertionError("not called")

    package = ModuleType("stands_for_a_package")
    package.function = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stands_for_a_package", package)
    decorate = use_kernel_func_from_hub_with_fallback("function", "stands_for_a_package")
    install(monkeypatch, mixer, Seen())
    monkeypatch.setattr(module, "mamba_inner_fn", decorate(module.mamba_inner_fn.__wrapped__))
    assert gap_of(mixer, type(mixer)) is None


def test_borders() -> None:
    """The sample of each token, and where samples begin, under the name that the mixer takes."""
    _, mixer = mixer_of("qwen3_5")
    borders = borders_of(type(mixer), (2, 1, 3), 0, torch.device("cpu"))
    assert borders["seq_idx"].tolist() == [[0, 0, 1, 2, 2, 2]]
    assert borders["cu_seq_lens_q"].tolist() == [0, 2, 3, 6]
    _, mixer = mixer_of("kimi_linear")
    assert borders_of(type(mixer), (2, 1, 3), 0, torch.device("cpu"))["cu_seqlens"].tolist() == [0, 2, 3, 6]


def test_borders_beside_a_function_that_refuses_them() -> None:
    """Only under the name that this function is not handed, and not at all where no other is called."""
    _, mixer = mixer_of("qwen3_5")
    borders = borders_of(type(mixer), (5, 4, 6), 3, torch.device("cpu"))
    assert {name: x.tolist() for name, x in borders.items()} == {"cu_seq_lens_q": [0, 5, 9, 15]}
    _, mixer = mixer_of("lfm2")
    assert borders_of(type(mixer), (5, 4, 6), 3, torch.device("cpu")) == {}
