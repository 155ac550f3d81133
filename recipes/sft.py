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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low as median
from typing import Any, Literal

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


# ------------------------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, TrainingArguments, HeteroConfig]:
    """Fields from the file after `--config`, then from the command line.

    Raises:
        HeteroError: a key that no dataclass has, with the one that was probably meant.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    parser = HfArgumentParser((RecipeArguments, TrainingArguments, HeteroConfig), allow_abbrev=False)
    known = set(vars(parser.parse_args([]))) - {"config"}
    if path:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        refuse_unknown(path, values, known)
        parser.set_defaults(**values)
    *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), True, look_for_args_file=False)
    refuse_unknown("the command line", [word.lstrip("-").split("=")[0] for word in unknown], known)
    return tuple(parsed)


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
        return found[args.dataset_split] if isinstance(found, dict) else found
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


def tokenise(row: Mapping[str, Any], tokenizer: Any, text_column: str, assistant_only: bool) -> dict[str, Any]:
    """`input_ids`, `length` in tokens, and `labels` where not every token is learned.

    A row with `input_ids` stays as it is, less its padding; `messages` go through the chat template; plain text gets an
    end token.
    """
    if "input_ids" in row:
        kept = row.get("attention_mask") or [1] * len(row["input_ids"])
        columns = [name for name in ("input_ids", "labels") if name in row]
        found = {name: [x for x, keep in zip(row[name], kept, strict=True) if keep] for name in columns}
    elif "messages" in row:
        masked = {"return_dict": True, "return_assistant_tokens_mask": assistant_only}
        encoded = tokenizer.apply_chat_template(row["messages"], **masked)
        found = {"input_ids": encoded["input_ids"]}
        if assistant_only:
            said = zip(found["input_ids"], encoded["assistant_masks"], strict=True)
            found["labels"] = [token if by_assistant else -100 for token, by_assistant in said]
    else:
        ids = tokenizer(row[text_column], verbose=False)["input_ids"]  # its length is checked below, in words
        ends = tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id]
        found = {"input_ids": ids if ends else [*ids, tokenizer.eos_token_id]}
    return {**found, "length": len(found["input_ids"])}


def truncate(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The first `limit` tokens of a sample, and its length."""
    return {name: min(value, limit) if name == "length" else value[:limit] for name, value in row.items()}


def prepare_data(args: RecipeArguments, data: datasets.Dataset, tokenizer: Any) -> datasets.Dataset:
    """Tokenised samples of at most `max_length` tokens. What was done about longer ones is printed.

    Raises:
        HeteroError: no column to train on, or samples longer than `max_length` under the policy "error".
    """
    columns = data.column_names
    if not {"input_ids", "messages", args.text_column} & set(columns):
        raise HeteroError(
            f"dataset={args.dataset!r} has no 'input_ids', 'messages' or {args.text_column!r} column, only {columns}. "
            "Name the column of plain text: text_column."
        )
    # only what changes the tokens, because `datasets` caches by these arguments
    options = {"tokenizer": tokenizer, "text_column": args.text_column, "assistant_only": args.assistant_only_loss}
    data = data.map(tokenise, fn_kwargs=options, remove_columns=columns, num_proc=args.num_proc, desc="Tokenising")
    limit, lengths = args.max_length, data["length"][:]
    if limit is not None and max(lengths) > limit:
        longer = [row for row, length in enumerate(lengths) if length > limit]
        what = f"{len(longer)} of {len(lengths)} samples have more than max_length={limit} tokens"
        if args.dataset == "python-stdlib":
            say(f"{what} and are left out of this corpus.")
            data = data.select([row for row, length in enumerate(lengths) if length <= limit])
        elif args.max_length_policy == "split":
            say(f"{what} and will be split.")
        elif args.max_length_policy == "truncate":
            say(f"{what}; {sum(lengths[row] - limit for row in longer):,} tokens are cut off them.")
            data = data.map(truncate, fn_kwargs={"limit": limit}, num_proc=args.num_proc, desc="Truncating")
        else:
            raise HeteroError(
                f"{what}; the longest, row {lengths.index(max(lengths))}, has {max(lengths)}. "
                "Raise max_length, or cut them: max_length_policy: truncate, or split."
            )
    lengths = data["length"][:]
    say(f"{len(lengths):,} samples, {sum(lengths):,} tokens; median {median(lengths):,}, longest {max(lengths):,}")
    return data


# ----------------------------------------------------------------------------------------------- tokenizer and model


def load_tokenizer(args: RecipeArguments, data: datasets.Dataset) -> Any:
    """The tokenizer named, or one made of the dataset's text and kept in the user's cache; None if none is needed."""
    if args.tokenizer != "train":
        if (name := args.tokenizer or args.model) is not None:
            return AutoTokenizer.from_pretrained(name)
        if "input_ids" in data.column_names:
            return None
        raise HeteroError("Name a tokenizer (a folder or a hub name), or make one of the dataset: tokenizer: train.")
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
        made.train_from_iterator((row[args.text_column] for row in data), trainer)
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
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
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
        data = load_data(args)
        tokenizer = load_tokenizer(args, data)
        data = prepare_data(args, data, tokenizer)
    if args.max_length_policy == "split":
        hetero = replace(hetero, max_sample_tokens=args.max_length, longer_samples="split")
    watching = [PlanMetricsCallback(lines=True, record=True), *([CalibrationCallback()] if args.calibrate else [])]
    trainer = HeteroTrainer(
        model=load_model(args, tokenizer),
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
    main(sys.argv[1:])
