"""A mixer is cut by its heads: a part with so many of them, whose weights are views of the whole one's.

The heads of a mixer do not see each other before its output projection, which adds them up. So the parts' outputs, each
of all tokens, add up to the mixer's, and the gradients of the views to those of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Cut:
    """A `Cut` says how the weights of a class of mixers belong to heads.

    A size is an attribute of the mixer, or a product of several, as in "n_groups*ssm_state_size".

    Args:
        heads: attributes that count heads, or groups of them, which a part has so many times fewer of.
        scaled: attributes that are so many times smaller in a part, too; "forget_gate.qkv_dim" is of a module within.
        rows: weights that are cut along their first dim: name -> sizes of the sections that are each cut by itself;
            without any, all of it is one.
        columns: weights that are cut along their last dim, as one section.
        whole: weights that every part has whole.
        once: weights that are added to the output, and so are in one part only.
        groups: attribute that counts groups of heads, each with inputs and a norm of its own; "": there are none. The
            parts have so many times fewer, or all of them the only one.
        dims: of weights among the rows that are cut along another dim.
    """

    heads: tuple[str, ...]
    scaled: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]
    columns: tuple[str, ...]
    whole: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    groups: str = ""
    dims: Mapping[str, int] = field(default_factory=dict[str, int])

    def names(self) -> set[str]:
        """Return the names of all weights that are spoken of."""
        return {*self.rows, *self.columns, *self.whole, *self.once}


DELTA_SIZES = ("key_dim", "value_dim")
DELTA_HEADS = ("num_k_heads", "num_v_heads")
QKV = ("key_dim", "key_dim", "value_dim")
GATED_DELTA = Cut(
    DELTA_HEADS,
    DELTA_SIZES,
    rows={
        "in_proj_qkv.weight": QKV,
        "conv1d.weight": QKV,
        **dict.fromkeys(("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "dt_bias", "A_log"), ()),
    },
    columns=("out_proj.weight",),
    whole=("norm.weight",),
)
GATED_DELTA_BY_KEYS = Cut(  # its projections have the rows of one key head after the other
    DELTA_HEADS,
    DELTA_SIZES,
    rows={
        "conv1d.weight": QKV,
        **dict.fromkeys(("in_proj_qkvz.weight", "in_proj_ba.weight", "dt_bias", "A_log"), ()),
    },
    columns=("out_proj.weight",),
    whole=("norm.weight",),
)
GATED_DELTA_APART = Cut(
    DELTA_HEADS,
    DELTA_SIZES,
    rows={
        "conv1d.weight": QKV,
        **dict.fromkeys((f"{name}_proj.weight" for name in "qkvabg"), ()),
        **dict.fromkeys(("dt_bias", "A_log"), ()),
    },
    columns=("o_proj.weight",),
    whole=("o_norm.weight",),
)
KIMI_DELTA = Cut(
    ("num_heads", "forget_gate.num_heads"),
    ("qkv_dim", "forget_gate.qkv_dim"),
    rows={
        "conv1d.weight": ("qkv_dim", "qkv_dim", "qkv_dim"),
        **dict.fromkeys((f"{name}_proj.weight" for name in ("q", "k", "v", "b", "g_b", "forget_gate.f_b")), ()),
        **dict.fromkeys(("forget_gate.dt_bias", "forget_gate.A_log"), ()),
    },
    dims={"forget_gate.A_log": 2},
    columns=("o_proj.weight",),
    whole=("g_a_proj.weight", "forget_gate.f_a_proj.weight", "o_norm.weight"),
)
MAMBA_2_INNER = ("intermediate_size", "n_groups*ssm_state_size", "n_groups*ssm_state_size")
MAMBA_2_PROJECTED = ("intermediate_size", *MAMBA_2_INNER, "num_heads")
MAMBA_2 = Cut(
    ("num_heads",),
    ("intermediate_size",),
    rows={
        "in_proj.weight": MAMBA_2_PROJECTED,
        "in_proj.bias": MAMBA_2_PROJECTED,
        "conv1d.weight": MAMBA_2_INNER,
        "conv1d.bias": MAMBA_2_INNER,
        **dict.fromkeys(("dt_bias", "A_log", "D", "norm.weight"), ()),
    },
    columns=("out_proj.weight",),
    once=("out_proj.bias",),
    groups="n_groups",
)

CUTS: Mapping[str, Cut] = MappingProxyType(
    {
        "Qwen3_5GatedDeltaNet": GATED_DELTA,
        "Qwen3_5MoeGatedDeltaNet": GATED_DELTA,
        "Qwen3NextGatedDeltaNet": GATED_DELTA_BY_KEYS,
        "OlmoHybridGatedDeltaNet": GATED_DELTA_APART,
        "KimiLinearDeltaAttention": KIMI_DELTA,
        **dict.fromkeys(
            ("Mamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer", "Zamba2MambaMixer"),
            MAMBA_2,
        ),
    }
)
"""Class of transformers -> how it is cut. What is not here goes over whole samples on each of their ranks."""


def cut_of(mixer: torch.nn.Module, parts: int) -> Cut | None:
    """Return how a mixer is cut into so many parts; None: it cannot be.

    Adapters within it have weights that no cut speaks of.
    """
    cut = next((CUTS[kind.__name__] for kind in type(mixer).__mro__ if kind.__name__ in CUTS), None)
    if cut is None or any(_get(mixer, name) % parts for name in cut.heads):
        return None
    if cut.groups and _get(mixer, cut.groups) % parts and not has_one_group(mixer, cut):
        return None
    return cut if {name for name, _ in mixer.named_parameters()} <= cut.names() else None


def has_one_group(mixer: torch.nn.Module, cut: Cut) -> bool:
    """Tell whether all heads are of one group, which no cut divides: a norm then is over the channels of all parts."""
    return bool(cut.groups) and _get(mixer, cut.groups) == 1


def part_of(mixer: torch.nn.Module, stock: type, cut: Cut, number: int, parts: int) -> Any:
    """Make a part of a mixer, of the same class, that lives for one forward pass.

    Args:
        mixer: the whole.
        stock: its class in transformers.
        cut: how it is cut.
        number: of the part, from 0.
        parts: how many there are.
    """
    part, is_whole = _outline(mixer, stock), has_one_group(mixer, cut)
    for name in (*cut.heads, *cut.scaled, *([cut.groups] if cut.groups and not is_whole else [])):
        owner, _, attribute = name.rpartition(".")
        setattr(part.get_submodule(owner), attribute, _get(mixer, name) // parts)

    def cut_rows(weight: torch.Tensor, sections: Sequence[str], dim: int) -> torch.Tensor:
        sizes = [prod(_get(mixer, factor) for factor in size.split("*")) for size in sections] or [weight.shape[dim]]
        shared = [is_whole and cut.groups in size.split("*") for size in sections] or [False]
        pieces = zip(weight.split(sizes, dim), shared, strict=True)
        return torch.cat([piece if whole else _share(piece, dim, number, parts) for piece, whole in pieces], dim)

    for name, weight in mixer.named_parameters():
        if name in cut.rows:
            view = cut_rows(weight, cut.rows[name], cut.dims.get(name, 0))
        elif name in cut.columns:
            view = _share(weight, -1, number, parts)
        else:
            # times zero, not left out: every rank gives each weight a gradient
            view = weight * (number == 0) if name in cut.once else weight
        owner, _, attribute = name.rpartition(".")
        part.get_submodule(owner)._parameters[attribute] = view
    part.conv_dim = part.conv1d.weight.shape[0]
    return part


def _share(tensor: torch.Tensor, dim: int, number: int, parts: int) -> torch.Tensor:
    size = tensor.shape[dim] // parts
    return tensor.narrow(dim, number * size, size)


def _get(module: torch.nn.Module, name: str) -> int:
    owner, _, attribute = name.rpartition(".")
    return int(getattr(module.get_submodule(owner), attribute))


def _outline(module: torch.nn.Module, kind: type) -> Any:
    """Copy a module without its hooks; what it holds is shared, but for the tables of modules and weights."""
    copied: Any = object.__new__(kind)
    torch.nn.Module.__init__(copied)
    own = vars(module)
    others = {name: value for name, value in own.items() if name not in vars(copied)}
    tables = {name: dict(own[name]) for name in ("_parameters", "_buffers")}
    vars(copied).update({**others, **tables, "training": module.training})
    for name, child in module.named_children():
        copied._modules[name] = _outline(child, type(child))
    return copied
