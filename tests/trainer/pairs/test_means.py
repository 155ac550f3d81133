"""What is logged of pairs counts each pair alike, and each token, however they came in micro-batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hf_hetero.trainer.pairs.means import PairMeans, RewardMeans, UnpairedMeans


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
            assert means.add("train", part[None]) == 10 * (end - start)
        assert not means.take("eval")
        found.append(means.take("train"))
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


def test_groups_count_once() -> None:
    """Both ranks of a group say the same, of which one is counted; extremes of a group without pairs are nobody's."""
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([3.0, -5.0])
    row, none = RewardMeans.of(chosen, rejected, 40), RewardMeans.of(chosen[:0], rejected[:0], 0)
    means = RewardMeans()
    ranks = [RewardMeans.once(row, True), RewardMeans.once(row, False), RewardMeans.once(none, True)]
    assert means.add("train", torch.stack(ranks)) == 40
    assert means.add("train", torch.stack([none, none, none])) == 0
    assert means.take("train") == pytest.approx(
        {"mean_reward": -0.75, "accuracy": 0.5, "margin": 0.5, "min_reward": -5.0, "max_reward": 3.0}
    )


def test_kinds_of_completions() -> None:
    """Wanted and other completions have means of their own, if there are any; a step's distance counts once."""
    sums = torch.tensor(
        [[-4.0, -6.0, -9.0], [-5.0, -5.0, -5.0], [2.0, 4.0, 6.0], [1.0, 2.0, 3.0], [0.0] * 3, [2, 3, 4]]
    )
    signs, distance, means = torch.tensor([1.0, 1.0, -1.0]), torch.tensor(0.25), UnpairedMeans()
    means.add("train", UnpairedMeans.of(sums, signs, 0.5, distance, 30)[None])
    means.add("train", UnpairedMeans.of(sums[:, :1], signs[:1], 0.5, None, 10)[None])
    assert means.take("train") == pytest.approx(
        {
            "rewards/chosen": 0.5 * (1 - 1 + 1) / 3,
            "rewards/rejected": 0.5 * -4,
            "rewards/margins": 0.5 / 3 + 2,
            "logps/chosen": -14 / 3,
            "logps/rejected": -9.0,
            "logits/chosen": 4 / 7,
            "logits/rejected": 3 / 4,
            "entropy": 14 / 11,
            "kl": 0.25,
        }
    )
    means.add("train", UnpairedMeans.of(sums[:, :1], signs[:1], 0.5, distance, 10)[None])
    assert set(means.take("train")) == {"rewards/chosen", "logps/chosen", "logits/chosen", "entropy", "kl"}
