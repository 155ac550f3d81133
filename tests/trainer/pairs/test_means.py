"""What is logged of pairs counts each pair alike, and each token, however they came in micro-batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hf_hetero.trainer.pairs.means import PairMeans


def drawn(num_pairs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of chosen and rejected completions: the sixth is their targets, the seventh their tokens."""
    torch.manual_seed(seed)
    sums = torch.randn(2, 7, num_pairs, dtype=torch.float64)
    sums[:, 5:] = torch.randint(1, 9, (2, 1, num_pairs)).double()
    return sums[0], sums[1]


def test_micro_batches_make_no_difference() -> None:
    """Five pairs at once, or one and four, or some none: the same means, which are those of the definition."""
    chosen, rejected = drawn(5, 0)
    found: list[dict[str, float]] = []
    for cuts in ((0, 5), (0, 1, 5), (0, 0, 3, 3, 5)):
        means = PairMeans()
        for start, end in pairwise(cuts):
            part = PairMeans.of(chosen[:, start:end], rejected[:, start:end], 0.5, 10 * (end - start))
            assert means.add("train", part.tolist()) == 10 * (end - start)
        assert not means.take("eval")
        found.append(dict(means.take("train")))
        assert not means.take("train")
    for one in found:
        assert one == pytest.approx(found[0], rel=1e-12)
    margin = 0.5 * ((chosen[0] - chosen[1]) - (rejected[0] - rejected[1]))
    assert found[0]["rewards/margins"] == pytest.approx(margin.mean().item())
    assert found[0]["rewards/accuracies"] == pytest.approx((margin > 0).double().mean().item())
    assert found[0]["entropy"] == pytest.approx(
        ((chosen[2].sum() + rejected[2].sum()) / (chosen[5].sum() + rejected[5].sum())).item()
    )
    assert found[0]["logits/rejected"] == pytest.approx((rejected[3].sum() / rejected[5].sum()).item())
