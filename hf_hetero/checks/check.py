"""This checks whether a model can be trained under changing plans, by its config and a tiny instance of its kind."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_hetero.attention.kernels import choice
from hf_hetero.checks import exactness
from hf_hetero.checks.outline import config_of, one_line, outline_of
from hf_hetero.checks.probe import Probe, tried
from hf_hetero.checks.tiny import architecture_of, build
from hf_hetero.collators.limits import limits_of
from hf_hetero.errors import ConfigError, HeteroError
from hf_hetero.estimate.memory import tokens_by_lever
from hf_hetero.estimate.model_shape import shape_of
from hf_hetero.heads import share_heads
from hf_hetero.model.by_layer import fewest
from hf_hetero.topology import Topology

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "flash-attn", "mip", "highsbox")

MOST_BYTES = 2**30 * 1e6


@dataclass(frozen=True, slots=True)
class Check:
    """A `Check` is everything that `hf-hetero check` says.

    Args:
        name: as it was given.
        model_type: of its config.
        tested: whether its type is compared with plain training in this package's tests.
        versions: of the packages that matter; "not installed" where absent.
        kernel: on a GPU in bf16, by name; or why there is none.
        num_heads, num_kv_heads: of attention; 0 without.
        methods: degree -> method -> how its heads fit, in words.
        longest: tokens of the longest sample that it can be trained on; None: any.
        tokens_a_rank: what a rank holds of it, by the ways to save memory (`memory.LEVERS`), by estimate.
        reasons: why the model is refused; empty if it is not.
        probe: the trial of a tiny instance.
    """

    name: str
    model_type: str
    tested: bool
    versions: dict[str, str]
    kernel: str
    num_heads: int
    num_kv_heads: int
    methods: dict[int, dict[str, str]]
    longest: int | None
    tokens_a_rank: dict[str, int]
    reasons: tuple[str, ...]
    probe: Probe

    @property
    def ok(self) -> bool:
        """Return whether the model can be trained."""
        return not self.reasons and self.probe.ok

    @property
    def verdict(self) -> str:
        """Say "can be trained", up to some length or by whole samples, "refused because ..." or "not tested: ..."."""
        if self.reasons:
            return f"refused because {' and because '.join(reason.rstrip('.') for reason in self.reasons)}"
        if self.probe.failure:
            return f"not tested: {self.probe.failure}"
        how = "" if self.longest is None else f" on samples of up to {self.longest} tokens"
        if why := self.probe.manner.whole:
            how += f", by whole samples, which ranks do not share, because {why.rstrip('.')}"
        return f"can be trained{how}"

    def to_dict(self) -> dict[str, Any]:
        """Return a form that is ready for JSON."""
        return {"format": "hf-hetero-check/1", "ok": self.ok, "verdict": self.verdict, **asdict(self)}


def check(name: str, max_degree: int = 64, num_ranks: int = 8, card_bytes: float = 80e9) -> Check:
    """Check a model by its name on the hub, its folder, or its config file.

    Args:
        name: of the model.
        max_degree: largest degree to look at.
        num_ranks, card_bytes: of the run whose memory is estimated.

    Raises:
        ConfigError: there is no such config, or it is not one that transformers knows; or `max_degree` is below 1.
    """
    Topology(num_ranks)  # made because it refuses what is no number of ranks
    if not 0 < card_bytes <= MOST_BYTES:
        raise ConfigError(f"A card's memory of {card_bytes / 2**30:g} GiB: it must be above 0, and at most a million.")
    if max_degree < 1:
        raise ConfigError(f"The largest degree to look at is {max_degree}: it must be at least 1.")
    config = config_of(name)
    text: Any = config.get_text_config(decoder=True)
    num_heads = fewest(text, "num_attention_heads", 0)
    num_kv_heads = fewest(text, "num_key_value_heads", num_heads)
    try:
        kernel = choice.choose_kernel("cuda", torch.bfloat16, choice.features_of(text)).name
    except HeteroError as error:
        kernel = str(error)
    reasons, trial = _try(config)
    outline = outline_of(config)
    return Check(
        name=name,
        model_type=config.model_type,
        tested=config.model_type in exactness.TESTED_MODEL_TYPES,
        versions={package: _version(package) for package in PACKAGES},
        kernel=kernel,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        methods={d: fits(d, num_heads, num_kv_heads) for d in _degrees(max_degree)},
        longest=_longest(outline),
        tokens_a_rank=_tokens_a_rank(outline, text, num_ranks, card_bytes),
        reasons=reasons,
        probe=trial,
    )


def _longest(model: Any) -> int | None:
    """Return the tokens of the longest sample that a model can be trained on; None: any, or it is refused anyway."""
    try:
        return limits_of(model).longest
    except Exception:  # what has no embeddings of tokens is refused
        return None


def _tokens_a_rank(model: Any, text: Any, num_ranks: int, card_bytes: float) -> dict[str, int]:
    """Estimate what a rank holds, computing in bf16 with weights in fp32; nothing for what has no attention."""
    try:
        shape = shape_of(model, text, element_bytes=2, checkpointing=False)
    except Exception:  # said by the probe
        return {}
    return tokens_by_lever(replace(shape, param_bytes=4 * shape.num_params), num_ranks, card_bytes)


def fits(degree: int, num_heads: int, num_kv_heads: int) -> dict[str, str]:
    """Say how the heads of a model fit a degree, by method; nothing where there is nothing to share."""
    if degree == 1 or not num_heads:
        return {}
    blocks = [b for b in _degrees(degree // 2) if b > 1 and degree % b == 0]
    even = [str(b) for b in blocks if b <= num_heads and num_heads % b == 0]
    in_blocks = f"blocks of {', '.join(even)}" if even else "uneven blocks" if blocks else "needs 4 ranks or more"
    return {
        "ulysses": _ulysses(degree, num_heads, num_kv_heads),
        "gather": "any heads",
        "ring": "any heads",
        "ulysses_ring": in_blocks,
        "token_ring": "any heads" if num_heads == num_kv_heads else "any heads; a ring sends less",
    }


def _ulysses(degree: int, num_heads: int, num_kv_heads: int) -> str:
    """Say how heads fit a degree where ranks share them. All of it is exact; what is uneven costs time."""
    if degree > num_heads:
        return f"{degree - num_heads} of {degree} ranks idle: {num_heads} heads"
    if num_heads % degree:
        return f"uneven: {-(-num_heads // degree)} heads on some ranks, {num_heads // degree} on others"
    copies = sum(share.num_kv for share in share_heads(num_heads, num_kv_heads, degree))
    if copies > num_kv_heads:
        return f"key-value heads are copied: {num_kv_heads} for {degree} ranks"
    return "even"


def _degrees(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length())]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _try(config: PretrainedConfig) -> tuple[tuple[str, ...], Probe]:
    """Return why the model is refused, and what a tiny instance does."""
    untried = Probe(failure="not tried, because the model is refused")
    if config.is_encoder_decoder:
        return ("it has an encoder and a decoder; only decoder-only language models are supported.",), untried
    if (architecture := architecture_of(config)) is None:
        return (f"transformers has no causal language model of type {config.model_type!r}.",), untried
    try:
        model = build(config, "meta", architecture)
        reasons = tuple(exactness.model_problems(model))
        cause = " ".join(exactness.sharing_problems(model))
    except Exception as error:
        return (), Probe(failure=f"transformers cannot build it: {type(error).__name__}: {one_line(error)}")
    if reasons:
        return reasons, untried
    trial = tried(config, architecture, cause)
    return (trial.problem,) if trial.problem else (), trial
