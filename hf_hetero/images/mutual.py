"""In some models tokens of an image, or of all that is asked, look at each other, before and after; others look back.

Which ones do stands in the row, in what its processor says of each token. Attention is told of them as stretches of a
sample (`layout.Mutual`). Where Gemma's rows do not say it, a plain Trainer's model looks back only, and so it does
under a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_hetero.errors import BadSample
from hf_hetero.model.wrapped import text_part

PREFIX = frozenset({"paligemma"})
"""Types whose tokens of all that is asked look at each other."""


@dataclass(frozen=True, slots=True)
class MutualTokens:
    """`MutualTokens` say which tokens of a sample look at each other.

    Args:
        name: of the input that says of each token what it is.
        kinds: what it says of those that do.
        other: what it says of those that do not.
        in_windows: they do so only in layers with a sliding window; else in all layers.
        is_prefix: all that do are one stretch, and each row says which; else each run of them is one, and rows that do
            not say it have none.
        longest: tokens of the longest stretch; None: any. In models whose window leaves out nothing of a stretch, one
            that is longer than the window would see more than attention here shows it.
    """

    name: str
    kinds: frozenset[int]
    other: int
    in_windows: bool = False
    is_prefix: bool = False
    longest: int | None = None

    def marks(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what is read in the place of what a row does not say: no token looks ahead."""
        return {} if self.is_prefix else {self.name: torch.full_like(input_ids, self.other)}

    def stretches(self, inputs: Mapping[str, torch.Tensor], name: str) -> tuple[tuple[int, int], ...]:
        """Return the stretches of a sample: the first token of each, and its end. Those of one token are left out.

        Args:
            inputs: of each token, shape (num_tokens,).
            name: of the row, for messages.

        Raises:
            BadSample: a prefix that the row does not say, or that is in several places, or longer than a window.
        """
        if (kinds := inputs.get(self.name)) is None:
            if self.is_prefix:
                raise BadSample(
                    f"{name} has no {self.name}, which says where the answer begins. Keep what the processor returns "
                    "under that name (suffix=...)."
                )
            return ()
        is_mutual = torch.isin(kinds, torch.tensor(sorted(self.kinds)))
        edges: list[int] = F.pad(is_mutual.int(), (1, 1)).diff().nonzero().flatten().tolist()
        found = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end - start > 1]
        if self.is_prefix and len(edges) > 2:
            raise BadSample(
                f"{name}: {self.name} has {sorted(self.kinds)} in {len(edges) // 2} places, which all look at each "
                "other, over what stands between them. Give it one such place, at its beginning: do not pack rows."
            )
        if self.longest is not None and found and (tokens := max(end - start for start, end in found)) > self.longest:
            raise BadSample(
                f"{name}: {tokens} tokens look at each other, more than the model's window of {self.longest}. Leave "
                "the row out, or train with plain Trainer."
            )
        return tuple(found)


class CausalLayers:
    """`CausalLayers` has layers of text say that they look back only, where their model's masks have it so.

    PaliGemma's say that they do not, and its masks are causal but for the prefix of a row, which attention is told of.

    Args:
        model: of transformers; others than such are left as they are.
    """

    def __init__(self, model: Any) -> None:
        layers: Any = text_part(model).modules() if model.config.model_type in PREFIX else ()
        self._layers = [layer for layer in layers if getattr(layer, "is_causal", True) is False]
        for layer in self._layers:
            layer.is_causal = True

    def remove(self) -> None:
        """Leave the model as it was."""
        while self._layers:
            self._layers.pop().is_causal = False
