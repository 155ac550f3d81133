"""Can this model be trained under changing plans? Looks at its config and tries a tiny instance of its architecture.

No weights are loaded and no GPU is needed: the probe builds the same architecture, a few numbers wide, and compares one
packed forward and backward pass through this package's attention with each sample alone through stock attention.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_hetero import exactness
from hf_hetero.attention import interface, kernels
from hf_hetero.attention.context import AttentionContext
from hf_hetero.attention.cpu import CPU
from hf_hetero.collators.packed import Sample, pack_spans
from hf_hetero.errors import ConfigError, HeteroError
from hf_hetero.layout import contiguous
from hf_hetero.loss import shift_labels, token_loss

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "flash-attn", "mip", "highsbox")
PROBE_LENGTHS = (11, 1, 6, 23)
PROBE_TOLERANCE = 1e-4
SMALL = {  # what makes a model large -> its value in the probe
    "hidden_size": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True, slots=True)
class Probe:
    """What the tiny instance did.

    Args:
        num_layers: attention layers that should be reached.
        reached: layers that the attention function was called for, under a plan.
        loss_error, gradient_error: largest difference from stock attention, relative to the largest value.
        failure: why it could not be tried, in words; empty if it could.
    """

    num_layers: int = 0
    reached: int = 0
    loss_error: float = 0.0
    gradient_error: float = 0.0
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Every layer was reached, and nothing differs by more than rounding."""
        exact = max(self.loss_error, self.gradient_error) <= PROBE_TOLERANCE
        return not self.failure and self.reached == self.num_layers and exact


@dataclass(frozen=True, slots=True)
class Check:
    """Everything `hf-hetero check` says.

    Args:
        name: as it was given.
        model_type: of its config.
        tested: whether its type is compared with plain training in this package's tests.
        versions: of the packages that matter; "not installed" where absent.
        kernel: on a GPU in bf16, by name; or why there is none.
        num_heads, num_kv_heads: of attention.
        methods: degree -> method -> how its heads fit, in words.
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
    reasons: tuple[str, ...]
    probe: Probe

    @property
    def ok(self) -> bool:
        """Whether the model can be trained."""
        return not self.reasons and self.probe.ok

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"format": "hf-hetero-check/1", "ok": self.ok, **asdict(self)}


def check(name: str, max_degree: int = 64) -> Check:
    """Check a model by its name on the hub, its folder, or its config file.

    Raises:
        ConfigError: there is no such config, or it is not one that transformers knows.
    """
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"Cannot read a config from {name!r}: {error}") from error
    text: Any = config.get_text_config(decoder=True)
    num_heads = int(getattr(text, "num_attention_heads", 0) or 0)
    num_kv_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
    features = kernels.features_of(text)
    try:
        kernel = kernels.choose_kernel("cuda", torch.bfloat16, features).name
    except HeteroError as error:
        kernel = str(error)
    reasons, probe = _try(config)
    return Check(
        name=name,
        model_type=config.model_type,
        tested=config.model_type in exactness.TESTED_MODEL_TYPES,
        versions={package: _version(package) for package in PACKAGES},
        kernel=kernel,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        methods={d: fits(d, num_heads, num_kv_heads) for d in _degrees(max_degree)},
        reasons=reasons,
        probe=probe,
    )


def fits(degree: int, num_heads: int, num_kv_heads: int) -> dict[str, str]:
    """How the heads of a model fit a degree, by method, in words."""
    if degree == 1 or not num_heads:
        return {}
    if degree > num_heads:
        ulysses = f"{degree - num_heads} of {degree} ranks idle: {num_heads} heads"
    elif num_heads % degree:
        ulysses = f"uneven: {-(-num_heads // degree)} heads on some ranks, {num_heads // degree} on others"
    elif num_kv_heads % degree:
        ulysses = f"key-value heads are copied: {num_kv_heads} for {degree} ranks"
    else:
        ulysses = "even"
    return {"ulysses": ulysses, "gather": "any heads", "ring": "any heads"}


def _degrees(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _try(config: PretrainedConfig) -> tuple[tuple[str, ...], Probe]:
    """Why the model is refused, and what a tiny instance does."""
    try:
        model: Any = AutoModelForCausalLM.from_config(shrunk(config), attn_implementation="eager")
    except ValueError as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        return (f"transformers builds no causal language model from it: {first_line}",), Probe(failure="not built")
    except Exception as error:
        return (), Probe(failure=f"a tiny instance cannot be built: {type(error).__name__}: {error}")
    reasons = tuple(exactness.model_problems(model))
    if reasons:
        return reasons, Probe(failure="not tried, because the model is refused")
    try:
        return (), probe(model)
    except Exception as error:
        return (), Probe(failure=f"{type(error).__name__}: {error}")


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """The same architecture with few and small layers: one of each kind, the same grouping of heads."""
    small: Any = copy.deepcopy(config)
    for name, value in SMALL.items():
        if isinstance(getattr(small, name, None), int) and not isinstance(getattr(small, name), bool):
            _set(small, name, value)
    heads = getattr(config, "num_attention_heads", None)
    if heads:
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        _set(small, "num_attention_heads", 4)
        if hasattr(config, "num_key_value_heads"):
            _set(small, "num_key_value_heads", 4 if kv_heads == heads else 1 if kv_heads == 1 else 2)
    kinds = list(getattr(config, "layer_types", None) or [])
    num_layers = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    _set(small, "num_hidden_layers", num_layers)
    if kinds:
        _set(small, "layer_types", kinds[:num_layers])
    return small


def _set(config: Any, name: str, value: Any) -> None:
    """Set what can be set: some configs compute the one or other value."""
    with suppress(AttributeError):
        setattr(config, name, value)


def probe(model: Any) -> Probe:
    """One packed pass under a plan, against each sample alone."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = [torch.randint(3, vocab, (length,), generator=generator) for length in PROBE_LENGTHS]
    model = model.float().train()
    if model.loss_function is ForCausalLMLoss:
        model.loss_function = token_loss
    num_targets = sum(length - 1 for length in PROBE_LENGTHS)
    expected = _pass(model, [_alone(sample, num_targets) for sample in ids])
    interface.register()
    model.set_attn_implementation(interface.ATTENTION_NAME)
    layout = contiguous(list(PROBE_LENGTHS), 1)
    context = AttentionContext(layout, (0,), 0, None, "ulysses", CPU, torch.device("cpu"))
    inputs = pack_spans(layout.spans[0], [Sample(sample, shift_labels(sample)) for sample in ids])
    found = _pass(model, [{**inputs, "hetero": context, "num_items_in_batch": num_targets}])
    num_layers = len({m.layer_idx for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)})
    return Probe(num_layers, len(context.reached), _error(found[:1], expected[:1]), _error(found[1:], expected[1:]))


def _alone(sample: torch.Tensor, num_targets: int) -> dict[str, Any]:
    row = sample.unsqueeze(0)
    shifted = shift_labels(sample).unsqueeze(0)
    return {"input_ids": row, "labels": row, "shift_labels": shifted, "num_items_in_batch": num_targets}


def _pass(model: Any, batches: list[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The loss and the gradients of all batches together."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        total = total + loss.detach()
    return [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def _error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest difference, relative to the largest value of the same tensor."""
    if len(found) != len(expected):
        return float("inf")
    largest = max((float(x.abs().max()) for x in expected), default=0.0)
    pairs = zip(found, expected, strict=True)
    # a gradient that is zero but for rounding is measured by the others
    errors = [float((x - y).abs().max()) / max(float(y.abs().max()), 1e-3 * largest, 1e-30) for x, y in pairs]
    return max(errors, default=0.0)
