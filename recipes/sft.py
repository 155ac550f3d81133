"""Fine-tune a causal language model on samples of any length.

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/sft.py --config my.yaml
    python recipes/sft.py --config my.yaml --learning_rate 1e-5

The file gives values to the fields of `RecipeArguments`, `transformers.TrainingArguments` and `hf_hetero.HeteroConfig`;
the command line overrides it. This script uses the public API only: copy it and change what you like.
"""

from __future__ import annotations

import argparse
import difflib
import glob
import json
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from inspect import formatannotation
from itertools import accumulate, takewhile
from pathlib import Path
from statistics import median_low as median
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import datasets
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer, Plan
from hf_hetero.callbacks import CalibrationCallback, PlanMetricsCallback
from hf_hetero.collators import PackedCollator
from hf_hetero.report import draw_plan, most_mixed, read_records, write_report

END = "<|endoftext|>"
IGNORED = -100  # the label of a token that is not learned
# no sets here, nor in what rows go through: their order changes from process to process, and `datasets` caches by it
PAIR = ("prompt", "completion")
MASKS = ("assistant_masks", "completion_mask")
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", *MASKS)
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass
class RecipeArguments:
    """What to train, and on what."""

    config: str | None = field(default=None, metadata={"help": "YAML file with values for any of these fields"})
    model: str | None = field(default=None, metadata={"help": "Local folder or hub name"})
    model_config: dict | str | None = field(default=None, metadata={"help": "Instead: a config to train from scratch"})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights; `bf16: true` computes in bf16"})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder, hub name, 'train'; default: the model's"})
    vocab_size: int = field(default=4096, metadata={"help": "Entries of a tokenizer that is trained"})
    dataset: str = field(default="python-stdlib", metadata={"help": "Hub name, saved folder, json/parquet/csv/txt"})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset"})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on"})
    text_column: str = field(default="text", metadata={"help": "Column of plain text"})
    assistant_only_loss: bool = field(default=False, metadata={"help": "Chats: learn only what the assistant says"})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a sample"})
    max_length_policy: Literal["error", "truncate", "split"] = field(
        default="error", metadata={"help": "For longer samples: stop, drop the rest, or make several samples of each"}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise"})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA adapters; without it, all weights train"})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linear layers"})
    calibrate: bool = field(default=False, metadata={"help": "Refit the cost model to measured steps on the way"})
    save_model: bool = field(default=True, metadata={"help": "Save the trained model under output_dir"})

    def __post_init__(self) -> None:
        """A YAML file may hold anything."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not fits(value, kind):
                raise HeteroError(f"{name}={value!r:.60}: it must be {formatannotation(kind)}.")
            if type(value) is int and value < 1:
                raise HeteroError(f"{name}={value}: it must be at least 1.")


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, get_args(kind)[0]) for item in value)
    return any(fits(value, one) for one in get_args(kind)) if get_args(kind) else type(value) is kind


# ------------------------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, TrainingArguments, HeteroConfig]:
    """Fields from the file after `--config`, then from the command line.

    Raises:
        HeteroError: a file that cannot be read, a value of another type, or a key that no dataclass has, with the one
            that was probably meant.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    parser = HfArgumentParser((RecipeArguments, TrainingArguments, HeteroConfig), allow_abbrev=False)
    parser.error = refuse
    known = set(vars(parser.parse_args([]))) - {"config"}
    if path:
        with explaining(f"Cannot read {path}"):
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise HeteroError(f"{path} holds {values!r:.60}; it must hold lines of `key: value`.")
        refuse_unknown(path, values, known)
        parser.set_defaults(**values)
    with explaining("These settings cannot be"):
        *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), True, look_for_args_file=False)
    refuse_unknown("the command line", [word.lstrip("-").split("=")[0] for word in unknown], known)
    return tuple(parsed)


def refuse(message: str) -> NoReturn:
    """In place of argparse's page of usage."""
    raise HeteroError(f"{message.rstrip('.')}. `python recipes/sft.py --help` says what can be.")


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Say in one line what failed within: files, libraries and the hub raise errors of many kinds."""
    try:
        yield
    except HeteroError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise HeteroError(f"{what}: {type(error).__name__}: {said:.300}") from error


def refuse_unknown(where: str, keys: Iterable[str], known: set[str]) -> None:
    """Raise for the first key that is not known, naming where it stands and the nearest one that is."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise HeteroError(f"{where}: unknown key {key!r}.{hint} `python recipes/sft.py --help` lists them all.")


def say(line: str) -> None:
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# ------------------------------------------------------------------------------------------------------------ data


def load_data(args: RecipeArguments) -> datasets.Dataset:
    """The dataset as it is found, one row a sample; a .txt file is one sample."""
    source = Path(args.dataset)
    if args.dataset == "python-stdlib":
        # the version is an argument because `datasets` caches by them
        return datasets.Dataset.from_generator(stdlib_files, gen_kwargs={"version": platform.python_version()})
    if any((source / name).exists() for name in ("state.json", "dataset_dict.json")):
        found = datasets.load_from_disk(args.dataset)
        if not isinstance(found, dict):
            return found
        if args.dataset_split not in found:
            raise HeteroError(f"dataset_split={args.dataset_split!r}: {args.dataset!r} has only {', '.join(found)}.")
        return found[args.dataset_split]
    if (file_format := FILE_FORMATS.get(source.suffix)) is not None:
        if not (files := sorted(glob.glob(args.dataset))):
            raise HeteroError(f"dataset={args.dataset!r}: there is no such file.")
        options = {"sample_by": "document"} if file_format == "text" else {}
        return datasets.load_dataset(file_format, data_files=files, split="train", **options)
    return datasets.load_dataset(args.dataset, args.dataset_config, split=args.dataset_split)


def stdlib_files(version: str) -> Iterator[dict[str, str]]:
    """Python's own standard library without its tests: on every machine, and of very different lengths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # a list, because a set's order changes from process to process, and with it the function's name in the cache
    left_out = ["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"]
    for path in sorted(root.rglob("*.py")):
        if not set(left_out) & set(path.relative_to(root).parts) and path.stat().st_size:
            yield {"text": path.read_text(encoding="utf-8", errors="replace")}


def tokenise(
    row: Mapping[str, Any], number: int, tokenizer: Any, text_column: str, assistant_only: bool
) -> dict[str, Any]:
    """`input_ids`, `length` in tokens, `labels` where not every token is learned, `seq_lengths` where rows are packed.

    Raises:
        HeteroError: what is wrong with the row, and its number.
    """
    try:
        with explaining("it cannot be tokenised, so mend it, or leave it out"):
            if "input_ids" in row:
                found = from_tokens(row)
            elif "messages" in row:
                found = from_chat(row, tokenizer, assistant_only)
            elif all(name in row for name in PAIR):
                found = from_pair(row, tokenizer, assistant_only)
            else:
                found = {"input_ids": encode(tokenizer, as_text(row, text_column), ends=True)}
            if not found["input_ids"]:
                raise HeteroError("it has no tokens. Filter empty samples out of the dataset.")
    except HeteroError as error:
        raise HeteroError(f"Row {number}: {error}") from error
    return {**found, "length": len(found["input_ids"])}


def from_tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens and labels as they are, less their padding, and the documents of a row that was packed."""
    columns = {name: row[name] for name in TOKEN_COLUMNS if name in row}
    for name, values in columns.items():
        if not isinstance(values, list) or not all(type(value) in (int, bool) for value in values):
            raise HeteroError(f"{name} is {values!r:.60}; it must be a list of whole numbers.")
        if len(values) != len(columns["input_ids"]):
            raise HeteroError(f"it has {len(columns['input_ids'])} input_ids, but {len(values)} {name}.")
    numbers = columns.get("attention_mask", [1] * len(columns["input_ids"]))
    at = [place for place, number in enumerate(numbers) if number]
    kept = {name: [values[place] for place in at] for name, values in columns.items()}
    found = {"input_ids": kept["input_ids"]}
    masks = [kept[name] for name in MASKS if name in kept]
    if "labels" in kept or masks:
        found["labels"] = kept["labels"] if "labels" in kept else learned(kept["input_ids"], masks)
    if any(name in row for name in ("seq_lengths", "position_ids", "attention_mask")):
        found["seq_lengths"] = documents(at, kept, row.get("seq_lengths"))
    return found


def documents(at: list[int], kept: Mapping[str, list[int]], stated: list[int] | None) -> list[int]:
    """Tokens of each document of a row: as stated, or else between the marks that other packers leave.

    A document starts where `position_ids` begin anew, or where `attention_mask` goes on with another number.

    Args:
        at: places of the row that are no padding.
        kept: what the columns hold there.
        stated: `seq_lengths`, if there are any.
    """
    positions, numbers = kept.get("position_ids"), kept.get("attention_mask", [1] * len(at))
    starts: list[int] = []
    for i in range(len(at)):
        if not i or numbers[i] != numbers[i - 1] or (positions and positions[i] != positions[i - 1] + 1):
            starts.append(i)
            if positions and positions[i] != 0:
                raise HeteroError(f"position_ids of token {at[i]} is {positions[i]}; a document's count 0, 1, 2, ...")
        elif at[i] != at[i - 1] + 1:
            raise HeteroError(f"its attention_mask leaves out token {at[i] - 1}, amid others.")
    marked = [end - start for start, end in zip(starts, [*starts[1:], len(at)], strict=True)]
    if stated is None:
        return marked
    if sum(stated) != len(at) or min(stated) < 1 or (len(marked) > 1 and marked != stated):
        raise HeteroError(f"its seq_lengths are {stated!s:.60}, and its documents have {marked!s:.60} tokens.")
    return stated


def from_chat(row: Mapping[str, Any], tokenizer: Any, assistant_only: bool) -> dict[str, Any]:
    """`messages` under the chat template; of them, on request, only what the assistant says is learned."""
    chat = as_chat(row, "messages")
    encoded = under_template(row, chat, tokenizer, return_assistant_tokens_mask=assistant_only)
    found = {"input_ids": encoded["input_ids"]}
    return {**found, "labels": said_by_assistant(chat, encoded)} if assistant_only else found


def from_pair(row: Mapping[str, Any], tokenizer: Any, assistant_only: bool) -> dict[str, Any]:
    """`prompt` and `completion`, texts or chats: only what does not begin as the prompt alone does is learned."""
    if list in (type(row["prompt"]), type(row["completion"])):
        asked, answered = as_chat(row, "prompt"), as_chat(row, "completion")
        prompt = under_template(row, asked, tokenizer, add_generation_prompt=True)["input_ids"]
        found = from_chat({**row, "messages": asked + answered}, tokenizer, assistant_only)
    else:
        asked, answered = as_text(row, "prompt"), as_text(row, "completion")
        prompt = encode(tokenizer, asked)
        found = {"input_ids": encode(tokenizer, asked + answered, ends=True)}
    ids = found["input_ids"]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
    return {**found, "labels": [IGNORED] * same + found.get("labels", ids)[same:]}


def encode(tokenizer: Any, text: str, ends: bool = False) -> list[int]:
    """Tokens of a text, with one end token if it is to end."""
    ids = tokenizer(text, verbose=False)["input_ids"]  # its length is checked later, in words
    ended = not ends or tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id]
    return ids if ended else [*ids, tokenizer.eos_token_id]


def under_template(row: Mapping[str, Any], chat: list[Any], tokenizer: Any, **options: Any) -> Any:
    """A chat as the template makes it, with the `tools` and `chat_template_kwargs` of its row, as in TRL."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    # a table fills up with None what other rows set
    settings = {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
    return tokenizer.apply_chat_template(chat, return_dict=True, **{"tools": tools, **settings, **options})


def said_by_assistant(chat: list[Any], encoded: Mapping[str, list[int]]) -> list[int]:
    """Labels of what the template marks as the assistant's."""
    if not any(encoded["assistant_masks"]) and any(m["role"] == "assistant" and m.get("content") for m in chat):
        raise HeteroError(
            "the chat template does not mark what the assistant says, so assistant_only_loss would learn nothing. Put "
            "{% generation %} before it and {% endgeneration %} after it in the tokenizer's chat_template."
        )
    return learned(encoded["input_ids"], [encoded["assistant_masks"]])


def learned(ids: list[int], masks: list[list[int]]) -> list[int]:
    """Labels: the tokens that every mask lets through."""
    return [token if all(let) else IGNORED for token, *let in zip(ids, *masks, strict=True)]


def as_text(row: Mapping[str, Any], column: str) -> str:
    """The text of a column."""
    if not isinstance(row[column], str):
        raise HeteroError(f"{column} is {row[column]!r:.60}; it must be text.")
    return row[column]


def as_chat(row: Mapping[str, Any], column: str) -> list[Any]:
    """The messages of a column."""
    chat = row[column]
    if not isinstance(chat, list) or not chat:
        raise HeteroError(f"{column} is {chat!r:.60}; it must be a list of messages.")
    for number, m in enumerate(chat):
        if not isinstance(m, dict) or not m.get("role") or not (m.get("content") is not None or m.get("tool_calls")):
            raise HeteroError(
                f"message {number} of {column} is {m!r:.60}; it must have a role, and content or tool_calls."
            )
    return chat


def prepare_data(args: RecipeArguments, data: datasets.Dataset, tokenizer: Any) -> datasets.Dataset:
    """Tokenised samples of at most `max_length` tokens. What was done about longer ones is printed.

    Raises:
        HeteroError: nothing to train on, a row that cannot be tokenised, or samples longer than `max_length` under the
            policy "error".
    """
    check_columns(args, data, tokenizer)
    # only what changes the tokens, because `datasets` caches by these arguments
    options = {"tokenizer": tokenizer, "text_column": args.text_column, "assistant_only": args.assistant_only_loss}
    data = data.with_format(None).map(
        tokenise,
        with_indices=True,
        fn_kwargs=options,
        remove_columns=data.column_names,
        num_proc=args.num_proc,
        desc="Tokenising",
    )
    if "seq_lengths" in data.column_names and all(len(row) == 1 for row in data["seq_lengths"]):
        data = data.remove_columns("seq_lengths")  # nothing was packed
    data = limit_lengths(args, data)
    if "labels" in data.column_names and not any(set(labels[1:]) - {IGNORED} for labels in data["labels"]):
        raise HeteroError(
            f"dataset={args.dataset!r}: no token of its {len(data)} rows is to be learned. Labels other than {IGNORED} "
            "are, or a completion; under assistant_only_loss, what an assistant says within {% generation %} of the "
            "chat template; and of them only what is within max_length."
        )
    lengths = [tokens for row in sample_lengths(data) for tokens in row]
    say(f"{len(lengths):,} samples, {sum(lengths):,} tokens; median {median(lengths):,}, longest {max(lengths):,}")
    return data


def check_columns(args: RecipeArguments, data: datasets.Dataset, tokenizer: Any) -> None:
    """Refuse data without rows, without a column to train on, or without what the columns there need."""
    columns = set(data.column_names)
    if not len(data):
        raise HeteroError(f"dataset={args.dataset!r} has no rows in its split {args.dataset_split!r}.")
    if not {"input_ids", "messages", args.text_column} & columns and not columns >= set(PAIR):
        raise HeteroError(
            f"dataset={args.dataset!r} has no 'input_ids', 'messages' or {args.text_column!r} column, only "
            f"{data.column_names}, and no 'prompt' with its 'completion'. Name the column of plain text: text_column."
        )
    if "input_ids" in columns:
        chats = "assistant_masks" in columns
    else:
        pairs_of_chats = columns >= set(PAIR) and isinstance(data.with_format(None)[0]["prompt"], list)
        chats = "messages" in columns or pairs_of_chats
        if chats and tokenizer.chat_template is None:
            raise HeteroError(
                f"dataset={args.dataset!r} holds chats, and the tokenizer has no chat template. Name a tokenizer that "
                "has one, or give it one: a file chat_template.jinja in its folder."
            )
    if args.assistant_only_loss and not chats:
        raise HeteroError(
            f"assistant_only_loss={args.assistant_only_loss}, but dataset={args.dataset!r} has no 'messages' and no "
            f"'assistant_masks', only {data.column_names}. Give it one of them, or leave assistant_only_loss out."
        )


def sample_lengths(data: datasets.Dataset) -> list[list[int]]:
    """Tokens of the samples of each row: its documents where rows are packed, else itself."""
    return data["seq_lengths"][:] if "seq_lengths" in data.column_names else [[tokens] for tokens in data["length"][:]]


def truncate(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The first `limit` tokens of a sample, or of each document of a packed row, and what is left in all."""
    parts = row.get("seq_lengths") or [row["length"]]
    spans = [(end - part, end - part + min(part, limit)) for part, end in zip(parts, accumulate(parts), strict=True)]
    names = [name for name in ("input_ids", "labels") if name in row]
    found = {name: [x for start, end in spans for x in row[name][start:end]] for name in names}
    if "seq_lengths" in row:
        found["seq_lengths"] = [end - start for start, end in spans]
    return {**found, "length": len(found["input_ids"])}


def limit_lengths(args: RecipeArguments, data: datasets.Dataset) -> datasets.Dataset:
    """Data whose samples have at most `max_length` tokens, as far as that is done here: `HeteroTrainer` splits."""
    limit, rows = args.max_length, sample_lengths(data)
    lengths = [tokens for row in rows for tokens in row]
    if limit is None or max(lengths) <= limit:
        return data
    longer = [length for length in lengths if length > limit]
    what = f"{len(longer)} of {len(lengths)} samples have more than max_length={limit} tokens"
    if args.dataset == "python-stdlib":
        if len(longer) == len(lengths):
            raise HeteroError(f"{what}, so none is left. Raise max_length.")
        say(f"{what} and are left out of this corpus.")
        return data.select([row for row, (length,) in enumerate(rows) if length <= limit])
    if args.max_length_policy == "split":
        say(f"{what} and will be split.")
        return data
    if args.max_length_policy == "truncate":
        say(f"{what}; {sum(longer) - limit * len(longer):,} tokens are cut off them.")
        return data.map(truncate, fn_kwargs={"limit": limit}, num_proc=args.num_proc, desc="Truncating")
    longest = max(range(len(rows)), key=lambda row: max(rows[row]))
    raise HeteroError(
        f"{what}; the longest, row {longest}, has {max(rows[longest])}. "
        "Raise max_length, or cut them: max_length_policy: truncate, or split."
    )


# ----------------------------------------------------------------------------------------------- tokenizer and model


def load_tokenizer(args: RecipeArguments, data: datasets.Dataset) -> Any:
    """The tokenizer named, or one made of the dataset's text and kept in the user's cache; None if none is needed."""
    if args.tokenizer != "train":
        if (name := args.tokenizer or args.model) is not None:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if "input_ids" in data.column_names:
            return None
        raise HeteroError("Name a tokenizer (a folder or a hub name), or make one of the dataset: tokenizer: train.")
    if args.text_column not in data.column_names:
        raise HeteroError(
            f"tokenizer: train needs a column of text, and {args.text_column!r} is none of {data.column_names}."
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_hetero"
    folder = cache / f"tokenizer-{args.vocab_size}-{args.text_column}-{data._fingerprint}"
    if not folder.exists():
        say(f"Making a tokenizer of {args.vocab_size} entries, once.")
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator((text for text in data[args.text_column] if isinstance(text, str)), trainer)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as new, suppress(OSError):
            PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END).save_pretrained(f"{new}/whole")
            os.rename(f"{new}/whole", folder)  # fails if another run was faster, which is as good
    return AutoTokenizer.from_pretrained(folder)


def load_model(args: RecipeArguments, tokenizer: Any) -> Any:
    """The model named, or a new one with random weights; with adapters if `lora_r` is set."""
    if (args.model is None) == (args.model_config is None):
        raise HeteroError("Set one of `model` (a folder or a hub name) and `model_config` (train from scratch).")
    if args.model is not None:
        # said outright, because transformers would ask at the terminal, and ranks have none
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, trust_remote_code=False)
    else:
        shape = json.loads(args.model_config) if isinstance(args.model_config, str) else dict(args.model_config)
        if tokenizer is not None:
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            shape = {"vocab_size": len(tokenizer), **ids, **shape}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=args.dtype)
    if args.lora_r is None:
        return model
    targets = args.lora_target_modules or "all-linear"
    lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


# ------------------------------------------------------------------------------------------------------------- run


def main(argv: Sequence[str]) -> None:
    """Load, train, save, draw."""
    args, training_args, hetero = parse(argv)
    set_seed(training_args.seed)
    # the first rank downloads and fills the caches, which the others then read
    with training_args.main_process_first(desc="data"):
        with explaining(f"Cannot load dataset={args.dataset!r}"):
            data = load_data(args)
        with explaining(f"Cannot load tokenizer={args.tokenizer or args.model!r}"):
            tokenizer = load_tokenizer(args, data)
        data = prepare_data(args, data, tokenizer)
    if args.max_length_policy == "split":
        hetero = replace(hetero, max_sample_tokens=args.max_length, longer_samples="split")
    watching = [PlanMetricsCallback(lines=True, record=True), *([CalibrationCallback()] if args.calibrate else [])]
    with explaining("Cannot make the model"):
        model = load_model(args, tokenizer)
    trainer = HeteroTrainer(
        model=model,
        args=training_args,
        train_dataset=data,
        data_collator=PackedCollator(),  # rows without labels learn every token
        processing_class=tokenizer,
        callbacks=watching,
        hetero=hetero,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if args.save_model:
        if trainer.is_fsdp_enabled:  # checkpoints may be in parts; what others load must not be
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
    if trainer.is_world_process_zero():
        draw(Path(training_args.output_dir), trainer.cost_model)


def draw(folder: Path, cost_model: Any) -> None:
    """The run as a page, and one of its steps as a picture."""
    records = read_records(folder / "plans.jsonl")
    try:
        write_report(records, folder / "report.html", cost_model)
        step = most_mixed(records)
        for name in ("step.png", "step.svg"):
            draw_plan(Plan.from_dict(step["plan"]), step["lengths"], cost_model, folder / name)
    except HeteroError as error:  # no matplotlib: the run itself is done
        say(f"No pictures: {error}")
    else:
        say(f"Wrote {folder / 'report.html'} (the run), {folder / 'step.png'} and .svg (step {step['step']}).")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HeteroError as error:  # it says what to change, which no traceback does
        sys.exit(f"{Path(__file__).name}: {error}")
