"""This table knows the layers that carry state: what transformers calls their modules, and how far back they see.

Such a module, here a mixer, takes hidden states of shape (1, n, hidden) and gives as many. Its output at a token
depends on that token and those before it, and on nothing else. So the mixer of a whole sample needs no more than the
sample, and the mixer of a part no more than the tokens up to the part's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True, slots=True)
class Family:
    """A `Family` is what mixers of one kind have in common.

    Args:
        name: of the kind, for messages.
        state: attributes of the mixer whose product is how many numbers its state holds.
        window: attribute of the mixer that counts the tokens an output sees, itself included; None: all before it.
    """

    name: str
    state: tuple[str, ...]
    window: str | None = None


GATED_DELTA = Family("gated delta net", ("num_v_heads", "head_k_dim", "head_v_dim"))  # arXiv:2412.06464
KIMI_DELTA = Family("Kimi delta attention", ("num_heads", "head_dim", "head_dim"))  # arXiv:2510.26692
MAMBA_1 = Family("Mamba", ("intermediate_size", "ssm_state_size"))  # arXiv:2312.00752
MAMBA_2 = Family("Mamba 2", ("intermediate_size", "ssm_state_size"))  # arXiv:2405.21060
SHORT_CONVOLUTION = Family("short convolution", (), window="conv_kernel_size")
LIGHTNING = Family("lightning attention", ("num_attention_heads", "head_dim", "head_dim"))  # arXiv:2501.08313
GATED_RECURRENCE = Family("gated linear recurrence", ("lru_width",))  # arXiv:2402.19427

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "Qwen3NextGatedDeltaNet",
                "Qwen3_5GatedDeltaNet",
                "Qwen3_5MoeGatedDeltaNet",
                "OlmoHybridGatedDeltaNet",
            ),
            GATED_DELTA,
        ),
        **dict.fromkeys(("KimiLinearDeltaAttention", "BailingHybridDeltaAttention"), KIMI_DELTA),
        **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer", "ZambaMambaMixer"), MAMBA_1),
        **dict.fromkeys(
            (
                "Mamba2Mixer",
                "BambaMixer",
                "GraniteMoeHybridMambaLayer",
                "NemotronHMamba2Mixer",
                "FalconH1Mixer",
                "Zamba2MambaMixer",
            ),
            MAMBA_2,
        ),
        **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv"), SHORT_CONVOLUTION),
        "MiniMaxLightningAttention": LIGHTNING,
        "RecurrentGemmaRecurrentBlock": GATED_RECURRENCE,
    }
)
"""Class of transformers -> family. A class that is not here is refused (`checks.exactness`)."""


def family_of(module: torch.nn.Module) -> Family | None:
    """Return the family of a mixer, whatever wrappers made of its class; None for any other module."""
    return next((FAMILIES[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in FAMILIES), None)


def mixers_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the mixers of a model that are known here."""
    return (module for module in model.modules() if family_of(module) is not None)


def window_of(mixer: torch.nn.Module) -> int | None:
    """Return the tokens that an output of a mixer sees, itself included; None: all before it."""
    family = family_of(mixer)
    assert family is not None
    return None if family.window is None else int(getattr(mixer, family.window))
