"""Whether a function takes a call is known from its signature, or its operator's schema, without calling it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from hf_hetero.attention.kernels.signatures import misfit


def function(q: int, *, scale: float = 1.0) -> int:
    raise AssertionError("it is called")


def test_functions() -> None:
    """All that is passed is taken, and all that is asked for is passed; else the argument is named."""
    assert misfit(function, {"q": None}) is None
    assert misfit(function, {"q": None, "scale": None}) is None
    assert "'q'" in str(misfit(function, {"scale": None}))
    assert "'window'" in str(misfit(function, {"q": None, "window": None}))
    assert misfit(lambda **kwargs: None, {"anything": None}) is None


def test_operators() -> None:
    """An operator's schema counts as a function's signature does: defaults, and what is passed by keyword only."""
    operator = SimpleNamespace(_schema=torch._C.parse_schema("a::b(Tensor q, int n=1, *, float? scale=None) -> Tensor"))
    assert misfit(operator, {"q": None}) is None
    assert misfit(operator, {"q": None, "n": None, "scale": None}) is None
    assert "'q'" in str(misfit(operator, {"n": None}))
    assert "'window'" in str(misfit(operator, {"q": None, "window": None}))


def test_what_cannot_be_asked_is_refused() -> None:
    """What is no function, or says nothing of its signature, is left alone."""
    assert "not a callable" in str(misfit(3, {}))
    assert "no signature found" in str(misfit(torch.empty, {}))
