"""Mixes are named synthetic lengths to plan with where no data is at hand. The same seed gives the same lengths.

Each is a distribution of the tokens of a sample, drawn by inverse transform or as a mixture. What it follows, and how
closely, stands in its `about`; `tests/what_if/test_mixes.py` compares it with the real lengths where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from hf_hetero.errors import BadSample

Lengths = NDArray[np.int64]
Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]

DRAWN_AT_ONCE = 4096
LEAST_KEPT = 1e-3  # share of the samples that a limit must leave


@dataclass(frozen=True, slots=True)
class Mix:
    """A `Mix` is a distribution of lengths.

    Args:
        name: what a user types.
        about: what it is like, for people, in a few words.
        limit_tokens: no sample is longer.
        draw: generator, count -> lengths before rounding; longer ones than the limit are left out afterwards.
    """

    name: str
    about: str
    limit_tokens: int
    draw: Draw


def draw_lengths(mix: Mix, num_samples: int, seed: int, max_tokens: int | None = None) -> tuple[Lengths, int]:
    """Draw this many lengths, int64; say how many more were left out because they were above `max_tokens`.

    Samples above the mix's own limit do not belong to it and are not counted.

    Raises:
        BadSample: nearly every sample of the mix is above `max_tokens`.
    """
    generator = np.random.default_rng(seed)
    limit = min(mix.limit_tokens, max_tokens or mix.limit_tokens)
    fitting: list[Lengths] = []
    num_fitting = num_drawn = 0
    while num_fitting < num_samples:
        # always so many at once, so that the first lengths of a seed do not depend on how many are asked for
        drawn = np.maximum(np.rint(mix.draw(generator, DRAWN_AT_ONCE)), 1).astype(np.int64)
        drawn = drawn[drawn <= mix.limit_tokens]
        places = np.flatnonzero(drawn <= limit)[: num_samples - num_fitting]
        # those drawn after the last one that is needed were never part of it
        last = places[-1] + 1 if num_fitting + places.size == num_samples else drawn.size
        fitting.append(drawn[places])
        num_fitting, num_drawn = num_fitting + places.size, num_drawn + int(last)
        if num_fitting < LEAST_KEPT * num_drawn:
            raise BadSample(f"Hardly any sample of the mix {mix.name!r} has {limit} tokens or fewer. Raise the limit.")
    return np.concatenate([*fitting, np.zeros(0, dtype=np.int64)]), num_drawn - num_fitting


def quantiles(points: Mapping[float, float]) -> Draw:
    """Draw by a table, share of samples -> tokens that they have at most; log-uniform in between."""
    shares, tokens = list(points), np.log(list(points.values()))
    return lambda generator, count: np.exp(np.interp(generator.random(count), shares, tokens))


def log_normal(median: float, sigma: float) -> Draw:
    """Draw tokens whose logarithm is normal."""
    return lambda generator, count: generator.lognormal(math.log(median), sigma, count)


def pareto_above(least: float, alpha: float) -> Draw:
    """Draw from a tail: above `least`, the share of samples longer than s falls as s^-alpha."""
    return lambda generator, count: least * (1 - generator.random(count)) ** (-1 / alpha)


def uniform(least: float, most: float) -> Draw:
    """Draw every length in between as often."""
    return lambda generator, count: generator.uniform(least, most, count)


def mixture(rare_share: float, rare: Draw, common: Draw) -> Draw:
    """Draw a share of the samples from one distribution, and the others from another."""

    def draw(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        is_rare = generator.random(count) < rare_share
        return np.where(is_rare, rare(generator, count), common(generator, count))

    return draw


def cut_off(most: float, draw: Draw, least: float = 0.0) -> Draw:
    """Cut longer samples off at `most`, and lengthen shorter ones to `least`; at both they pile up."""
    return lambda generator, count: np.clip(draw(generator, count), least, most)


def at_most(most: float, draw: Draw) -> Draw:
    """Draw longer samples again, so that the distribution stays the same below `most`."""

    def redrawn(generator: np.random.Generator, count: int) -> NDArray[np.float64]:
        drawn = draw(generator, count)
        while (too_long := np.flatnonzero(drawn > most)).size:
            drawn[too_long] = draw(generator, too_long.size)
        return drawn

    return redrawn


# 1,000,000 articles tokenised by FlexSP (arXiv:2412.01523, `wikipedia.txt` of its repository): measured percentiles
WIKI = {
    **{0.0: 1, 0.01: 39, 0.05: 67, 0.1: 87, 0.2: 122, 0.25: 146, 0.3: 171, 0.4: 243, 0.5: 347, 0.6: 472, 0.7: 685},
    **{0.75: 862, 0.8: 1092, 0.85: 1464, 0.9: 2112, 0.925: 2705, 0.95: 3720, 0.975: 6111, 0.98: 7087, 0.99: 10919},
    **{0.995: 15986, 0.999: 37353, 0.9999: 101537, 0.99999: 230941, 1.0: 1823777},
}
# 13,463,214 documents, counted in 14 bins by MagiAttention (`doc_length_distribution.csv` of its repository): the
# shares up to each bin's end, 5e-5 from the counts at most. That lengths are log-uniform within a bin is assumed, and
# no document above the last bin is known.
WEB = {
    **{0.0: 1, 0.0022: 10, 0.0313: 50, 0.0833: 100, 0.1856: 200, 0.4675: 500, 0.7138: 1024, 0.8703: 2048},
    **{0.9437: 4096, 0.9742: 8192, 0.9871: 16384, 0.9956: 32768, 0.9970: 65536, 0.9986: 131072, 1.0: 196608},
}
# 77,932 documents of ProLong's mix, as DistCA's repository has them: measured percentiles
PROLONG = {
    **{0.0: 578, 0.05: 801, 0.25: 1237, 0.5: 1913, 0.75: 3467, 0.9: 6051, 0.95: 8378, 0.99: 16269, 0.995: 21357},
    **{0.999: 47397, 0.9994: 65536, 1.0: 340149},
}

_ALL = (
    Mix("wiki-192k", "Wikipedia articles, at most 192K: short, with a long tail", 192 * 1024, quantiles(WIKI)),
    Mix(
        "web",
        "MagiAttention's 13 million documents, at most 192K: half a percent hold a quarter of the tokens",
        192 * 1024,
        quantiles(WEB),
    ),
    # Only totals are published (ByteScale, arXiv:2502.21231: 16 % of the tokens are in files of 128K to 2M).
    # Fitted to 18,560 files of about 40 public repositories, bytes / 3.6: body to 32K, tail exponent above it.
    Mix(
        "github",
        "source files, at most 192K: the heaviest tail",
        192 * 1024,
        mixture(0.0076, pareto_above(32768, 1.386), at_most(32768, log_normal(1060, 1.41))),
    ),
    Mix("prolong", "ProLong's long-context mix, at most 192K: few short samples", 192 * 1024, quantiles(PROLONG)),
    # 88 % like Wikipedia, 12 % long documents: FlexSP's released heuristics lose to one degree on it
    Mix(
        "long-sft",
        "chats beside documents of 16K to 63K, one in eight",
        63 * 1024,
        mixture(0.12, uniform(16 * 1024, 63 * 1024), log_normal(math.exp(5.95), 1.26)),
    ),
    # assumed: about 6K on average, cut off where generation was
    Mix(
        "reasoning", "reasoning traces, cut off at 32K: few short samples", 32768, cut_off(32768, log_normal(5000, 0.8))
    ),
    # what Megatron-LM's `examples/dynamic_context_parallel/benchmark_dcp.sh` draws: a log-normal of mean 1024 and sigma
    # 1.5 before it is cut at both ends; what is cut lowers the mean to 908
    Mix(
        "dcp-demo",
        "NVIDIA's demo of dynamic context parallelism: log-normal, 128 to 8192",
        8192,
        cut_off(8192, log_normal(1024 * math.exp(-(1.5**2) / 2), 1.5), least=128),
    ),
)
MIXES: Mapping[str, Mix] = MappingProxyType({mix.name: mix for mix in _ALL})
