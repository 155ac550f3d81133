"""Pictures are the images of a sample, each by itself, until a rank knows whose features its tokens need.

A model that sees puts the features of an image in the place of tokens that hold no text. These tokens are shared out
among ranks as any others, and an image may be cut. A tower cannot: its patches look at each other. So a rank encodes,
whole, the images that it holds any token of, and keeps the features of these tokens.

Why the gradients are exact. Each rank sends back through the tower the gradient of the features it kept, and each
token is one rank's own. A tower's gradients are sums over features. So summed over the ranks, as data parallelism does,
they are those of the whole image, however many ranks have encoded it. Nothing is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn import functional as F

from hf_hetero.errors import BadSample
from hf_hetero.layout import Span

IMAGE_ROWS = "hetero_image_rows"
"""Among the inputs of a model: which features of the images that a rank encodes its tokens take, int64, in order."""
MASK = "pixel_attention_mask"
"""What of frames, or of patches, does not only fill up."""
PLACES, NO_PLACE = "image_position_ids", -1
"""Where in its image each patch is, and what a patch has that only fills it up."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A `Picture` is an image, or all images of a sample where it is not known which tokens are whose.

    Args:
        inputs: of the tower; those of several pictures are joined along their first dim.
        num_tokens: whose place its features take.
        fills: it may be filled up to the size of another, which its tower leaves out again.
    """

    inputs: Mapping[str, torch.Tensor]
    num_tokens: int
    fills: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """A `Seen` is what of a sample decides which images a rank encodes.

    Args:
        pictures: of the sample, in the order of their tokens.
        is_image: which of its tokens they take the place of; bool, shape (num_tokens,).
    """

    pictures: tuple[Picture, ...]
    is_image: torch.Tensor


def packed_pictures(spans: Sequence[Span], samples: Mapping[int, Seen]) -> dict[str, torch.Tensor]:
    """Make the inputs of the tower on one rank, and `IMAGE_ROWS`; nothing for spans without a token of an image.

    Args:
        spans: of the rank, in memory order.
        samples: of the pack, those that have images.

    Raises:
        BadSample: samples differ in what their images are made of.
    """
    first = dict[tuple[int, int], int]()
    chosen, rows = list[Picture](), list[torch.Tensor]()
    for span in spans:
        if span.sample not in samples:
            continue
        seen = samples[span.sample]
        start, end = int(seen.is_image[: span.start].sum()), int(seen.is_image[: span.end].sum())
        begins = accumulate((picture.num_tokens for picture in seen.pictures), initial=0)
        for number, (picture, begin) in enumerate(zip(seen.pictures, begins, strict=False)):
            low, high = max(start, begin), min(end, begin + picture.num_tokens)
            if low >= high:
                continue
            if (span.sample, number) not in first:  # two spans of a sample may share an image: it is encoded once
                first[span.sample, number] = sum(one.num_tokens for one in chosen)
                chosen.append(picture)
            offset = first[span.sample, number] - begin
            rows.append(torch.arange(low + offset, high + offset))
    return {**joined_inputs(chosen), IMAGE_ROWS: torch.cat(rows)} if chosen else {}


def joined_inputs(pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
    """Join the inputs of several pictures along their first dim; smaller ones are filled up at the end.

    A processor fills up images of other sizes, or with fewer tiles or patches, in the same way, with zeros or with
    patches that have no place, and models leave that out again.

    Raises:
        BadSample: they differ in their names, or in how many dims they have.
    """
    names = {tuple(sorted(picture.inputs)) for picture in pictures}
    if len(names) > 1:
        one, other, *_ = sorted(names)
        raise BadSample(f"Some images have {sorted({*one} ^ {*other})}, others have not. Make them with one processor.")
    if (
        MASK in pictures[0].inputs
        and not pictures[0].fills
        and len(sizes := {picture.inputs[MASK].shape[2:] for picture in pictures}) > 1
    ):
        raise BadSample(
            f"Frames of images are of sizes {sorted(map(tuple, sizes))}, and models take one size at a time. Make them "
            "with one processor that cuts images into frames."
        )
    return {name: _joined(name, [picture.inputs[name] for picture in pictures]) for name in pictures[0].inputs}


def _joined(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join tensors along their first dim, each of the largest size along the others."""
    shapes = [tensor.shape[1:] for tensor in tensors]
    if len({len(shape) for shape in shapes}) > 1:
        raise BadSample(
            f"Images have {name} of shapes {sorted(set(map(tuple, shapes)))}. Make them with one processor."
        )
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    parts: list[torch.Tensor] = []
    for tensor in tensors:
        missing = [most - size for most, size in zip(largest, tensor.shape[1:], strict=True)]
        padding = [number for size in reversed(missing) for number in (0, size)]
        parts.append(F.pad(tensor, padding, value=NO_PLACE if name == PLACES else 0) if any(missing) else tensor)
    return torch.cat(parts)
