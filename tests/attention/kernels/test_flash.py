"""flash-attn's pairs are called as the libraries want it, and give what the definition gives.

The libraries are stand-ins with the signatures of the real ones (of August 2026), which compute by the definition; what
the real ones compute is tested on a GPU (tests/gpu).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from attention.kernels.stand_ins import (
    RUNS,
    fa2_backward,
    fa2_forward,
    fa3_backward,
    fa3_forward,
    fa4_backward,
    fa4_forward,
    forward,
    results,
)

from hf_hetero.attention.kernels import flash
from hf_hetero.attention.kernels.contract import SOFTCAP, Kernel, Scores
from hf_hetero.attention.kernels.pair import Offer
from hf_hetero.attention.kernels.plain import PLAIN


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


def offer_of(name: str) -> Offer | None:
    return {"fa2": flash.FA2, "fa3": flash.FA3, "fa4": flash.FA4}[name].installed()


def pair_of(name: str) -> Kernel:
    kernel = offer_of(name)
    assert isinstance(kernel, Kernel)
    assert kernel.name == name
    assert kernel.has_lse
    return kernel


VERSIONS = ("fa2", "fa3", "fa4")
MODULES = dict(
    zip(VERSIONS, ("flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute.interface"), strict=True)
)
CALLS = {
    "fa2": ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
    "fa3": ("_flash_attn_forward", "_flash_attn_backward"),
    "fa4": ("_flash_attn_fwd", "_flash_attn_bwd"),
}


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
    module, name = MODULES[version], CALLS[version][1]
    real = getattr(sys.modules[module], name)

    def spy(**kwargs: Any) -> Any:
        asked.append(kwargs["deterministic"])
        return real(**kwargs)

    setattr(sys.modules[module], name, spy)
    kernel = pair_of(version)
    results(kernel, "whole samples", Scores(1.0), 8)
    torch.use_deterministic_algorithms(True)
    try:
        results(kernel, "whole samples", Scores(1.0), 8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True]


def names_of(offers: list[Offer]) -> list[str]:
    assert all(isinstance(offer, Kernel) for offer in offers)
    return [offer.name for offer in offers if isinstance(offer, Kernel)]


def test_not_installed(install: Callable[..., None]) -> None:
    """Nothing is offered that is not there; FA4 alone makes `import flash_attn` succeed, which is not FA2."""
    assert flash.flash_kernels((9, 0)) == []
    install("fa4")
    assert offer_of("fa2") is None
    assert names_of(flash.flash_kernels((9, 0))) == ["fa4"]


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
    assert names_of(found) == names
    assert [x.name for x in found if isinstance(x, Kernel) and SOFTCAP not in x.features] == ["fa4"] * (
        capability[0] == 12
    )


def test_names_of_transformers(install: Callable[..., None]) -> None:
    """Transformers' names lead to the pairs; other names to nothing."""
    install(*VERSIONS)
    for number in (2, 3, 4):
        kernel = flash.named_flash_kernel(f"flash_attention_{number}")
        assert isinstance(kernel, Kernel)
        assert kernel.name == f"fa{number}"
    assert flash.named_flash_kernel("kernels-community/flash-attn2") is None


@pytest.mark.parametrize("version", ["2.6.3", "2.5", "unknown"])
def test_old_fa2(install: Callable[..., None], version: str) -> None:
    """Before 2.7 the log-sum-exp has another shape: not used, and said, with the version found and the one wanted."""
    install("fa2", fa2_version=version)
    assert offer_of("fa2") == f"flash-attn {version} is passed over: it is too old for rings; 2.7 or later is wanted"


@pytest.mark.parametrize(
    ("version", "error"),
    [
        ("fa2", ImportError("undefined symbol: _ZN3c105ErrorC2E")),
        ("fa2", ModuleNotFoundError("No module named 'flash_attn_2_cuda'", name="flash_attn_2_cuda")),
        ("fa3", OSError("libcudart.so.12: cannot open shared object file")),
        ("fa4", RuntimeError("no driver")),
    ],
)
def test_what_is_broken_is_passed_over_in_words(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, version: str, error: Exception
) -> None:
    """A library that is there but cannot be imported is not taken for one that is not there."""
    install(version)
    real = importlib.import_module

    def import_module(name: str) -> ModuleType:
        if name == MODULES[version]:
            raise error
        return real(name)

    monkeypatch.setattr(flash.importlib, "import_module", import_module)
    offer = offer_of(version)
    assert isinstance(offer, str)
    assert f"it cannot be imported ({error})" in offer


def changed(function: Callable[..., Any], remove: str = "", add: str = "") -> Callable[..., Any]:
    """A function that does the same, with one argument less, or one more that it insists on."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name != remove]
    if add:
        parameters.append(inspect.Parameter(add, inspect.Parameter.KEYWORD_ONLY))

    def other(*args: Any, **kwargs: Any) -> Any:
        signature.replace(parameters=parameters).bind(*args, **kwargs)
        return function(*args, **kwargs)

    other.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return other


CALLED = [name for call in CALLS.values() for name in call]


@pytest.mark.parametrize("number", range(len(CALLED)), ids=CALLED)
def test_a_function_with_another_signature_is_passed_over(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """One argument of any function renamed, or one more: refused in words, with what is found and what is wanted."""
    version, name = list(VERSIONS)[number // 2], CALLED[number]
    install(version)
    module = sys.modules[MODULES[version]]
    function = getattr(module, name)
    monkeypatch.setattr(module, name, changed(function))
    assert isinstance(offer_of(version), Kernel)
    for change, argument in (({"remove": "softmax_scale"}, "'softmax_scale'"), ({"add": "extra"}, "'extra'")):
        monkeypatch.setattr(module, name, changed(function, **change))
        offer = offer_of(version)
        assert isinstance(offer, str)
        assert argument in offer
        assert ("forward" if number % 2 == 0 else "backward") in offer
        found, wanted = {
            "fa2": ("flash-attn 2.8.3", "2.7 or later is wanted"),
            "fa3": ("flash_attn_3 of no version", "one of 2026 is wanted"),
            "fa4": ("flash-attn-4 of no version", "one of 2026 is wanted"),
        }[version]
        assert offer.startswith(f"{found} is passed over: ")
        assert offer.endswith(wanted)


def test_operators_of_torch_library(install: Callable[..., None]) -> None:
    """The real functions are operators of torch.library, whose keywords are in their schema."""

    @torch.library.custom_op("hf_hetero_test::forward", mutates_args=())
    def operator(q: torch.Tensor, window_size_left: int = -1) -> torch.Tensor:
        return q.clone()

    install("fa3", _flash_attn_forward=operator)
    assert "unexpected keyword argument 'k'" in str(offer_of("fa3"))

    @torch.library.custom_op("hf_hetero_test::varlen_forward", mutates_args=())
    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        window = (window_size_left, window_size_right)
        call = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, softcap)
        return forward(q, k, v, *call)

    install("fa2")
    sys.modules[MODULES["fa2"]].__dict__["_flash_attn_varlen_forward"] = varlen
    found, expected = (results(kernel, "whole samples", Scores(0.3), 12) for kernel in (pair_of("fa2"), PLAIN))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
