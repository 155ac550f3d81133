"""A mixer goes over all samples of a pack at once, where what it computes by keeps them apart.

transformers' mixers call module-level functions that are a package's kernels where it is installed (causal-conv1d,
flash-linear-attention, mamba-ssm), and else their own, which know no borders. What each of them is, and whether it
takes borders, is read from these functions. A convolution needs none: it sees a few tokens back, so as many rows of
zeros after each sample are to the next one what lies before a sample that is alone. The first pack of each kind of
mixer is computed both ways, and unless both agree, the kind stays with one sample at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
"""What some mixers call `cu_seqlens`, and hand on to no other function."""
CONVOLUTION = "causal_conv1d_fn"
"""The function that is a causal convolution, of the package or transformers' own."""
CLOSE = 0.05
"""Relative to the largest value: kernels in half precision differ by less, samples that see each other by more."""


class Packs:
    """`Packs` know which kinds of mixers go over a pack at once."""

    def __init__(self) -> None:
        self._gaps: dict[type, int | None] = {}

    def computed(
        self,
        mixer: torch.nn.Module,
        kind: type,
        at_once: Callable[[int], torch.Tensor],
        each: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Compute a pack at once, where that is known to keep samples apart, else each sample by itself.

        Args:
            mixer: that computes it.
            kind: of the mixer, as the model has it.
            at_once: computes it with a gap of so many rows after each sample, shape (n, hidden) without gaps.
            each: computes it sample by sample, shape (n, hidden).
        """
        if kind not in self._gaps:
            gap = gap_of(mixer, kind)
            self._gaps[kind] = gap if gap is not None and _agree(kind, partial(at_once, gap), each) else None
        gap = self._gaps[kind]
        return each() if gap is None else at_once(gap)


def gap_of(mixer: torch.nn.Module, kind: type) -> int | None:
    """Return the rows of zeros after each sample that keep the samples of a pack apart.

    Args:
        mixer: one of the kind.
        kind: of the mixer, as the model has it.

    Returns:
        0 where all functions by which the mixer sees other tokens are kernels that take borders. Where one is
        transformers' own convolution, as many rows as that sees back. None where nothing keeps samples apart.
    """
    functions = dict(_functions_of(kind))
    untold = {name for name, closure in functions.items() if not _takes_borders(closure)}
    if not functions or untold - {CONVOLUTION}:
        return None
    if not untold:
        return 0
    # this function refuses borders, so the others must have theirs under another name
    if functions.keys() != untold and not _has_name_of_models(kind):
        return None
    convolutions = [module for module in mixer.modules() if isinstance(module, torch.nn.Conv1d)]
    others = [module for module in mixer.modules() if not isinstance(module, torch.nn.Conv1d)]
    # rows of zeros stay zeros up to the convolution only where nothing is added to them
    if not convolutions or any(isinstance(getattr(module, "bias", None), torch.Tensor) for module in others):
        return None
    return max(convolution.kernel_size[0] for convolution in convolutions) - 1


def spread_of(lengths: Sequence[int], gap: int, device: torch.device) -> torch.Tensor:
    """Return where each row lies once there is a gap after each sample, shape (n,).

    Args:
        lengths: tokens of each sample.
        gap: rows.
        device: where it goes.
    """
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (torch.arange(sum(lengths)) + gap * numbers).to(device)


def _takes_borders(closure: dict[str, Any]) -> bool:
    return closure["is_new_implementation"] and bool(BORDERS & set(closure["applicable_params"]))


def _has_name_of_models(kind: Any) -> bool:
    code: CodeType = inspect.unwrap(kind.forward).__code__
    return OF_MODELS in code.co_consts


def _functions_of(kind: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the functions of a mixer's module that may be kernels, and that training calls, by name.

    With what each knows of itself.
    """
    forward = inspect.unwrap(kind.forward)
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if not inspect.isfunction(function) or any(word in name for word in ONE_TOKEN):
            continue
        closure = dict(inspect.getclosurevars(function).nonlocals)
        if {"is_new_implementation", "applicable_params"} <= closure.keys():
            yield name, closure


def borders_of(kind: Any, lengths: Sequence[int], gap: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the keywords that tell a mixer where samples begin, in each form that a kernel may ask for.

    Args:
        kind: of the mixer.
        lengths: rows of each sample, with the gap after it.
        gap: rows; where there is one, a function that refuses borders is called, which must not be told.
        device: where they go.

    Returns:
        The number of each row's sample, int32, shape (1, n); where samples begin, and the last ends, int32.
    """
    counts = torch.tensor(lengths)
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(counts).unsqueeze(0)
    starts = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    if gap:
        return {OF_MODELS: starts.to(device)} if _has_name_of_models(kind) else {}
    name = OF_MODELS if _has_name_of_models(kind) else "cu_seqlens"
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
