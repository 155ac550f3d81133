"""Layers that carry state, over a pack at once: `python benchmarks/gpu/measure_state_layers.py --device cpu`.

Models whose layers are linear attention, Mamba 2 or short convolutions beside attention, with the packages' kernels
that are installed here. Packs of real lengths, forward and backward: all samples at once where something keeps them
apart, else sample by sample, and each sample in a call of its own. Gradients of a small pack in bf16 are held
against those of each sample in a call of its own in fp32, by transformers' own code, and what a pack without borders
gives shows that the comparison can fail; seconds are those of a larger one.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from shapes import Shape, make_model, mix_pack
from stage import Stage, begin, bf16, seconds_in_turns
from transformers import BambaConfig, KimiLinearConfig, Lfm2Config, Qwen3_5TextConfig

from hf_hetero.attention import interface
from hf_hetero.attention.context import AttentionContext, planned_mask
from hf_hetero.attention.kernels import choose_kernel
from hf_hetero.layout import contiguous
from hf_hetero.model.loss import token_loss
from hf_hetero.state_layers.families import mixers_of
from hf_hetero.state_layers.packs import Packs, gap_of
from hf_hetero.state_layers.planned import StateLayers

WHOLE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 8}
WHOLE |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768, "max_position_embeddings": 32768}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 4096}
DELTA = {"linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_conv_kernel_dim": 4}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}
LATENT |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "first_k_dense_replace": 4}
THREE_OF_FOUR = ["linear_attention"] * 3 + ["full_attention"]


def subjects(stage: Stage) -> dict[str, Shape]:
    """A model of each kind of state layer; three of four layers are of it."""
    base = stage.pick(WHOLE, TINY)
    size = base["head_dim"]
    mamba = {"mamba_n_heads": 2 * base["hidden_size"] // 64, "mamba_d_head": 64, "mamba_d_state": 128}
    mamba |= {"mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256}
    heads = {"linear_key_head_dim": size, "linear_value_head_dim": size}
    kimi = {"linear_num_heads": 8, "linear_head_dim": size, "layer_types": THREE_OF_FOUR}
    conv = {"layer_types": ["conv"] * 3 + ["full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
    return {
        "Gated DeltaNet (Qwen3.5)": Shape(Qwen3_5TextConfig, {**base, **DELTA, **heads, "layer_types": THREE_OF_FOUR}),
        "Kimi delta attention (Kimi-Linear)": Shape(KimiLinearConfig, {**base, **LATENT, **kimi}),
        "Mamba 2 (Bamba)": Shape(BambaConfig, {**base, **mamba, "attn_layer_indices": [3]}),
        "short convolutions (LFM2)": Shape(Lfm2Config, {**base, **conv}),
    }


class OneByOne(Packs):
    """`OneByOne` never goes over a pack at once."""

    def computed(
        self,
        mixer: torch.nn.Module,
        kind: type,
        at_once: Callable[[int], torch.Tensor],
        each: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Compute each sample by itself."""
        return each()


@contextmanager
def without_packages(kind: type) -> Iterator[None]:
    """Let a kind of mixer compute by transformers' own code, as if no package of kernels were installed."""
    module = sys.modules[kind.__module__]
    with ExitStack() as undone:
        for name, function in list(vars(module).items()):
            if not inspect.isfunction(function):
                continue
            plain = inspect.getclosurevars(function).nonlocals.get("torch_function")
            if plain is not None:
                undone.enter_context(mock.patch.object(module, name, plain))
        yield


class Pack:
    """A model and a pack.

    Args:
        model: with hf_hetero's attention.
        lengths: of the samples, tokens.
    """

    def __init__(self, stage: Stage, model: Any, lengths: list[int]) -> None:
        self._device, self._model, self._lengths = stage.device, model, lengths
        self._kernel = choose_kernel(stage.device.type, torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(3, model.config.vocab_size, (1, sum(lengths)), generator=generator).to(self._device)
        self._labels = self._ids.clone()
        self._labels[0, list(accumulate(lengths[:-1], initial=0))] = -100  # nothing foretells a first token

    def step(self, layers: StateLayers | None) -> None:
        """Forward and backward of all samples in one call; None: state layers take them for one sample."""
        tokens, lengths = sum(self._lengths), self._lengths
        positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(self._device)
        mask = planned_mask(tokens, tokens).to(self._device)
        context = AttentionContext(contiguous(lengths, 1), (0,), 0, None, "ulysses", self._kernel, self._device)
        inputs = {"input_ids": self._ids, "labels": self._labels, "position_ids": positions, "attention_mask": mask}
        with bf16(self._device), layers.planned(context) if layers is not None else nullcontext():
            loss = self._model(**inputs, hetero=context, num_items_in_batch=tokens).loss
            loss.backward()

    def each(self, model: Any, autocast: Any) -> None:
        """Forward and backward of each sample in a call of its own."""
        for ids in self._ids.split(self._lengths, dim=1):
            with autocast:
                logits = model(input_ids=ids, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
                (loss / sum(self._lengths)).backward()


@torch.no_grad()
def enlarge(model: Any) -> None:
    """Give matrices of state layers weights as trained ones have, so that what they add is not lost in rounding."""
    for mixer in mixers_of(model):
        for p in mixer.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)


def gradients(model: Any, call: Callable[[], Any]) -> torch.Tensor:
    """All gradients of one call, in one row."""
    model.zero_grad(set_to_none=True)
    call()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    row = torch.cat([x.detach().float().flatten() for x in found])
    model.zero_grad(set_to_none=True)
    return row


def measure(stage: Stage, name: str, shape: Shape) -> None:
    """All ways with one model."""
    small = mix_pack("github", stage.pick(1024, 64), stage.pick(256, 24))
    large = mix_pack("github", stage.pick(16384, 96), stage.pick(8192, 48))
    model = make_model(shape, stage.device, interface.ATTENTION_NAME).train()
    enlarge(model)
    stock = make_model(shape, stage.device, "sdpa").train()
    stock.load_state_dict(model.state_dict())
    model.loss_function = token_loss
    mixer = next(mixers_of(model))
    stage.fact(f"{name}: rows between samples", gap_of(mixer, type(mixer)))
    planned, one_by_one = StateLayers(model), StateLayers(model)
    one_by_one._packs = OneByOne()
    ways: dict[str, tuple[Any, Callable[[Pack], Any]]] = {
        "as HeteroTrainer does": (model, lambda pack: pack.step(planned)),
        "sample by sample": (model, lambda pack: pack.step(one_by_one)),
        "each in a call of its own": (stock, lambda pack: pack.each(stock, bf16(stage.device))),
        "no borders (must differ)": (model, lambda pack: pack.step(None)),
    }
    pack = Pack(stage, model, small)
    with without_packages(type(mixer)):
        expected = gradients(stock, lambda: pack.each(stock, nullcontext()))
    for way, (subject, call) in ways.items():
        away = float((gradients(subject, partial(call, pack)) - expected).norm() / expected.norm())
        stage.row("Gradients of a pack", kind=name, samples=len(small), tokens=sum(small), way=way,
                  **{"gradient differs by": f"{away:.1e}"})  # fmt: skip
    pack = Pack(stage, model, large)
    calls = {way: partial(call, pack) for way, (_, call) in ways.items()}
    for way, taken in seconds_in_turns(stage.device, calls, stage.pick(2, 1)).items():
        stage.row("Seconds of a pack", kind=name, samples=len(large), tokens=sum(large), way=way,
                  ms=round(1e3 * taken, 1))  # fmt: skip
    model.to("meta")
    stock.to("meta")


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    interface.register()
    for name, shape in subjects(stage).items():
        if stage.left_s < stage.pick(25, 3):
            stage.note(f"No time left for {name}.")
            continue
        with stage.alone(name):
            measure(stage, name, shape)
    stage.done()


if __name__ == "__main__":
    main()
