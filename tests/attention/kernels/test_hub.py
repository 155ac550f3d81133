"""A flash-attn of the hub is found by transformers' name, as a pair where it has the functions; no network is used.

The `kernels` package and what it loads are stand-ins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
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
    results,
)

from hf_hetero.attention.kernels import choice, hub
from hf_hetero.attention.kernels.choice import choose_kernel
from hf_hetero.attention.kernels.contract import Kernel, Scores
from hf_hetero.attention.kernels.hub import hub_kernel
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.errors import UnsupportedModel


def module_with(inner: str, **functions: Any) -> Any:
    return SimpleNamespace(**{inner: SimpleNamespace(**functions)}, flash_attn_varlen_func=None)


DENSE = {"_flash_attn_forward": None, "_flash_attn_backward": None}  # FA2's own, for samples that are not packed
LOADED = {
    "kernels-community/flash-attn2": module_with(
        "flash_attn_interface",
        _flash_attn_varlen_forward=fa2_forward,
        _flash_attn_varlen_backward=fa2_backward,
        **DENSE,
    ),
    "kernels-community/flash-attn3": module_with(
        "flash_attn_interface", _flash_attn_forward=fa3_forward, _flash_attn_backward=fa3_backward
    ),
    "kernels-community/flash-attn4": module_with(
        "interface", _flash_attn_fwd=fa4_forward, _flash_attn_bwd=fa4_backward
    ),
    "somebody/flash-other": module_with("interface"),
    "somebody/flash-newer": module_with(
        "flash_attn_interface", _flash_attn_varlen_forward=lambda query: None, _flash_attn_varlen_backward=fa2_backward
    ),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a `kernels` package in place that loads stand-ins; what it is asked for."""
    found: list[dict[str, Any]] = []

    def get_kernel(
        repo_id: str, *, revision: str | None = None, version: int | None = None, trust_remote_code: bool = False
    ) -> Any:
        found.append({"repo_id": repo_id, "revision": revision, "version": version})
        assert not trust_remote_code
        return LOADED[repo_id]

    module = ModuleType("kernels")
    module.__dict__["get_kernel"] = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", module)
    return found


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("number", [2, 3, 4])
def test_pairs_equal_the_definition(number: int, runs: str) -> None:
    """Each of flash-attn's versions, loaded from the hub, is a pair that rings can use."""
    name = f"kernels-community/flash-attn{number}"
    kernel = hub_kernel(name)
    assert isinstance(kernel, Kernel)
    assert (kernel.name, kernel.has_lse) == (name, True)
    for ours, theirs in zip(results(kernel, runs, Scores(0.3), 12), results(PLAIN, runs, Scores(0.3), 12), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_version_is_transformers_own(asked: list[dict[str, Any]]) -> None:
    """A revision that is written after the name is loaded; else the version that transformers is tested with."""
    from transformers.integrations.hub_kernels import get_attn_kernel_version

    name = "kernels-community/flash-attn2"
    hub_kernel(name)
    hub_kernel(f"{name}@v2:flash_attn_varlen_func")
    assert asked == [
        {"repo_id": name, "revision": None, "version": get_attn_kernel_version(name)},
        {"repo_id": name, "revision": "v2", "version": None},
    ]


@pytest.mark.usefixtures("asked")
def test_the_models_name_is_honoured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A model's `attn_implementation` leads here; what has no functions that fit is left to transformers, in words."""
    assert choose_kernel("cuda", torch.bfloat16, wanted="kernels-community/flash-attn2").has_lse
    theirs = Kernel("theirs", "cuda", PLAIN.dtypes, PLAIN.features, attend=PLAIN.__call__)
    monkeypatch.setattr(choice, "through_transformers", lambda name: theirs)
    assert choose_kernel("cuda", torch.bfloat16, wanted="somebody/flash-other") is theirs
    assert "somebody/flash-other has the raw functions of no flash-attn" in caplog.text
    assert choose_kernel("cuda", torch.bfloat16, wanted="somebody/flash-newer") is theirs
    assert "somebody/flash-newer is passed over: its forward does not take this package's call" in caplog.text
    assert "2.7 or later is wanted" in caplog.text


@pytest.mark.usefixtures("asked")
def test_what_is_not_installed_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes a flash-attn that is not installed from the hub: then it is a pair here, too."""
    monkeypatch.setattr(hub, "find_spec", lambda name: name == "kernels" or None)
    assert choose_kernel("cuda", torch.bfloat16, wanted="flash_attention_2").name == "kernels-community/flash-attn2"


def fails(error: Exception) -> Callable[..., Any]:
    def get_kernel(repo_id: str, version: int) -> Any:
        raise error

    return get_kernel


@pytest.mark.parametrize(
    ("get_kernel", "words"),
    [
        (None, "kernels"),  # not installed
        (fails(ConnectionError("no network")), "no network"),
        (fails(FileNotFoundError("no build for torch 2.13")), "no build for torch 2.13"),
        (lambda name: None, "unexpected keyword argument 'repo_id'|missing a required argument: 'name'"),
    ],
)
def test_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, get_kernel: Any, words: str) -> None:
    """Without the package, a network, a build, or with another package's call: an error with what to do."""
    module = ModuleType("kernels")
    module.__dict__["get_kernel"] = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", None if get_kernel is None else module)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=f"(?s)'kernels-community/flash-attn2' cannot.*({words})") as caught:
        choose_kernel("cuda", torch.bfloat16, wanted="kernels-community/flash-attn2")
    assert "pip install 'hf-hetero[kernels]'" in str(caught.value)
    assert "leave it out" in str(caught.value)
