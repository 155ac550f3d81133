"""A hook has a model encode the images of its tokens, and gives it the features that these take, and no others.

It stands before the part of the model that merges features into text, and so within whatever wraps the model: FSDP2 has
gathered its weights, and autocast is on. That part takes features that are ready (`mm_encoder_outputs`), and does with
them what it does with its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from hf_hetero.images.pictures import IMAGE_ROWS

READY = "mm_encoder_outputs"
"""The keyword under which models of transformers take the features of images."""
TOWERS: Mapping[str, str] = MappingProxyType({"llama4": "vision_model"})
"""Type of a model whose projector comes after what it takes ready -> its tower."""
CASTING = ("got_ocr2",)
"""Types whose models change the type of pixels before they encode them, not as they do."""
DEEP = "deepstack_features"
"""Features that are added to later layers, as in Qwen3-VL (arXiv:2406.04334): one for each of these layers."""


def merging_part(model: Any) -> torch.nn.Module | None:
    """Return the part of a model that merges features into text; None where there is none, or it takes none ready."""
    for part in model.modules():
        sees = part is not model and hasattr(part, "get_image_features")
        if sees and READY in inspect.signature(type(part).forward).parameters:
            return part
    return None


def cut_late(model: Any) -> torch.nn.Module | None:
    """Return the tower whose own features a model takes ready, before they are projected; None for other models."""
    name = TOWERS.get(getattr(model.config, "model_type", ""))
    return None if name is None else model.get_submodule(name)


class FeaturesOfSpans:
    """`FeaturesOfSpans` gives a model the features of its own tokens. Without `IMAGE_ROWS` it does nothing.

    Args:
        model: of transformers.
        outermost: what is called in a step: the model, or adapters around it. None: the model.
    """

    def __init__(self, model: torch.nn.Module, outermost: torch.nn.Module | None = None) -> None:
        self._handles: list[RemovableHandle] = []
        hook: Any = _encode  # torch's types do not see that a decorated function is still one
        if (part := merging_part(model)) is not None:
            self._handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
        elif (tower := cut_late(model)) is not None:
            cut: Any = _CutLate()
            self._handles += [
                (outermost or model).register_forward_pre_hook(cut.enter, with_kwargs=True),
                tower.register_forward_hook(cut.leave_out),
            ]

    def remove(self) -> None:
        """Leave the model as it was."""
        while self._handles:
            self._handles.pop().remove()


class _CutLate:
    """It keeps which features a call of the model takes until its tower has made them all."""

    def __init__(self) -> None:
        self._rows: torch.Tensor | None = None

    @torch.compiler.disable
    def enter(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._rows = kwargs.get(IMAGE_ROWS)
        if self._rows is not None and not len(self._rows):
            kwargs = _typed(kwargs, model)
        return args, {name: values for name, values in kwargs.items() if name != IMAGE_ROWS}

    @torch.compiler.disable
    def leave_out(self, tower: torch.nn.Module, args: Any, output: Any) -> None:
        if self._rows is not None:
            output.last_hidden_state = _of_rows(output.last_hidden_state, self._rows)


@torch.compiler.disable
def _encode(part: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Encode the images among a call's inputs, in one call of the tower; put the features of tokens in their place."""
    if (rows := kwargs.get(IMAGE_ROWS)) is None:
        return None
    accepted = inspect.signature(part.get_image_features).parameters
    images = {
        name: values
        for name, values in kwargs.items()
        if name in accepted and values is not None and isinstance(values, torch.Tensor)
    }
    if not len(rows) or part.config.model_type in CASTING:
        images = _typed(images, part)
    encoded = part.get_image_features(**images, return_dict=True)
    encoded.pooler_output = _of_rows(encoded.pooler_output, rows)
    if (deep := getattr(encoded, DEEP, None)) is not None:
        setattr(encoded, DEEP, [_of_rows(features, rows) for features in deep])
    others = {name: values for name, values in kwargs.items() if name not in images and name != IMAGE_ROWS}
    return args, {**others, READY: {"image": encoded}}


def _typed(inputs: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """Return inputs with fractions in the type of a model's first weight, as where a model itself sees to it.

    Images that stand in have the type of no row, and some towers take none but their own.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }


def _of_rows(features: torch.Tensor | Sequence[torch.Tensor], rows: torch.Tensor) -> Any:
    """Return some rows of the features of all images, in the form that they came in.

    Args:
        features: of each image, shape (num_tokens, hidden), or of all, (num_images, num_tokens, hidden).
        rows: which; of an image that stands in, none, so that its gradient is zero.
    """
    if isinstance(features, torch.Tensor):
        kept = features.reshape(-1, features.shape[-1])[rows]
        return kept.unsqueeze(0) if features.ndim == 3 else kept
    return (torch.cat(list(features))[rows],)
