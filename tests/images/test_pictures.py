"""A rank encodes the images that it holds any token of, each once, and keeps the features of its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from hf_hetero.errors import BadSample
from hf_hetero.images.pictures import IMAGE_ROWS, Picture, Seen, joined_inputs, packed_pictures
from hf_hetero.layout import Layout, Span, contiguous, two_level, zigzag

LAYOUTS: dict[str, Callable[[list[int], int], Layout]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "two levels": lambda lengths, degree: two_level(lengths, degree, degree // 2),
}
NUM_TOKENS = {0: [3, 7], 2: [1], 3: [12]}
"""Of each image of each sample; sample 1 has none."""
LENGTHS = [17, 9, 4, 15]


def seen_of(num_tokens: Sequence[int], length: int, generator: torch.Generator) -> Seen:
    """Images that stand one after the other from the third token on, each with a token of text after it."""
    is_image, at = torch.zeros(length, dtype=torch.bool), 2
    for num in num_tokens:
        is_image[at : at + num] = True
        at += num + 1
    pictures = [Picture({"x": torch.randn(1, 5, generator=generator, dtype=torch.float64)}, n) for n in num_tokens]
    return Seen(tuple(pictures), is_image)


def samples() -> dict[int, Seen]:
    generator = torch.Generator().manual_seed(0)
    return {sample: seen_of(nums, LENGTHS[sample], generator) for sample, nums in NUM_TOKENS.items()}


class Tower(torch.nn.Module):
    """Makes as many features of an image as it has tokens, all of which hang on all of the image and of the weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(5, 16, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor, num_tokens: Sequence[int]) -> torch.Tensor:
        return torch.cat([(row @ self.weight).tanh()[:num] for row, num in zip(x, num_tokens, strict=True)])


def whole_gradient(samples: dict[int, Seen], upstream: dict[int, torch.Tensor]) -> torch.Tensor:
    """Of the tower, where each image is encoded once, by nobody but itself."""
    tower = Tower()
    for sample, seen in samples.items():
        features = tower(torch.cat([p.inputs["x"] for p in seen.pictures]), [p.num_tokens for p in seen.pictures])
        (features * upstream[sample]).sum().backward()
    assert tower.weight.grad is not None
    return tower.weight.grad


def gradient_of_ranks(
    layout: Layout, samples: dict[int, Seen], upstream: dict[int, torch.Tensor], keeps_all: bool = False
) -> torch.Tensor:
    """The sum over ranks, each of which sends back the gradient of its own tokens; or of all it has encoded."""
    total = torch.zeros(5, 16, dtype=torch.float64)
    for spans in layout.spans:
        inputs = packed_pictures(spans, samples)
        if not inputs:
            continue
        tower, order = Tower(), {id_of(p): (s, n) for s, seen in samples.items() for n, p in enumerate(seen.pictures)}
        encoded = [order[float(row[0])] for row in inputs["x"]]
        assert len(set(encoded)) == len(encoded)
        features = tower(inputs["x"], [NUM_TOKENS[s][n] for s, n in encoded])
        if keeps_all:
            gradients = torch.cat([of_picture(samples, upstream, s, n) for s, n in encoded])
            (features * gradients).sum().backward()
        else:
            gradients = torch.cat([upstream_of(span, samples, upstream) for span in spans])
            assert len(gradients) == len(inputs[IMAGE_ROWS])
            (features[inputs[IMAGE_ROWS]] * gradients).sum().backward()
        assert tower.weight.grad is not None
        total += tower.weight.grad
    return total


def id_of(picture: Picture) -> float:
    return float(picture.inputs["x"][0, 0])


def of_picture(samples: dict[int, Seen], upstream: dict[int, torch.Tensor], sample: int, n: int) -> torch.Tensor:
    start = sum(p.num_tokens for p in samples[sample].pictures[:n])
    return upstream[sample][start : start + samples[sample].pictures[n].num_tokens]


def upstream_of(span: Span, samples: dict[int, Seen], upstream: dict[int, torch.Tensor]) -> torch.Tensor:
    """Gradients of a span's tokens of images, by the numbers of those in the sample."""
    if span.sample not in samples:
        return torch.zeros(0, dtype=torch.float64)
    is_image = samples[span.sample].is_image
    numbers = (is_image.cumsum(0) - 1)[span.start : span.end][is_image[span.start : span.end]]
    return upstream[span.sample][numbers]


def upstreams() -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {sample: torch.randn(sum(n), generator=generator, dtype=torch.float64) for sample, n in NUM_TOKENS.items()}


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tower_counts_once(name: str, degree: int) -> None:
    """Whatever ranks hold which tokens, its gradients add up to those of each image encoded once."""
    if name == "two levels" and degree == 1:
        pytest.skip("blocks of half a rank")
    layout, upstream = LAYOUTS[name](LENGTHS, degree), upstreams()
    found, expected = gradient_of_ranks(layout, samples(), upstream), whole_gradient(samples(), upstream)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-14


def test_a_tower_counted_on_each_rank_would_be_seen() -> None:
    """Where each rank sends back the gradient of all features that it has encoded, cut images count twice."""
    upstream = upstreams()
    found = gradient_of_ranks(contiguous(LENGTHS, 4), samples(), upstream, keeps_all=True)
    expected = whole_gradient(samples(), upstream)
    assert float((found - expected).abs().max() / expected.abs().max()) > 1e-2


def test_a_rank_encodes_only_what_it_needs() -> None:
    """Spans of text need no tower; a span within one image needs that image alone."""
    assert packed_pictures([Span(0, 0, 2), Span(1, 0, 9)], samples()) == {}
    inputs = packed_pictures([Span(0, 7, 9), Span(0, 11, 12)], samples())  # two spans in the second image
    assert torch.equal(inputs["x"], samples()[0].pictures[1].inputs["x"])
    assert inputs[IMAGE_ROWS].tolist() == [1, 2, 5]


def test_smaller_images_are_filled_up() -> None:
    """With zeros, at the end of each dim, as processors do; other kinds of images in one pack are refused."""
    small, large = torch.ones(1, 2, 3), torch.ones(2, 4, 2)
    joined = joined_inputs([Picture({"x": small}, 1), Picture({"x": large}, 1)])["x"]
    assert joined.shape == (3, 4, 3)
    assert joined[0].sum() == 6
    assert torch.equal(joined[1:, :, :2], large)
    with pytest.raises(BadSample, match=r"of shapes \[\(2,\), \(2, 3\)\]"):
        joined_inputs([Picture({"x": small}, 1), Picture({"x": torch.ones(1, 2)}, 1)])
    with pytest.raises(BadSample, match=r"Some images have \['y'\], others have not"):
        joined_inputs([Picture({"x": small}, 1), Picture({"x": small, "y": small}, 1)])
