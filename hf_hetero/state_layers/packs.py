"""A mixer goes over all samples of a pack at once, where it computes by kernels that are told where samples begin.

transformers' mixers call module-level functions that are a package's kernels where it is installed (causal-conv1d,
flash-linear-attention, mamba-ssm), and else their own, which know no borders. What each of them is, and whether it
takes borders, is read from these functions. The first pack of each kind of mixer is computed both ways, and unless
both agree, the kind stays with one sample at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from types import CodeType
from typing import Any

import torch

logger = logging.getLogger(__name__)

ONE_TOKEN = ("_update", "recurrent")
"""In the names of functions that go on from a state, token by token, which training does not do."""
BORDERS = frozenset({"seq_idx", "cu_seqlens"})
"""What kernels call the borders of samples."""
OF_MODELS = "cu_seq_lens_q"
"""What some mixers call `cu_seqlens`."""
CLOSE = 0.05
"""Relative to the largest value: kernels in half precision differ by less, samples that see each other by more."""


class Packs:
    """`Packs` know which kinds of mixers go over a pack at once."""

    def __init__(self) -> None:
        self._proved: dict[type, bool] = {}

    def computed(
        self, kind: type, at_once: Callable[[], torch.Tensor], each: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Compute a pack at once, where that is known to keep samples apart, else each sample by itself.

        Args:
            kind: of the mixer.
            at_once, each: compute it, shape (n, hidden).
        """
        if kind not in self._proved:
            self._proved[kind] = keeps_apart(kind) and _agree(kind, at_once, each)
        return at_once() if self._proved[kind] else each()


def keeps_apart(kind: type) -> bool:
    """Return whether all functions by which a kind of mixer sees other tokens are kernels that take borders."""
    kernels = list(_functions_of(kind))
    return bool(kernels) and all(
        closure["is_new_implementation"] and BORDERS & set(closure["applicable_params"]) for closure in kernels
    )


def _functions_of(kind: Any) -> Iterator[dict[str, Any]]:
    """Yield what the functions of a mixer's module that may be kernels, and that training calls, know of themselves."""
    forward = inspect.unwrap(kind.forward)
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if not inspect.isfunction(function) or any(word in name for word in ONE_TOKEN):
            continue
        closure = dict(inspect.getclosurevars(function).nonlocals)
        if {"is_new_implementation", "applicable_params"} <= closure.keys():
            yield closure


def borders_of(kind: Any, lengths: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the keywords that tell a mixer where samples begin, in each form that a kernel may ask for.

    Args:
        kind: of the mixer.
        lengths: tokens of each sample.
        device: where they go.

    Returns:
        The number of each token's sample, int32, shape (1, n); where samples begin, and the last ends, int32.
    """
    counts = torch.tensor(lengths)
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts).unsqueeze(0)
    starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    code: CodeType = inspect.unwrap(kind.forward).__code__
    name = OF_MODELS if OF_MODELS in code.co_consts else "cu_seqlens"
    return {"seq_idx": numbers.to(device), name: starts.to(device)}


def _agree(kind: type, at_once: Callable[[], torch.Tensor], each: Callable[[], torch.Tensor]) -> bool:
    """Return whether a pack is computed the same both ways, and say so where it is not."""
    with torch.no_grad():
        expected = each()
        try:
            found = at_once()
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("%s goes over samples one by one: its kernels refuse a pack (%s).", kind.__name__, error)
            return False
        largest = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    # "not <=", so that nan does not pass
    if not largest <= CLOSE:
        logger.warning(
            "%s goes over samples one by one: at once, its kernels give what differs by %.0f %% of the largest value.",
            kind.__name__,
            100 * largest,
        )
        return False
    return True
