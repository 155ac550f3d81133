"""Mixes are the distributions they claim to be, the same for the same seed, and nothing leaves them unseen."""

from __future__ import annotations

import csv
import math
from statistics import NormalDist

import numpy as np
import pytest
from costs.test_cost_model import SHARED

from hf_hetero.errors import BadSample
from hf_hetero.what_if.mixes import MIXES, WEB, Mix, draw_lengths, pareto_above, quantiles

NAMES = ["wiki-192k", "web", "github", "prolong", "long-sft", "reasoning", "dcp-demo"]
REAL = {"wiki-192k": "wikipedia", "github": "github", "prolong": "prolong"}
MANY = 200_000


def test_names() -> None:
    """The names that are documented, each with a text and a limit."""
    assert list(MIXES) == NAMES
    for name, mix in MIXES.items():
        assert mix.name == name
        assert mix.about
        assert mix.limit_tokens >= 8192


@pytest.mark.parametrize("name", NAMES)
def test_seeded(name: str) -> None:
    """The same seed gives the same lengths, a longer draw begins with a shorter one, another seed differs."""
    first, _ = draw_lengths(MIXES[name], 9_000, seed=3)
    assert draw_lengths(MIXES[name], 9_000, seed=3)[0].tolist() == first.tolist()
    assert draw_lengths(MIXES[name], 10, seed=3)[0].tolist() == first[:10].tolist()
    assert draw_lengths(MIXES[name], 9_000, seed=4)[0].tolist() != first.tolist()
    assert (first.dtype, first.size) == (np.int64, 9_000)
    assert first.min() >= 1
    assert first.max() <= MIXES[name].limit_tokens


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared real lengths")
@pytest.mark.parametrize("name", list(REAL))
def test_like_the_real_lengths(name: str) -> None:
    """Percentiles within 17 %, mean within 6 %, and the tokens in samples above 32K within 2 of 100."""
    mix = MIXES[name]
    real = np.loadtxt(SHARED / "data" / "lengths" / f"{REAL[name]}.txt", dtype=np.int64)
    real = real[real <= mix.limit_tokens]
    drawn, _ = draw_lengths(mix, MANY, seed=0)
    shares = [5, 10, 25, 50, 75, 90, 95, 97.5, 99, 99.5, 99.9]
    assert np.percentile(drawn, shares) == pytest.approx(np.percentile(real, shares), rel=0.17)
    assert drawn.mean() == pytest.approx(real.mean(), rel=0.06)
    long_tokens = [lengths[lengths > 32768].sum() / lengths.sum() for lengths in (drawn, real)]
    assert long_tokens[0] == pytest.approx(long_tokens[1], abs=0.02)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared real lengths")
def test_the_comparison_can_fail() -> None:
    """Negative control: no mix has the percentiles of another one's data."""
    real = np.loadtxt(SHARED / "data" / "lengths" / "prolong.txt", dtype=np.int64)
    for other in set(NAMES) - {"prolong"}:
        drawn, _ = draw_lengths(MIXES[other], 20_000, seed=0)
        assert np.percentile(drawn, [25, 75]) != pytest.approx(np.percentile(real, [25, 75]), rel=0.17)


def test_web_has_the_published_bins() -> None:
    """Shares of documents up to 500, 2K, 16K and 64K tokens, as MagiAttention's table has them."""
    drawn, _ = draw_lengths(MIXES["web"], MANY, seed=0)
    for most, share in ((500, 0.4675), (2048, 0.8703), (16384, 0.9871), (65536, 0.9970)):
        assert (drawn <= most).mean() == pytest.approx(share, abs=0.003)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared histogram")
def test_web_is_the_counted_histogram() -> None:
    """The share of documents up to the end of each of its 14 bins is the mix's to 5e-5, drawn or by its table."""
    with (SHARED / "data" / "lengths" / "web_histogram.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = [int(row["range"].strip("[]").split(",")[1]) for row in rows]
    counts = np.array([int(row["number"]) for row in rows])
    shares = counts.cumsum() / counts.sum()
    assert (len(ends), int(counts.sum())) == (14, 13_463_214)
    share_of = {tokens: share for share, tokens in WEB.items()}
    assert [share_of[end] for end in ends] == pytest.approx(shares, abs=5.5e-5)
    drawn, _ = draw_lengths(MIXES["web"], MANY, seed=1)
    assert [(drawn <= end).mean() for end in ends] == pytest.approx(shares, abs=0.003)
    other, _ = draw_lengths(MIXES["github"], MANY, seed=1)
    assert [(other <= end).mean() for end in ends] != pytest.approx(shares, abs=0.05)  # negative control


def test_the_demo_is_log_normal_and_cut_at_both_ends() -> None:
    """Where it is not cut, it is the log-normal of mean 1024 and sigma 1.5; 26 % lie at 128 and 1.7 % at 8192."""
    drawn, _ = draw_lengths(MIXES["dcp-demo"], MANY, seed=0)
    normal = NormalDist(math.log(1024) - 1.5**2 / 2, 1.5)
    assert (drawn == 128).mean() == pytest.approx(normal.cdf(math.log(128)), abs=0.004)
    assert (drawn == 8192).mean() == pytest.approx(1 - normal.cdf(math.log(8192)), abs=0.002)
    for share in (0.4, 0.5, 0.75, 0.95):
        assert np.quantile(drawn, share) == pytest.approx(math.exp(normal.inv_cdf(share)), rel=0.03)
    assert drawn.mean() == pytest.approx(908, rel=0.02)


def test_long_sft_is_bimodal() -> None:
    """One sample in eight has 16K to 63K tokens and the median of the others is exp(5.95); hardly any lies between."""
    drawn, _ = draw_lengths(MIXES["long-sft"], MANY, seed=0)
    assert (drawn > 16384).mean() == pytest.approx(0.12, abs=0.005)
    assert np.median(drawn[drawn < 16384]) == pytest.approx(math.exp(5.95), rel=0.02)
    assert ((drawn > 12000) & (drawn < 16384)).mean() < 0.003


def test_reasoning_is_log_normal_until_it_is_cut_off() -> None:
    """Deciles are those of ln N(ln 5000, 0.8); what would be longer than 32K ends there."""
    drawn, _ = draw_lengths(MIXES["reasoning"], MANY, seed=0)
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(drawn, share) == pytest.approx(5000 * math.exp(0.8 * NormalDist().inv_cdf(share)), rel=0.02)
    cut = 1 - NormalDist().cdf(math.log(32768 / 5000) / 0.8)
    assert (drawn == 32768).mean() == pytest.approx(cut, abs=0.002)


def test_parts_of_mixes() -> None:
    """Quantiles are met where given and log-uniform between; a Pareto tail falls with its exponent."""
    generator = np.random.default_rng(0)
    drawn = quantiles({0.0: 1, 0.5: 100, 1.0: 10_000})(generator, MANY)
    assert np.quantile(drawn, [0.25, 0.5, 0.75]) == pytest.approx([10, 100, 1000], rel=0.05)
    tail = pareto_above(1000, 2.0)(generator, MANY)
    assert tail.min() >= 1000
    assert (tail > 4000).mean() == pytest.approx(1 / 16, rel=0.05)


def test_a_maximum_length_is_counted() -> None:
    """Longer samples are left out, replaced, and counted as often as the mix has them; the order stays."""
    mix = MIXES["wiki-192k"]
    whole, none = draw_lengths(mix, 30_000, seed=1)
    short, dropped = draw_lengths(mix, 20_000, seed=1, max_tokens=1000)
    assert none == 0
    assert short.max() <= 1000
    assert short.tolist() == whole[whole <= 1000][:20_000].tolist()
    assert dropped / (dropped + 20_000) == pytest.approx((whole > 1000).mean(), abs=0.01)


def test_a_maximum_length_below_the_mix() -> None:
    """A limit that leaves next to nothing is an error, not an endless loop."""
    with pytest.raises(BadSample, match="'prolong' has 100 tokens"):
        draw_lengths(MIXES["prolong"], 5, seed=0, max_tokens=100)


def test_own_limit_is_no_drop() -> None:
    """What lies above the mix's own limit was never part of it, so it is not counted."""
    mix = Mix("half", "half of it too long", 100, quantiles({0.0: 1, 0.5: 100, 1.0: 10_000}))
    lengths, dropped = draw_lengths(mix, 1000, seed=0)
    assert (lengths.size, dropped) == (1000, 0)
    assert lengths.max() <= 100
