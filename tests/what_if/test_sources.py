"""Lengths come from wherever they are, unchanged; what is left out is counted; what is wrong is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_hetero.errors import BadSample, ConfigError, HeteroError
from hf_hetero.what_if.mixes import MIXES
from hf_hetero.what_if.sources import Reading, Source, global_batches, read_source

ROWS = {"length": [3, 1, 2], "input_ids": [[1, 2, 3, 4], [5], [6, 7]], "text": ["a b", "c", "d e f g h"]}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A folder with a tokenizer that splits at spaces."""
    made = Tokenizer(models.WordLevel({"[unk]": 0}, unk_token="[unk]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[unk]")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(tmp_path / "tokenizer"))
    return str(tmp_path / "tokenizer")


def saved(folder: Path, form: str, columns: dict[str, Any]) -> str:
    """The columns in a file or folder of this form."""
    table = datasets.Dataset.from_dict(columns)
    path = folder / f"data.{form}"
    if form == "folder":
        table.save_to_disk(str(path))
    elif form == "splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(path))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_list()))
    elif form == "json":
        path.write_text(json.dumps(table.to_list()))
    elif form == "parquet":
        table.to_parquet(str(path))
    else:
        table.to_csv(str(path))
    return str(path)


def lengths_of(where: str, **options: Any) -> list[int]:
    return read_source(where, 0, reading=Reading(**options)).lengths.tolist()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_text_file(tmp_path: Path) -> None:
    """A length a line, in the file's order; empty lines are none."""
    (tmp_path / "lengths").write_text("5\n\n 7 \n2\n")
    source = read_source(str(tmp_path / "lengths"), 0)
    assert source.lengths.tolist() == [5, 7, 2]
    assert (source.longest_tokens, source.num_dropped, source.is_drawn) == (7, 0, False)


@pytest.mark.parametrize("form", ["folder", "splits", "jsonl", "json", "parquet", "csv"])
def test_datasets(tmp_path: Path, form: str) -> None:
    """A length column is taken from every kind of dataset; without one, `input_ids` are counted."""
    columns = {"length": ROWS["length"]} if form == "csv" else ROWS
    assert lengths_of(saved(tmp_path, form, columns)) == [3, 1, 2]
    if form != "csv":
        assert lengths_of(str(tmp_path / f"data.{form}"), length_column="absent") == [4, 1, 2]


def test_splits(tmp_path: Path) -> None:
    """The split asked for is read; one that is not there is named, with those that are."""
    where = saved(tmp_path, "splits", ROWS)
    assert lengths_of(where, split="test") == [3]
    with pytest.raises(ConfigError, match="no split 'dev', only train, test"):
        lengths_of(where, split="dev")


def test_text_is_tokenised(tmp_path: Path, tokenizer: str) -> None:
    """With a tokenizer its tokens count, also beside a length column; the text column may have another name."""
    assert lengths_of(saved(tmp_path, "jsonl", {"text": ROWS["text"]}), tokenizer=tokenizer) == [2, 1, 5]
    assert lengths_of(saved(tmp_path, "folder", ROWS), tokenizer=tokenizer) == [2, 1, 5]
    renamed = saved(tmp_path, "parquet", {"body": ["x y z"]})
    assert lengths_of(renamed, tokenizer=tokenizer, text_column="body") == [3]


def test_chats_are_tokenised(tmp_path: Path, tokenizer: str) -> None:
    """Messages go through the chat template: every role and every word of this one is a token."""
    chats = [[{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]]
    assert lengths_of(saved(tmp_path, "jsonl", {"messages": chats}), tokenizer=tokenizer) == [5]


def test_a_tokenizer_with_code_is_not_run(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked at the terminal, and nothing of the folder runs; what to do instead is said."""
    ran = tmp_path / "ran"
    (Path(tokenizer) / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    settings = Path(tokenizer) / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match=r"brings code of its own, which is not run.*--length-column"):
        lengths_of(saved(tmp_path, "jsonl", {"text": ROWS["text"]}), tokenizer=tokenizer)
    assert not ran.exists()


@pytest.mark.parametrize("rows", [[3, 4], [[[1]]], [{"a": 1}]])
def test_what_is_no_text(tmp_path: Path, tokenizer: str, rows: list[Any]) -> None:
    """Rows that a tokenizer or its template cannot take are named, with what they said."""
    with pytest.raises(BadSample, match=r"Rows? 0.*: text (is .*; it must be text|cannot be tokenised: )"):
        lengths_of(saved(tmp_path, "jsonl", {"text": rows}), tokenizer=tokenizer)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    """Text cannot be counted in tokens by itself, and a table of something else not at all."""
    with pytest.raises(ConfigError, match="'text' but neither 'length' nor 'input_ids'"):
        lengths_of(saved(tmp_path, "jsonl", {"text": ["a"]}))
    with pytest.raises(BadSample, match="no input_ids, only"):
        lengths_of(saved(tmp_path, "folder", {"image": [1]}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5\n0\n", "line 2: a sample of 0 tokens"),
        ("-3\n", "line 1: a sample of -3 tokens"),
        ("1\n2.5\n", "line 2: '2.5' is not a whole number"),
        ("1e3\n", "'1e3' is not a whole number"),
        (f"{10**15}\n", "line 1: a sample of 1000000000000000 tokens; it must have 1 to 1,099,511,627,776"),
        ("\n", "has no samples"),
    ],
)
def test_bad_lengths_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    """Zero, negative, fractional, absurd and no lengths: the line and the value are named."""
    (tmp_path / "lengths.txt").write_text(text)
    with pytest.raises(BadSample, match=message):
        read_source(str(tmp_path / "lengths.txt"), 0)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "Row 1 has 0 tokens"),
        (-4, "Row 1 has -4 tokens"),
        (2.5, "Row 1: length is 2.5"),
        (float("nan"), "Row 1: length is nan"),
        (10**15, "row 1: 1000000000000000 tokens"),
    ],
)
def test_bad_lengths_in_a_dataset(tmp_path: Path, length: float, message: str) -> None:
    """The same in a column, by row."""
    with pytest.raises(BadSample, match=message):
        lengths_of(saved(tmp_path, "folder", {"length": [type(length)(7), length]}))


def test_nothing_of_that_name(tmp_path: Path, tokenizer: str) -> None:
    """What cannot be found is named, with what could have been meant; so is what cannot be read."""
    with pytest.raises(ConfigError, match=r"wiki-192.*No such file.*wiki-192k, web"):
        read_source("wiki-192", 5)
    for absent in (str(tmp_path / "no" / "lengths.txt"), "./web"):
        with pytest.raises(ConfigError, match="No such file"):
            read_source(absent, 5)
    for broken in ("absent.parquet", "some-owner/no-such-dataset"):
        with pytest.raises(ConfigError, match=f"Cannot load the dataset '{broken}'"):
            read_source(broken, 5)
    (tmp_path / "lengths.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_source(str(tmp_path / "lengths.txt"), 0)
    with pytest.raises(ConfigError, match="Cannot load the tokenizer"):
        lengths_of(saved(tmp_path, "folder", {"text": ["a"]}), tokenizer=str(tmp_path / "nobody"))
    (Path(tokenizer) / "chat_template.jinja").unlink()
    chats = {"messages": [[{"role": "user", "content": "a"}]]}
    with pytest.raises(ConfigError, match="no chat template"):
        lengths_of(saved(tmp_path, "jsonl", chats), tokenizer=tokenizer)
    with pytest.raises(BadSample, match="Row 1 has no text"):
        lengths_of(saved(tmp_path, "parquet", {"text": ["a", None]}), tokenizer=tokenizer)


def test_longer_samples_are_counted(tmp_path: Path) -> None:
    """A maximum length leaves longer samples out, says how many, and keeps the order of the others."""
    (tmp_path / "lengths.txt").write_text("5\n9\n7\n8\n")
    source = read_source(str(tmp_path / "lengths.txt"), 0, max_tokens=7)
    assert (source.lengths.tolist(), source.num_dropped, source.longest_tokens) == ([5, 7], 2, 7)
    with pytest.raises(BadSample, match="all 4 are longer than 4 tokens"):
        read_source(str(tmp_path / "lengths.txt"), 0, max_tokens=4)
    with pytest.raises(ConfigError, match="maximum length is 0"):
        read_source(str(tmp_path / "lengths.txt"), 0, max_tokens=0)


def test_mixes() -> None:
    """A mix gives as many as asked, and may give samples up to its limit, or to the maximum length."""
    source = read_source("web", 40, seed=2)
    assert (source.lengths.size, source.longest_tokens) == (40, MIXES["web"].limit_tokens)
    assert read_source("web", 40, seed=2, max_tokens=500).longest_tokens == 500


@pytest.mark.parametrize("is_drawn", [True, False])
def test_batches(is_drawn: bool) -> None:
    """No sample twice; the first batch is the same however many follow; a mix keeps its order."""
    source = Source("s", np.arange(1, 101, dtype=np.int64), 100, is_drawn=is_drawn)
    batches = global_batches(source, 7, 14, seed=5)
    flat = [length for batch in batches for length in batch]
    assert [len(batch) for batch in batches] == [7] * 14
    assert len(set(flat)) == 98
    assert global_batches(source, 7, 1, seed=5) == batches[:1]
    assert (flat == sorted(flat)) == is_drawn
    assert (global_batches(source, 7, 14, seed=6) == batches) == is_drawn


@pytest.mark.parametrize(
    ("batch_size", "num_steps", "message"),
    [
        (0, 1, "0 samples a batch"),
        (5, 0, "0 steps"),
        (11, 1, "1 batches of 11 samples need 11; 's' has 10, enough for 0"),
        (4, 3, "3 batches of 4 samples need 12; 's' has 10, enough for 2"),
    ],
)
def test_batches_that_cannot_be(batch_size: int, num_steps: int, message: str) -> None:
    """Nothing, or more than there is, is refused with what there is."""
    source = Source("s", np.arange(1, 11, dtype=np.int64), 10)
    with pytest.raises(HeteroError, match=message):
        global_batches(source, batch_size, num_steps)
