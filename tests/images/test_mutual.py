"""Which tokens of a row look at each other is what the model's own masks say, or the row is refused in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attention.dense_attention import visible
from helpers import run_ranks
from images.test_sight import packer
from seers import LOOKS_AHEAD
from sights import loss_alone, rows_with_images, seeing_model

from hf_hetero.collators.sample import Sample
from hf_hetero.errors import BadSample
from hf_hetero.images.families import mutual_of
from hf_hetero.images.mutual import CausalLayers, MutualTokens
from hf_hetero.images.together import seeing_together
from hf_hetero.layout import contiguous
from hf_hetero.plan import Group, MicroBatch, Plan
from hf_hetero.ranks.groups import GroupPool
from hf_hetero.samples.samples import Drawn
from hf_hetero.step import RankMicroBatch, Step, StepBatch, StepShare

GEMMA = MutualTokens("token_type_ids", frozenset({1}), other=0)
PREFIX = MutualTokens("token_type_ids", frozenset({0}), other=1, is_prefix=True, longest=4)


@pytest.mark.parametrize("name", LOOKS_AHEAD)
def test_they_are_the_models_own_masks(name: str) -> None:
    """What stock transformers hands its language model for the row alone, in layers with a window and without."""
    model, masks, num_mutual = seeing_model(name), list[Any](), 0
    model.set_attn_implementation("eager")
    model.model.language_model.register_forward_pre_hook(
        lambda part, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    tokens, text = mutual_of(model.config), model.config.get_text_config()
    assert tokens is not None
    for row in rows_with_images(name)[:8]:
        loss_alone(model, row)
        mask, sample = masks[-1], packer(name).sample(row, "row 0")
        by_kind = mask if isinstance(mask, dict) else {"full_attention": mask}
        for kind, values in by_kind.items():
            window = text.sliding_window if kind == "sliding_attention" else None
            stretches = () if tokens.in_windows and window is None else sample.mutual
            seen = visible([len(row["input_ids"])], window, mutual=[(0, a, b) for a, b in stretches])
            assert torch.equal(values[0, 0] == 0, seen)
            num_mutual += len(stretches)
    assert num_mutual > 3


def test_each_run_is_a_stretch() -> None:
    """One token alone looks at nothing; a row that says nothing has none."""
    kinds = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1])
    assert GEMMA.stretches({"token_type_ids": kinds}, "row 0") == ((0, 2), (6, 9))
    assert GEMMA.stretches({}, "row 0") == ()
    assert GEMMA.stretches(GEMMA.marks(kinds), "row 0") == ()


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (None, "row 0 has no token_type_ids, which says where the answer begins"),
        ([0, 0, 1, 0], "in 2 places, which all look at each other"),
        ([0, 0, 0, 0, 0, 1], "5 tokens look at each other, more than the model's window of 4"),
    ],
)
def test_a_prefix_that_cannot_be(kinds: list[int] | None, words: str) -> None:
    """It is said, stands in one place, and is no longer than a window that would leave out some of it."""
    with pytest.raises(BadSample, match=words):
        PREFIX.stretches({} if kinds is None else {"token_type_ids": torch.tensor(kinds)}, "row 0")
    assert PREFIX.stretches({"token_type_ids": torch.tensor([0, 0, 0, 0, 1])}, "row 0") == ((0, 4),)


def test_a_part_of_a_row_has_its_part_of_a_stretch() -> None:
    """Counted from where it begins."""
    sample = Sample(torch.arange(10), None, mutual=((0, 2), (3, 7), (8, 10)))
    assert sample.part(4, 9).mutual == ((0, 3), (4, 5))
    assert sample.part(2, 3).mutual == ()


def test_layers_of_a_prefix_say_that_they_look_back() -> None:
    """PaliGemma's, meanwhile; others are left as they are."""
    model = seeing_model("paligemma")
    layers = [m for m in model.model.language_model.modules() if hasattr(m, "is_causal")]
    assert [layer.is_causal for layer in layers] == [False] * 2
    hooks = CausalLayers(model)
    assert [layer.is_causal for layer in layers] == [True] * 2
    hooks.remove()
    assert [layer.is_causal for layer in layers] == [False] * 2
    encoder = torch.nn.Module()
    encoder.is_causal = False  # pyright: ignore[reportAttributeAccessIssue]
    other = seeing_model("llava")
    other.model.language_model.extra = encoder
    CausalLayers(other)
    assert encoder.is_causal is False


def told(rank_reads: list[list[int]]) -> list[dict[int, Any]]:
    """What a rank knows of its groups' samples after the ranks have told each other."""
    import torch.distributed as dist

    plan = Plan(2, (MicroBatch((Group((0, 1), (2, 0)),)), MicroBatch((Group((0,), (1,)), Group((1,), (3,))))))
    me, drawn = dist.get_rank(), Drawn((5, 6, 7, 8), (0,) * 4, (4,) * 4, (4,) * 4)
    pool = GroupPool((), 30, 30)
    share = StepShare(Step(0, 0, drawn, plan), me)
    micro_batches = tuple(
        RankMicroBatch(
            group,
            contiguous([4] * len(group.samples), group.degree),
            (),
            {},
            mutual={n: ((0, sample + 2),) for n, sample in enumerate(group.samples) if sample in rank_reads[me]},
        )
        for group in share.groups
    )
    batch = seeing_together(StepBatch(share, micro_batches, 0), packer("gemma3").sight, pool.control)
    pool.close()
    return [dict(m.mutual) for m in batch.micro_batches]


def test_ranks_tell_each_other() -> None:
    """A rank that computes heads of a sample which another has read knows its stretches, and no other's."""
    assert run_ranks(told, 2, [[0, 1], [2, 3]]) == [
        [{0: ((0, 4),), 1: ((0, 2),)}, {0: ((0, 3),)}],
        [{0: ((0, 4),), 1: ((0, 2),)}, {0: ((0, 5),)}],
    ]
    assert run_ranks(told, 2, [[], []]) == [[{}, {}]] * 2


def test_another_mask_would_be_noticed() -> None:
    """The comparison with the model's masks can fail: without what says it, no token looks ahead."""
    [row] = rows_with_images("gemma3", [9], [1])
    sample = packer("gemma3").sample(row, "row 0")
    bare = packer("gemma3").sample({k: v for k, v in row.items() if k != "token_type_ids"}, "row 0")
    assert sample.mutual
    assert not bare.mutual
    assert replace(sample, mutual=()).fingerprint() == sample.fingerprint()
