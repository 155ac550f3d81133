"""The recipe of preference pairs does what it says: its settings train a shrunk model, and what is wrong is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from helpers import run_ranks
from test_recipes import ARCHITECTURES, ROOT, SHRUNK, environment_of, launch_file_of, load_script, write_lines
from words import say, tokenizer

from hf_hetero import HeteroError
from hf_hetero.report import read_records

pytest.importorskip("trl")
RECIPE = ROOT / "recipes" / "dpo" / "train.yaml"


def model_folder(folder: Path) -> Path:
    """A model of the recipe's kind, small, with its tokenizer."""
    words = tokenizer()
    kind, special = ARCHITECTURES["meta-llama/Llama-3.1-8B-Instruct"]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(vocab_size=len(words), **SHRUNK, **special)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def rows_of_chats() -> list[dict[str, Any]]:
    def chat(role: str, words: int, seed: int) -> list[dict[str, str]]:
        return [{"role": role, "content": say(words, seed)}]

    sizes = [(5 + 3 * n % 7, 2 + n % 5, 3 + n % 4) for n in range(15)] + [(60, 90, 90)]
    return [
        {
            "prompt": chat("user", prompt, n),
            "chosen": chat("assistant", chosen, 2 * n + 1),
            "rejected": chat("assistant", rejected, 3 * n + 2),
            "source": "somewhere",
        }
        for n, (prompt, chosen, rejected) in enumerate(sizes)
    ]


def recipe_steps(changes: list[str], launch_file: str) -> str:
    """Three steps of the recipe on this rank's CPU, as its launch file would have it; what the model was wrapped in."""
    os.environ |= environment_of(Path(launch_file))
    script, wrappers = load_script("dpo"), list[str]()

    class Recording(script.HeteroDPOTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            found = super().train(*args, **kwargs)
            wrappers.append(type(self.model_wrapped).__name__)
            return found

    script.HeteroDPOTrainer = Recording
    script.main(["--config", str(RECIPE), *changes])
    return wrappers[0]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")


def test_three_steps(tmp_path: Path) -> None:
    """The same settings, launch file and kind of model, shrunk; a pair that no rank holds is shared by both."""
    data = write_lines(tmp_path / "pairs.jsonl", rows_of_chats())
    changes = {
        **{"model": model_folder(tmp_path / "model"), "dataset": data, "output_dir": tmp_path / "out"},
        **{"num_ranks": 2, "per_device_train_batch_size": 8, "max_steps": 3, "save_strategy": "no"},
        **{"use_cpu": "true", "dataloader_pin_memory": "false", "max_tokens_per_rank": 200, "disable_tqdm": "true"},
    }
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    assert run_ranks(recipe_steps, 2, words, str(launch_file_of(RECIPE))) == ["DistributedDataParallel"] * 2
    records = read_records(tmp_path / "out")
    assert [len(record["lengths"]) for record in records] == [32] * 3  # samples of 16 pairs
    for record in records:
        degrees = {len(group["ranks"]) for m in record["plan"]["micro_batches"] for group in m["groups"]}
        assert 2 in degrees
    assert {"report.html", "adapter_model.safetensors"} <= {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"chosen": "a"}], {}, r"has no rejected, only \['chosen'\]"),
        ([{"chosen": "a", "rejected": "b"}], {"dataset": "nowhere.jsonl"}, "there is no such file"),
        ([{"chosen": rows_of_chats()[0]["chosen"], "rejected": []}], {}, "has no chat template"),
    ],
)
def test_data_that_cannot_be_is_named(rows: list[Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before a model is loaded, with what is missing."""
    script, data, words = load_script("dpo"), write_lines(tmp_path / "pairs.jsonl", rows), tokenizer()
    words.chat_template = None
    with pytest.raises(HeteroError, match=message):
        script.load_data(script.RecipeArguments(model="x", **{"dataset": str(data), **changes}), words)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL's
def test_what_must_be_set_is_named(tmp_path: Path) -> None:
    """A file without a model, or with a field of another type, is an error of one line."""
    script = load_script("dpo")
    for settings, message in (({"dataset": "x"}, "Set `model`"), ({"lora_r": 0}, "lora_r=0"), ({"beat": 1}, "'beta'")):
        path = tmp_path / "my.yaml"
        path.write_text(json.dumps({"use_cpu": True, "output_dir": str(tmp_path), **settings}), encoding="utf-8")
        with pytest.raises(HeteroError, match=message):
            script.parse(["--config", str(path)])
