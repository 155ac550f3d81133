"""The hub has flash-attn built for many versions of torch and CUDA: the `kernels` package loads it without a build.

The name is transformers' own, as in `attn_implementation="kernels-community/flash-attn2"`. What is loaded has the raw
functions of flash-attn 2, 3 or 4, one module deeper; if it has not, transformers can still call it, without rings.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from hf_hetero.attention.kernels.contract import Kernel
from hf_hetero.attention.kernels.cuda import HUB_REMEDY
from hf_hetero.attention.kernels.flash import FA2, FA3, FA4
from hf_hetero.attention.kernels.pair import Offer
from hf_hetero.attention.kernels.signatures import misfit
from hf_hetero.errors import UnsupportedModel


def is_of_hub(implementation: str) -> bool:
    """Return whether an attention's name is one of the hub's."""
    return "/" in implementation


def stand_in(implementation: str) -> str | None:
    """Return what transformers takes from the hub for a flash-attn that is not installed; None if it takes nothing."""
    from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

    return FLASH_ATTN_KERNEL_FALLBACK.get(implementation) if find_spec("kernels") is not None else None


def hub_kernel(implementation: str) -> Offer:
    """Return the pair of a flash-attn on the hub; or why there is none.

    Args:
        implementation: "owner/name", with "@revision" and ":function" after it or not, as transformers writes it.

    Raises:
        UnsupportedModel: it cannot be loaded, with the remedy.
    """
    module = _load(implementation)
    for flash in (FA2, FA3, FA4):  # 2 first: its module has 3's names, too, for samples that are not packed
        offer = flash.of(module, implementation)
        if offer is not None:
            return replace(offer, name=implementation) if isinstance(offer, Kernel) else offer
    return f"{implementation} has the raw functions of no flash-attn, so that only transformers can call it"


def _load(implementation: str) -> Any:
    from transformers.integrations.hub_kernels import get_attn_kernel_version

    name, _, revision = implementation.partition(":")[0].partition("@")
    # a revision is the user's; else transformers says which version of each it is tested with
    which = {"revision": revision} if revision else {"version": get_attn_kernel_version(name)}
    try:
        get_kernel = importlib.import_module("kernels").get_kernel
        reason = misfit(get_kernel, {"repo_id": name, **which})
        if reason is None:
            return get_kernel(repo_id=name, **which)
    except Exception as error:  # of the network, of the cache, of a build for another CUDA: each library has its own
        raise UnsupportedModel(_words(implementation, str(error))) from error
    raise UnsupportedModel(
        _words(implementation, f"the kernels package's `get_kernel` does not take the call: {reason}")
    )


def _words(implementation: str, reason: str) -> str:
    return (
        f"attn_implementation={implementation!r} cannot be loaded from the hub: {reason}. It needs {HUB_REMEDY}. "
        "Or leave it out: torch has a kernel of its own."
    )
