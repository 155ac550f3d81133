"""Rows with images are learnt, under plans of mixed degrees, as each row alone, tower and all, in fp64.

Packs hold rows with no image, one, and two; plans cut images between ranks. The reference is stock transformers, one
row a call. What models compute in fp32 whatever they are given is computed in fp64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    Recorder,
    ScriptedPlanner,
    ScriptedTrainer,
    arguments,
    largest_difference,
    run_ranks,
    shard_on_cpu,
    trained,
    trainer_order,
    with_lora,
)
from seers import IMAGE, LOOKS_AHEAD
from sights import UNCAST, all_in_double, in_double_too, reference, rows_with_images, seeing_model

from hf_hetero import HeteroTrainer
from hf_hetero.attention.context import AttentionContext
from hf_hetero.checks.in_double import in_double
from hf_hetero.errors import BadSample
from hf_hetero.images import features, pictures
from hf_hetero.images.positions import RotaryPositions
from hf_hetero.layout import layout_of

SHARDED = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
LAYERS = {  # accelerate does not find all that transformers names of these
    "qwen3-vl": {},
    "llava": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"]},
    "gemma3": {"transformer_layer_cls_to_wrap": ["Gemma3DecoderLayer", "SiglipEncoderLayer"]},
    "gemma4": {"transformer_layer_cls_to_wrap": ["Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer"]},
    "glm-4.1v": {},
    "internvl": {"transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer", "InternVLVisionLayer"]},
    "smolvlm": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "SmolVLMEncoderLayer"]},
    "llama4": {"transformer_layer_cls_to_wrap": ["Llama4TextDecoderLayer", "Llama4VisionEncoderLayer"]},
    "ovis2": {"transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer", "Ovis2VisionEncoderLayer"]},
}
RECOMPUTED = {"activation_checkpointing": True}
SEEING = ("qwen2-vl", "qwen2.5-vl", "qwen3.5", "llava", "llava-pixtral", "llava-next", "mistral3", "gemma4-small")
MORE = (
    "qwen3-vl-moe",
    "qwen3.5-moe",
    "glm-4.1v",
    "glm-4.5v",
    "glm-4.6v",
    "glm-ocr",
    "vip-llava",
    "internvl",
    "aya-vision",
)
MORE += ("cohere2-vision", "idefics3", "lfm2-vl")
MOST = ("llama4", "llava-onevision", "idefics2", "paddleocr-vl", "ovis2", "deepseek-vl", "deepseek-vl-hybrid")
MOST += ("lighton-ocr", "exaone-4.5", "ernie-4.5-vl", "kimi-k2.5", "got-ocr2", "qianfan-ocr")


def model_of(name: str, lora: bool) -> Any:
    model = seeing_model(name)
    # in towers, too: what transformers calls the layers of theirs
    return with_lora(model, ["q_proj", "v_proj", "qkv", "linear_1"]) if lora else model


def steps_of(data: Any) -> list[list[int]]:
    return trainer_order(len(data), 12, 7, 4)


def train(name: str, lora: bool, changes: dict[str, Any]) -> dict[str, Any]:
    model, data = model_of(name, lora), rows_with_images(name)
    if "fsdp" in changes:
        shard_on_cpu()
    data = in_double_too(data) if name in UNCAST else data
    with all_in_double(model):
        return trained(model, data, **changes)


def expected_of(name: str, lora: bool = False) -> dict[str, Any]:
    model, data = model_of(name, lora), rows_with_images(name)
    with in_double(model):
        return reference(model, data, steps_of(data))


def error_of(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of any gradient of any step, and of weights at the end."""
    pairs = zip(found["gradients"], expected["gradients"], strict=True)
    errors = [largest_difference(mine, theirs) for mine, theirs in pairs]
    return max(*errors, largest_difference(found["weights"], expected["weights"]))


def check(name: str, num_ranks: int, lora: bool = False, **changes: Any) -> None:
    expected = expected_of(name, lora)
    for found in run_ranks(train, num_ranks, name, lora, changes):
        assert found["wrapper"].startswith("FSDP" if "fsdp" in changes else "Distributed")
        assert error_of(found, expected) < 1e-12
        logged = [entry["loss"] for entry in found["logs"] if "loss" in entry]
        assert not logged or logged == pytest.approx(expected["losses"], rel=1e-6)


def test_plans_cut_images() -> None:
    """Some images of the rows that the tests learn are held in parts, under the plans that they learn by."""
    data, num_cut = rows_with_images("qwen3-vl"), 0
    for rows in steps_of(data):
        lengths = [len(data[row]["input_ids"]) for row in rows]
        for micro_batch in ScriptedPlanner(2).plan(lengths).micro_batches:
            for group in micro_batch.groups:
                for spans in layout_of(group, lengths).spans:
                    for span in spans:
                        ids = data[rows[group.samples[span.sample]]]["input_ids"]
                        num_cut += ids[span.start - 1 : span.start + 1] == [IMAGE, IMAGE]
    assert num_cut > 4


def stretches_of(row: dict[str, Any]) -> list[tuple[int, int]]:
    """The tokens of each image of a row of Gemma 3."""
    kinds = [0, *row.get("token_type_ids", ()), 0]
    starts = [n for n in range(len(kinds) - 1) if kinds[n : n + 2] == [0, 1]]
    return [(start, kinds.index(0, start + 1) - 1) for start in starts]


def test_plans_cut_stretches() -> None:
    """On four ranks these share tokens that look at each other, and compute heads of samples they have not read."""
    data, methods = rows_with_images("gemma3"), set[str]()
    for rows in trainer_order(len(data), 12, 7, 4):
        lengths = [len(data[row]["input_ids"]) for row in rows]
        for group in (g for m in ScriptedPlanner(4).plan(lengths).micro_batches for g in m.groups):
            layout = layout_of(group, lengths)
            for sample, number in enumerate(group.samples):
                for start, end in stretches_of(data[rows[number]]):
                    if any(s.sample == sample and start < s.start < end for spans in layout.spans for s in spans):
                        methods.add(group.method)
    assert methods >= {"ulysses", "gather", "ring"}


@pytest.mark.parametrize("name", ["qwen3-vl", *(pytest.param(n, marks=pytest.mark.slow) for n in SEEING[:3])])
def test_images_are_learnt_the_same(name: str) -> None:
    """On two ranks: positions in three parts, and features that go into later layers, too."""
    check(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEING[3:])
def test_pictures_are_learnt_the_same(name: str) -> None:
    """On two ranks: of one size, of tiles, of any size."""
    check(name, 2)


@pytest.mark.parametrize("name", ["smolvlm", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_more_models_learn_the_same(name: str) -> None:
    """On two ranks: with experts, with tiles that are pictures of their own, with frames, with shapes."""
    check(name, 2)


@pytest.mark.parametrize("name", ["llama4", *(pytest.param(n, marks=pytest.mark.slow) for n in MOST[1:])])
def test_most_models_learn_the_same(name: str) -> None:
    """On two ranks: a projector behind what is cut, latents, two sizes of a picture, experts of images."""
    check(name, 2)


@pytest.mark.parametrize("name", ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in LOOKS_AHEAD[1:])])
def test_tokens_that_look_at_each_other_are_learnt_the_same(name: str) -> None:
    """On two ranks: those of an image, in all layers or where there are windows, or of all that is asked."""
    check(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-next", "glm-4.5v", "smolvlm", "lfm2-vl", *LOOKS_AHEAD, *MOST])
def test_on_four_ranks(name: str) -> None:
    """Under all degrees and methods."""
    check(name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava", "gemma3", "glm-4.1v", "smolvlm", "llama4", "ovis2"])
def test_with_lora(name: str) -> None:
    """Adapters in the language model and in the tower."""
    check(name, 2, lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_sharded_towers(name: str, num_ranks: int) -> None:
    """Under FSDP2 a rank without an image calls the tower as often as the others, and none waits for another."""
    check(name, num_ranks, fsdp=True, fsdp_config={**SHARDED, **LAYERS[name]})


@pytest.mark.slow
def test_experts_of_images_are_not_sharded() -> None:
    """Ernie's are called where there are tokens of images: ranks without would leave the others waiting under FSDP2."""
    changes = {"fsdp": True, "fsdp_config": SHARDED}
    for error in run_ranks(train, 2, "ernie-4.5-vl", False, changes, expect_errors=True):
        assert "its experts of images are called where there are any" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-vl", "gemma3"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_with_layers_computed_again(name: str, use_reentrant: bool) -> None:
    """Layers of the tower are recomputed as those of the language model are."""
    check(name, 2, **RECOMPUTED, activation_checkpointing_kwargs={"use_reentrant": use_reentrant})


# ----------------------------------------------------------------------------------------------------- counter-examples


def train_wrongly(mistake: str) -> dict[str, Any]:
    """Train on this rank with a mistake that is easily made."""
    if mistake == "plain positions":
        setattr(  # noqa: B010
            RotaryPositions, "of", lambda self, ids, *_: torch.arange(len(ids))[:, None].expand(-1, 3)
        )
    elif mistake == "filling is looked at":
        join = pictures._joined
        pictures._joined = lambda name, tensors: (
            torch.ones_like(join(name, tensors)) if name == pictures.MASK else join(name, tensors)
        )
        return train("idefics2", False, {})
    elif mistake == "a tower counted twice":
        cut = features._of_rows

        def doubled(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            kept = cut(values, rows)
            return 2 * kept - kept.detach()

        features._of_rows = doubled
        return train("llama4", False, {})
    elif mistake == "looking back only":
        AttentionContext.is_mutual = lambda self, window: False
        return train("gemma3", False, {})
    else:
        keep = features._of_rows

        def twice(values: Any, rows: torch.Tensor) -> Any:
            kept = keep(values, rows)
            return tuple(2 * x - x.detach() for x in kept)

        features._of_rows = twice
    return train("qwen3-vl", False, {})


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["plain positions", "towers counted twice"])
def test_mistakes_are_seen(mistake: str) -> None:
    """Positions that count as those of text, and a tower whose gradients two ranks both count, are no rounding."""
    [found, _] = run_ranks(train_wrongly, 2, mistake)
    assert error_of(found, expected_of("qwen3-vl")) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mistake"), [("idefics2", "filling is looked at"), ("llama4", "a tower counted twice")]
)
def test_mistakes_of_others_are_seen(name: str, mistake: str) -> None:
    """Pictures that see what fills them up, and a tower before a projector whose gradients two ranks both count."""
    [found, _] = run_ranks(train_wrongly, 2, mistake)
    assert error_of(found, expected_of(name)) > 1e-3


@pytest.mark.slow
def test_tokens_that_look_back_only_are_seen() -> None:
    """In images of Gemma 3, whose tokens look at each other."""
    [found, _] = run_ranks(train_wrongly, 2, "looking back only")
    assert error_of(found, expected_of("gemma3")) > 1e-3


# ---------------------------------------------------------------------------------------------------------- one process


def test_an_evaluation_sees_images(tmp_path: Any) -> None:
    """The loss is the mean over targets of each row alone."""
    model, data = seeing_model("qwen3-vl"), rows_with_images("qwen3-vl")[:8]
    [expected] = reference(seeing_model("qwen3-vl"), data, [range(8)])["losses"]
    trainer = ScriptedTrainer(model, arguments(str(tmp_path), 1), train_dataset=data)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_collator_makes_rows_of_chats(tmp_path: Any) -> None:
    """Of columns that are no inputs of the model, as TRL's does, for training and for an evaluation."""
    rows = rows_with_images("qwen3-vl")[:12]

    def collate(chats: list[Any]) -> dict[str, Any]:
        row = rows[chats[0]["messages"]]
        images = {key: values for key, values in row.items() if isinstance(values, torch.Tensor)}
        return {**{key: torch.tensor([values]) for key, values in row.items() if key not in images}, **images}

    class Trainer(ScriptedTrainer):
        def _set_signature_columns_if_needed(self) -> None:
            self._signature_columns = ["messages"]

    recorder, data = Recorder(), [{"messages": n, "other": "x"} for n in range(12)]
    expected = reference(seeing_model("qwen3-vl"), rows, [range(12)])
    trainer = Trainer(
        seeing_model("qwen3-vl"),
        arguments(str(tmp_path), 1, max_steps=1, remove_unused_columns=True),
        train_dataset=data,
        data_collator=collate,
        callbacks=[recorder],
    )
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected["losses"][0], rel=1e-5)
    trainer.train()
    assert largest_difference(recorder.gradients[0], expected["gradients"][0]) < 1e-5


def test_a_model_is_given_back_as_it_was(tmp_path: Any) -> None:
    """After training no hook is left; meanwhile the tower keeps the attention that it has."""
    model, data = seeing_model("llava"), rows_with_images("llava")[:12]
    model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})

    def names() -> list[str]:
        parts = (model.config, model.config.text_config, model.config.vision_config)
        return [part._attn_implementation for part in parts]

    class Looking(Recorder):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            assert names() == ["hf_hetero", "hf_hetero", "eager"]
            seen.append(1)

    seen: list[int] = []
    args = arguments(str(tmp_path), 1, max_steps=1)
    HeteroTrainer(model, args, train_dataset=data, callbacks=[Looking()]).train()
    assert seen == [1]
    assert names() == ["sdpa", "sdpa", "eager"]
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_prefix_that_is_not_said_is_refused(tmp_path: Any) -> None:
    """PaliGemma's rows say where the answer begins, in one place."""
    first, *rows = rows_with_images("paligemma")[:12]
    for kinds, words in ((None, "has no token_type_ids"), ([0, 1] * len(first["input_ids"]), "places, which all look")):
        row = {**first, "token_type_ids": kinds and kinds[: len(first["input_ids"])]}
        trainer = HeteroTrainer(seeing_model("paligemma"), arguments(str(tmp_path), 1), train_dataset=[row, *rows])
        with pytest.raises(BadSample, match=words):
            trainer.train()
