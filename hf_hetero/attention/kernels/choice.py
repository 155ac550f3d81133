"""This is the one door to attention kernels: which there are, what each can do, and which is best for a model.

Each kernel is a record of what it can do (`contract.Kernel`) with functions of one signature; each library has a file
of its own. A library is offered where its functions take the call that every step makes of them, and chosen where it
computes what attention is, on this device (`trial`): of versions that nobody knew when this was written, too.

=====================  ========  ====================  ======  =======  =====  ======================
kernel                 device    types                 window  softcap  sinks  log-sum-exp (for rings)
=====================  ========  ====================  ======  =======  =====  ======================
`cpu.CPU`              CPU       all, fp64 too         yes     yes      yes    yes
`plain.PLAIN`          any       all, fp64 too         yes     yes      yes    yes
`flash.FA3`            CUDA 9    fp16, bf16            yes     yes      yes    yes
`flash.FA4`            CUDA 9+   fp16, bf16            yes     yes      yes    yes
`flash.FA2`            CUDA 8+   fp16, bf16            yes     yes      yes    yes
`cuda.TORCH_VARLEN`    CUDA      fp16, bf16            yes     no       yes    yes
`hub.hub_kernel(...)`  as the flash-attn that it is a build of
through transformers   CUDA      fp16, bf16            as its function's keywords      no
=====================  ========  ====================  ======  =======  =====  ======================
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from hf_hetero.attention.kernels import trial
from hf_hetero.attention.kernels.contract import HALF, SINKS, SOFTCAP, WINDOW, Kernel
from hf_hetero.attention.kernels.cpu import CPU
from hf_hetero.attention.kernels.cuda import through_transformers, torch_varlen
from hf_hetero.attention.kernels.flash import flash_kernels, named_flash_kernel
from hf_hetero.attention.kernels.hub import hub_kernel, is_of_hub, stand_in
from hf_hetero.attention.kernels.pair import Offer
from hf_hetero.attention.kernels.plain import PLAIN
from hf_hetero.errors import UnsupportedModel
from hf_hetero.model.by_layer import stated

logger = logging.getLogger(__name__)


def choose_kernel(
    device_type: str, dtype: torch.dtype, features: frozenset[str] = frozenset(), wanted: str | None = None
) -> Kernel:
    """Choose the best kernel that can do what a model needs, and does it on this device, where there is one.

    Args:
        device_type: "cpu" or "cuda".
        dtype: type that attention computes in.
        features: what the model's layers use.
        wanted: the model's own `attn_implementation`; a flash-attn name is honoured.

    Raises:
        UnsupportedModel: no kernel can, with what is missing, and what was found wrong with those that are installed.
    """
    if device_type == "cpu":
        return CPU
    if dtype not in HALF:
        logger.warning("No flash kernel computes in %s: using plain attention, slow and hungry. Train in bf16.", dtype)
        return PLAIN
    # all ranks have the same packages, config and kind of device, and must come to the same kernel
    offers = [*_flash(wanted), torch_varlen()]
    refusals = [offer for offer in offers if isinstance(offer, str)]
    kernels = [offer for offer in offers if isinstance(offer, Kernel)]
    for refusal in refusals:
        logger.warning("%s.", refusal)
    for kernel in kernels:
        if features <= kernel.features:
            reason = _failure(kernel, dtype, features)
            if reason is None:
                return kernel
            refusals.append(f"kernel {kernel.name!r} is passed over: {reason}")
            logger.warning("%s.", refusals[-1])
    raise UnsupportedModel(
        f"This model uses {', '.join(sorted(features)) or 'no feature'} in {dtype}; no kernel here "
        f"({[k.name for k in kernels]}) can. {' '.join(f'{refusal}.' for refusal in refusals)} "
        "Install a flash-attn that can: 2.6 or later for softcap."
    )


def _failure(kernel: Kernel, dtype: torch.dtype, features: frozenset[str]) -> str | None:
    if not torch.cuda.is_available():  # what would be chosen is asked for where there is no GPU, too
        return None
    return trial.failure(kernel, torch.device("cuda", torch.cuda.current_device()), dtype, features)


def _flash(wanted: str | None) -> list[Offer]:
    """Return the flash-attn that the user named, else those that are installed, fastest first."""
    if wanted and "flash" in wanted:
        offer = hub_kernel(wanted) if is_of_hub(wanted) else named_flash_kernel(wanted)
        if offer is None and (name := stand_in(wanted)) is not None:
            offer = hub_kernel(name)
        if isinstance(offer, Kernel):
            return [offer]
        try:
            return [*([offer] if offer else []), through_transformers(wanted)]
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{offer}. {error}" if offer else str(error)) from error
    offers = flash_kernels()
    if any(isinstance(offer, Kernel) for offer in offers):
        return offers
    for name in _known_to_transformers():
        try:
            offers.append(through_transformers(name))
        except UnsupportedModel as error:  # nobody asked for it
            offers.append(str(error).rstrip("."))
    return offers


def _known_to_transformers() -> list[str]:
    """Return the name of a flash-attn that only transformers can call, such as an older one, if there is one."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return ["flash_attention_3"]
    return ["flash_attention_2"] if is_flash_attn_2_available() else []


def features_of(config: Any) -> frozenset[str]:
    """Return what the attention layers of a transformers config will ask of a kernel."""
    features: set[str] = set()
    layer_types = getattr(config, "layer_types", None) or []
    if "sliding_attention" in layer_types or (not layer_types and any(stated(config, "sliding_window"))):
        features.add(WINDOW)
    if getattr(config, "attn_logit_softcapping", None):
        features.add(SOFTCAP)
    # no field says so: its layers always have them
    if getattr(config, "model_type", "") == "gpt_oss":
        features.add(SINKS)
    return frozenset(features)
