"""Chats with images, made into tokens as they are read, are learnt by the recipe and under TRL as each row alone."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from helpers import Recorder, ScriptedPlanner, largest_difference, run_ranks, scripted, trainer_order
from PIL import Image
from processors import BEGIN, END, PROCESSORS, WORDS, processor
from seers import IMAGE
from sights import OF_IMAGES, OF_TOKENS, UNCAST, all_in_double, reference, seeing_model

from hf_hetero.checks.in_double import in_double
from hf_hetero.errors import HeteroError
from hf_hetero.fine_tuning import ImageChats, counted_chats
from hf_hetero.fine_tuning.image_chats import with_images

MISLED = ("idefics2",)
"""Whose processors mark other tokens than the assistant says."""
NUM_ROWS = 16


def say(length: int, seed: int) -> str:
    return " ".join(WORDS[(seed * 7 + 5 * n) % len(WORDS)] for n in range(length))


def picture(seed: int) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (6 + seed % 3, 5, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def chats() -> list[dict[str, Any]]:
    """With no image, one, or two; of very different lengths."""
    rows: list[dict[str, Any]] = []
    for n in range(NUM_ROWS):
        turns = [
            {"role": "user", "content": say(2 + n % 4, n)},
            {"role": "assistant", "content": say([3, 30, 7, 55, 12][n % 5], n + 1)},
        ]
        rows.append({"messages": turns, "images": [picture(10 * n + k) for k in range((0, 1, 2, 1)[n % 4])]})
    return rows


def rows_of(chats: list[dict[str, Any]], assistant_only: bool, name: str = "llava") -> list[dict[str, Any]]:
    """What a processor alone makes of the chats, as the reference takes rows."""
    collate, rows = ImageChats(processor(name), assistant_only), []
    for chat in chats:
        batch = collate([chat])
        lists = {key: batch[key][0].tolist() for key in ("input_ids", "labels", *OF_TOKENS) if key in batch}
        rows.append({**lists, **{key: batch[key] for key in OF_IMAGES if key in batch}})
    return rows


def test_rows_are_what_the_template_says() -> None:
    """Four tokens an image, before what the user says; labels of all but these, or of the assistant's words alone."""
    chat = {"messages": chats()[1]["messages"], "images": [picture(0)]}
    for assistant_only in (False, True):
        [row] = rows_of([chat], assistant_only)
        said = len(chat["messages"][1]["content"].split()) + 1
        assert row["input_ids"][:4] == [IMAGE] * 4
        assert row["input_ids"].count(IMAGE) == 4
        hidden = len(row["input_ids"]) - said if assistant_only else 4
        assert row["labels"] == [-100] * hidden + row["input_ids"][hidden:]
        assert row["pixel_values"].shape == (1, 3, 4, 4)


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name not in MISLED])
def test_processors_know_where_the_assistant_speaks(name: str) -> None:
    """The last words of each chat, and no other, whatever its images have become."""
    for chat, row in zip(chats(), rows_of(chats(), True, name), strict=True):
        said = len(chat["messages"][1]["content"].split()) + 1
        assert row["labels"] == [-100] * (len(row["labels"]) - said) + row["input_ids"][-said:]


@pytest.mark.parametrize("name", MISLED)
def test_a_processor_that_does_not_is_refused(name: str) -> None:
    """Its marks are off by what its images have become: all words are learned, or nothing."""
    with pytest.raises(HeteroError, match="does not know where the assistant speaks"):
        rows_of(chats(), True, name)
    assert len(rows_of(chats(), False, name)) == NUM_ROWS


def test_rows_say_which_tokens_look_at_each_other() -> None:
    """Gemma 3's: those of the image, between two marks; none of the three is learned but the last."""
    [row] = rows_of([{"messages": chats()[1]["messages"], "images": [picture(0)]}], False, "gemma3")
    assert row["input_ids"][:18] == [BEGIN, *[IMAGE] * 16, END]
    assert row["token_type_ids"][:19] == [0, *[1] * 16, 0, 0]
    assert row["labels"][:19] == [-100] * 17 + row["input_ids"][17:19]
    [text] = rows_of([{"messages": chats()[1]["messages"]}], False, "gemma3")
    assert set(text.get("token_type_ids", [0])) == {0}


def test_images_stand_where_messages_say() -> None:
    """Or the row is refused: with more places than images, or fewer."""
    parts = [{"type": "text", "text": "a"}, {"type": "image", "text": None}]
    chat = [{"role": "user", "content": parts}, {"role": "user", "content": "b"}]
    placed = with_images(chat, ["x"])
    assert placed[0]["content"] == [{"type": "text", "text": "a"}, {"type": "image", "image": "x"}]
    assert placed[1]["content"] == [{"type": "text", "text": "b"}]
    assert parts[1] == {"type": "image", "text": None}
    for images, words in (([], "places for more than its 0"), (["x", "y"], "has 2 images, and .* places for 1")):
        with pytest.raises(HeteroError, match=words):
            with_images(chat, images)
    with pytest.raises(HeteroError, match="must be a list of messages"):
        with_images(None, [])


# ----------------------------------------------------------------------------------------------------------- the recipe


def folder_of(folder: Path) -> Path:
    """Lines of JSON, and images beside them, as a user has them."""
    lines: list[str] = []
    for number, row in enumerate(chats()):
        names = [f"{number}-{k}.png" for k in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            image.save(folder / name)
        lines.append(json.dumps({"messages": row["messages"], "images": names}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder / "chats.jsonl"


def run_recipe(folder: str, world: int, assistant_only: bool) -> dict[str, Any]:
    from test_recipes import load_script

    sft, recorder = load_script("sft"), Recorder()

    class Recording(sft.HeteroTrainer):
        def __init__(self, *args: Any, callbacks: Any = (), **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[recorder, *callbacks], **kwargs)

        def _plan_source(self) -> Any:
            return scripted(ScriptedPlanner(self.args.world_size))

    sft.HeteroTrainer = Recording
    settings: dict[str, Any] = {
        "model": f"{folder}/model",
        "dataset": f"{folder}/chats.jsonl",
        "assistant_only_loss": assistant_only,
        "output_dir": f"{folder}/out",
        "per_device_train_batch_size": 8 // world,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "seed": 7,
        "report_to": "none",
        "save_strategy": "no",
        "save_model": False,
    }
    path = Path(folder) / f"train-{dist.get_rank() if dist.is_initialized() else 0}.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    sft.main(["--config", str(path)])
    return {"gradients": recorder.gradients}


def recipe_on_rank(folder: str, world: int, assistant_only: bool, caches: str) -> dict[str, Any]:
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(caches)
    return run_recipe(folder, world, assistant_only)


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(n, marks=pytest.mark.slow) for n in PROCESSORS if n != "llava")]
)
def test_the_recipe_learns_from_a_folder(name: str, tmp_path: Path) -> None:
    """Two ranks, plans that cut images: gradients are those of each row alone, to fp32's rounding."""
    folder_of(tmp_path)
    model = seeing_model(name)
    model.save_pretrained(tmp_path / "model")
    processor(name).save_pretrained(tmp_path / "model")
    steps = trainer_order(NUM_ROWS, 8, 7, 2)
    only = name not in MISLED
    expected = reference(seeing_model(name), rows_of(chats(), assistant_only=only, name=name), steps)
    for found in run_ranks(recipe_on_rank, 2, str(tmp_path), 2, only, str(tmp_path / "cache")):
        for mine, theirs in zip(found["gradients"], expected["gradients"], strict=True):
            assert largest_difference(mine, theirs) < 1e-5


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """With what is wrong: too long, or more images than places."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    for changes, most, words in (
        ({}, 20, "Row 1: it has .* tokens, more than max_length=20. Rows with images are not cut"),
        ({"messages": [{"role": "assistant", "content": "w3"}]}, None, "Row 1: it has 1 images, and .* places for 0"),
    ):
        rows = [{**row, **(changes if n == 1 else {})} for n, row in enumerate(chats()[:2])]
        with pytest.raises(HeteroError, match=words):
            counted_chats(datasets.Dataset.from_list(rows), ImageChats(processor()), tmp_path, most, None)


# ------------------------------------------------------------------------------------------------------------------ TRL


def train_under_trl(folder: str, name: str) -> dict[str, Any]:
    import trl

    from hf_hetero import HeteroSFTTrainer

    class Scripted(HeteroSFTTrainer):
        def _plan_source(self) -> Any:
            return scripted(ScriptedPlanner(self.args.world_size))

    recorder, model = Recorder(), seeing_model(name)
    args = trl.SFTConfig(
        folder,
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        seed=7,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        activation_checkpointing=False,
        assistant_only_loss=True,
        logging_steps=1,
    )
    import datasets

    with all_in_double(model), contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        data: Any = datasets.Dataset.from_list(chats())
        trainer = Scripted(model, args, train_dataset=data, processing_class=processor(name), callbacks=[recorder])
        trainer.train()
    return {"gradients": recorder.gradients, "logs": trainer.state.log_history}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROCESSORS if name not in (*MISLED, *UNCAST)])
def test_trl_learns_from_images(name: str, tmp_path: Path) -> None:
    """Its own collator makes tokens and inputs of the tower as rows are read; the loss is its own."""
    pytest.importorskip("trl")
    steps, rows = trainer_order(NUM_ROWS, 8, 7, 2), rows_of(chats(), assistant_only=True, name=name)
    model = seeing_model(name)
    with in_double(model):
        expected = reference(model, rows, steps)
    for found in run_ranks(train_under_trl, 2, str(tmp_path), name):
        for mine, theirs in zip(found["gradients"], expected["gradients"], strict=True):
            assert largest_difference(mine, theirs) < 1e-6  # TRL computes its loss in fp32
        logged = [entry["loss"] for entry in found["logs"] if "loss" in entry]
        assert logged == pytest.approx(expected["losses"], rel=1e-5)
