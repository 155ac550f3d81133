"""The recipe of classes trains what it says, from each kind of label, and says what is wrong with data."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import test_recipes
import torch
import transformers
from helpers import run_ranks
from test_recipes import CHAT_TEMPLATE, ROOT, SHRUNK, TEXTS, environment_of, load_script, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_hetero import HeteroError
from hf_hetero.report import read_records

LAUNCH_FILE = ROOT / "recipes" / "accelerate" / "ddp.yaml"
_own_caches = test_recipes._own_caches


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("classify")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=len(tokenizer), **SHRUNK)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ROWS: dict[str, list[dict[str, Any]]] = {
    "class": [{"text": TEXTS[n % 4] * (1 + n % 7), "label": ("code", "text")[n % 2]} for n in range(24)],
    "classes": [{"text": TEXTS[n % 4], "label": ["a", "b", "c"][: n % 4]} for n in range(24)],
    "number": [{"text": TEXTS[n % 4], "label": n / 8} for n in range(24)],
    "relevance": [{"text": "import", "passage": TEXTS[n % 4], "label": n % 2} for n in range(24)],
    "words": [{"text": TEXTS[n % 4].split(), "label": [len(w) % 3 for w in TEXTS[n % 4].split()]} for n in range(24)],
}


def steps(words: list[str], launch_file: str | None = None) -> None:
    """Run the script on this rank, as its launch file would have it."""
    import os

    if launch_file is not None:
        os.environ |= environment_of(Path(launch_file))
    load_script("classify").main(words)


def settings_of(kind: str, model: Path, folder: Path, **changes: Any) -> list[str]:
    data = write_lines(folder / "rows.jsonl", ROWS[kind])
    values = {
        **{"model": model, "dataset": data, "eval_dataset": data, "eval_split": "train", "labels": kind},
        **{"output_dir": folder / "out", "max_steps": 3, "per_device_train_batch_size": 4, "eval_strategy": "no"},
        **{"use_cpu": "true", "dataloader_pin_memory": "false", "disable_tqdm": "true", "save_strategy": "no"},
        **({"pair_column": "passage"} if kind == "relevance" else {}),
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_three_steps_of_the_recipe(model_folder: Path, tmp_path: Path) -> None:
    """Its own settings and launch file, on two CPU ranks: a model whose config names the classes, and an accuracy."""
    changes = {"num_ranks": 2, "max_length": 400, "max_tokens_per_rank": 300, "bf16": "false"}
    words = ["--config", str(ROOT / "recipes" / "classify" / "train.yaml")]
    words += settings_of("class", model_folder, tmp_path, **changes)
    run_ranks(steps, 2, words, str(LAUNCH_FILE))
    records = read_records(tmp_path / "out")
    assert [len(record["lengths"]) for record in records] == [8] * 3
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "code", 1: "text"}
    assert (tmp_path / "out" / "report.html").is_file()
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 <= found["eval_accuracy"] <= 1


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "class"])
def test_each_kind_of_label(model_folder: Path, tmp_path: Path, capfd: Any, kind: str) -> None:
    """Several classes, numbers, a reranker's pairs, and words: each trains, is evaluated, and says what it is."""
    adapters = {"lora_r": 2} if kind == "words" else {}
    steps(settings_of(kind, model_folder, tmp_path, max_steps=1, **adapters))
    said = capfd.readouterr().out
    assert ("eval_mean_squared_error" if kind == "number" else "eval_accuracy") in said
    if kind == "words":
        return
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == load_script("classify").PROBLEMS[kind]


def prepared(script: Any, tokenizer: Any, kind: str, rows: list[dict[str, Any]], **options: Any) -> datasets.Dataset:
    args = script.RecipeArguments(labels=kind, dataset="rows", **options)
    data = datasets.Dataset.from_list(rows)
    return script.prepare_data(args, data, tokenizer, script.class_names(args, data))


def test_labels_become_numbers(script: ModuleType, tokenizer: Any) -> None:
    """Names are numbered in their order; lists of names are one number a class; words are learned at first tokens."""
    one = prepared(script, tokenizer, "class", [{"text": "x", "label": name} for name in ("b", "a", "b")])
    assert one["labels"][:] == [1, 0, 1]
    several = [{"text": "x", "label": ["b"]}, {"text": "x", "label": []}, {"text": "x", "label": ["a", "b"]}]
    assert prepared(script, tokenizer, "classes", several)["labels"][:] == [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    numbers = [{"text": "x", "label": 2}, {"text": "x", "label": 0}]
    assert prepared(script, tokenizer, "class", numbers)["labels"][:] == [2, 0]
    words = prepared(script, tokenizer, "words", [{"text": ["qqqq", "x"], "label": [1, 0]}])
    (labels,) = words["labels"][:]
    assert [label for label in labels if label != -100] == [1, 0]
    assert len(labels) == words["length"][0] > 2
    pair = [{"text": "import os", "passage": "x = 1", "label": 1}]
    found = prepared(script, tokenizer, "relevance", pair, pair_column="passage")
    assert found["input_ids"][0] == tokenizer("import os", "x = 1")["input_ids"]
    assert found["labels"][:] == [1.0]


def test_what_is_wrong_is_said(script: ModuleType, tokenizer: Any, tmp_path: Path) -> None:
    """A missing model, file or column, and a row that is too long, are errors of one line."""
    with pytest.raises(HeteroError, match="Set `model`"):
        script.main(["--use_cpu", "true", "--output_dir", str(tmp_path)])
    args = script.RecipeArguments(dataset="nowhere.jsonl")
    with pytest.raises(HeteroError, match="there is no such file"):
        script.load_data(args, args.dataset, "train")
    path = write_lines(tmp_path / "rows.jsonl", [{"words": "x"}])
    with pytest.raises(HeteroError, match=r"has no column 'text', only \['words'\]"):
        script.load_data(args, str(path), "train")
    with pytest.raises(HeteroError, match=r"Row 1 has .* more than max_length=3"):
        prepared(script, tokenizer, "number", [{"text": t, "label": 0.0} for t in TEXTS[1:3]], max_length=3)
    cut = {"max_length": 3, "max_length_policy": "truncate"}
    rows = [{"text": text, "label": 0.0} for text in TEXTS]
    assert max(prepared(script, tokenizer, "number", rows, **cut)["length"][:]) == 3
