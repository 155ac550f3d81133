"""A kernel that computes something else than attention on the device is found out before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_hetero.attention.kernels import plain
from hf_hetero.attention.kernels.contract import HALF, SINKS, SOFTCAP, WINDOW, Kernel, Segments
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.attention.kernels.trial import failure

HOST = torch.device("cpu")
ALL = frozenset({WINDOW, SOFTCAP, SINKS})


def attend(kernel: Kernel) -> Kernel:
    """The same without a log-sum-exp: what only transformers can call."""
    return Kernel("attend", None, HALF, kernel.features, attend=kernel.__call__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [frozenset[str](), frozenset({WINDOW}), ALL], ids=len)
@pytest.mark.parametrize("kernel", [CPU, PLAIN, attend(PLAIN)], ids=lambda kernel: kernel.name)
def test_right_kernels_pass(kernel: Kernel, features: frozenset[str], dtype: torch.dtype) -> None:
    """What computes attention in a half type passes, with its rounding, and does not touch the run's random numbers."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert failure(kernel, HOST, dtype, features) is None
    assert torch.equal(torch.get_rng_state(), state)


def padded(lse: torch.Tensor, segments: Segments) -> torch.Tensor:
    """As flash-attn before 2.7: (R, H, longest run), here turned round as a pair turns (H, Tq)."""
    runs = lse.split(list(segments.q_lengths))
    return torch.stack([F.pad(run, (0, 0, 0, segments.max_q - len(run))) for run in runs], dim=1)


def forward_with(change: Callable[..., Any]) -> Kernel:
    def forward(*call: Any) -> Any:
        return change(*plain.forward(*call), call[3])

    return replace(PLAIN, forward=forward)


def top_left(q: Any, k: Any, v: Any, segments: Segments, scores: Any) -> Any:
    """Causal runs aligned at their first keys, as flash-attn before 2.1."""
    if not segments.causal:
        return plain.forward(q, k, v, segments, scores)
    spans = zip(k.split(list(segments.k_lengths)), v.split(list(segments.k_lengths)), segments.q_lengths, strict=True)
    parts = [(keys[:n], values[:n]) for keys, values, n in spans]
    own = Segments.packed(segments.q_lengths, HOST)
    return plain.forward(q, torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts]), own, scores)


def backward_of_its_own(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, segments: Any, scores: Any) -> Any:
    """A backward that takes output and log-sum-exp over its own keys, whatever it is given."""
    return plain.backward(grad, q, k, v, *plain.forward(q, k, v, segments, scores), segments, scores)


def raises(*_: Any) -> Any:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


WRONG = {
    "padded by runs": (forward_with(lambda out, lse, segments: (out, padded(lse, segments))), "log-sum-exp has the sh"),
    "turned round": (forward_with(lambda out, lse, _: (out, lse.T)), "log-sum-exp has the shape (4, 74)"),
    "heads in another order": (forward_with(lambda out, lse, _: (out, lse.flip(1))), "log-sum-exp is off"),
    "of base two": (forward_with(lambda out, lse, _: (out, lse * 1.4427)), "log-sum-exp is off"),
    "no numbers": (forward_with(lambda out, lse, _: (out * torch.nan, lse)), "output is off by nan"),
    "another output": (forward_with(lambda out, lse, _: (out.flip(1), lse)), "output is off"),
    "aligned at the first": (replace(PLAIN, forward=top_left), "output is off"),
    "its own log-sum-exp": (replace(PLAIN, backward=backward_of_its_own), "gradient of queries is off"),
    "no grouped heads": (
        attend(replace(PLAIN, forward=lambda q, k, v, *x: plain.forward(q, k[:, :1], v[:, :1], *x))),
        "output is off",
    ),
    "does not run here": (replace(PLAIN, forward=raises), "fails on this device: FlashAttention only supports Ampere"),
    "cannot be differentiated": (attend(replace(PLAIN, backward=raises)), "fails on this device"),
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_kernels_are_found_out(change: str) -> None:
    """Other layouts, alignments, and backwards that would train on in silence: each is named."""
    kernel, words = WRONG[change]
    assert words in str(failure(kernel, HOST, torch.bfloat16, frozenset()))


@pytest.mark.parametrize("kernel", [PLAIN, attend(PLAIN)], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("feature", "change"), [(WINDOW, {"window": None}), (SOFTCAP, {"softcap": None})])
def test_features_that_are_left_out_are_found_out(kernel: Kernel, feature: str, change: dict[str, None]) -> None:
    """A build that takes a window, or a softcap, and leaves it out, is found out where the model uses it."""

    def forward(q: Any, k: Any, v: Any, segments: Any, scores: Any) -> Any:
        return plain.forward(q, k, v, segments, replace(scores, **change))

    wrong = replace(PLAIN, forward=forward)
    kernel = wrong if kernel.has_lse else attend(wrong)
    assert failure(kernel, HOST, torch.bfloat16, frozenset()) is None
    assert "off by" in str(failure(kernel, HOST, torch.bfloat16, frozenset({feature})))


def test_a_full_device_says_nothing_of_a_kernel() -> None:
    """Out of memory is no reason to take another kernel, which other ranks would not take."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        failure(replace(PLAIN, forward=full), HOST, torch.bfloat16, frozenset())
