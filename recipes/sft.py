"""Fine-tune a causal language model on samples of any length.

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/sft.py --config my.yaml
    python recipes/sft.py --config my.yaml --learning_rate 1e-5

The file gives values to the fields of `RecipeArguments`, `transformers.TrainingArguments` and `hf_hetero.HeteroConfig`;
the command line overrides it. This script uses the public API only: copy it and change what you like.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low as median
from typing import Any, Literal

import datasets
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer, Plan, __version__
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.collators import PackedCollator
from hf_hetero.fine_tuning import (
    ImageChats,
    check_columns,
    check_fields,
    counted_chats,
    explaining,
    has_images,
    load_rows,
    make_tokenizer,
    parse_settings,
    sample_lengths,
    tokenise,
    truncate,
)
from hf_hetero.report import draw_plan, most_mixed, read_records, report_run

IGNORED = -100  # the label of a token that is not learned


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
    save_model: bool = field(default=True, metadata={"help": "Save the trained model under output_dir"})

    def __post_init__(self) -> None:
        """A YAML file may hold anything."""
        check_fields(self)


# ------------------------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, TrainingArguments, HeteroConfig]:
    """Fields from the file after `--config`, then from the command line."""
    return parse_settings(argv, (RecipeArguments, TrainingArguments, HeteroConfig), "recipes/sft.py")


def say(line: str) -> None:
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# ------------------------------------------------------------------------------------------------------------ data


def load_data(args: RecipeArguments) -> datasets.Dataset:
    """The dataset as it is found, one row a sample; a .txt file is one sample."""
    if args.dataset == "python-stdlib":
        # the version is an argument because `datasets` caches by them
        return datasets.Dataset.from_generator(stdlib_files, gen_kwargs={"version": platform.python_version()})
    return load_rows(args.dataset, args.dataset_config, args.dataset_split)


def stdlib_files(version: str) -> Iterator[dict[str, str]]:
    """Python's own standard library without its tests: on every machine, and of very different lengths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # a list, because a set's order changes from process to process, and with it the function's name in the cache
    left_out = ["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"]
    for path in sorted(root.rglob("*.py")):
        if not set(left_out) & set(path.relative_to(root).parts) and path.stat().st_size:
            yield {"text": path.read_text(encoding="utf-8", errors="replace")}


def prepare_data(
    args: RecipeArguments,
    data: datasets.Dataset,
    tokenizer: Any,
    weight_column: str | None = None,
    source_column: str | None = None,
) -> datasets.Dataset:
    """Tokenised samples of at most `max_length` tokens, with their weights and sources.

    What was done about longer ones is printed.

    Raises:
        HeteroError: nothing to train on, a row that cannot be tokenised, or samples longer than `max_length` under the
            policy "error".
    """
    if has_images(data):
        return prepare_images(args, data, tokenizer)
    check_columns(
        data, tokenizer, args.text_column, args.assistant_only_loss, name=args.dataset, split=args.dataset_split
    )
    # only what changes the tokens, because `datasets` caches by these arguments
    options = {"tokenizer": tokenizer, "text_column": args.text_column, "assistant_only": args.assistant_only_loss}
    options["version"] = __version__
    if not sys.stderr.isatty():  # bars are for terminals; a log takes a line
        datasets.disable_progress_bars()
        say(f"Tokenising {len(data):,} rows.")
    data = data.with_format(None).map(
        tokenise,
        with_indices=True,
        fn_kwargs=options,
        remove_columns=[name for name in data.column_names if name not in (weight_column, source_column)],
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


def prepare_images(args: RecipeArguments, data: datasets.Dataset, processor: Any) -> datasets.Dataset:
    """Chats with images, as they are, with a column of how many tokens each has; none is cut."""
    collate = ImageChats(processor, args.assistant_only_loss)
    data = counted_chats(data, collate, Path(args.dataset).parent, args.max_length, args.num_proc)
    say(f"{len(data):,} samples with images, {sum(data['length'][:]):,} tokens")
    return data


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
            if has_images(data):
                return AutoProcessor.from_pretrained(name, trust_remote_code=False)
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
        make_tokenizer((text for text in data[args.text_column] if isinstance(text, str)), args.vocab_size, folder)
    return AutoTokenizer.from_pretrained(folder)


def load_model(args: RecipeArguments, tokenizer: Any) -> Any:
    """The model named, or a new one with random weights; with adapters if `lora_r` is set."""
    if (args.model is None) == (args.model_config is None):
        raise HeteroError("Set one of `model` (a folder or a hub name) and `model_config` (train from scratch).")
    if args.model is not None:
        # said outright, because transformers would ask at the terminal, and ranks have none
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        model = auto_class(config).from_pretrained(args.model, dtype=args.dtype, trust_remote_code=False)
    else:
        shape = json.loads(args.model_config) if isinstance(args.model_config, str) else dict(args.model_config)
        if tokenizer is not None:
            ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            shape = {"vocab_size": len(tokenizer), **ids, **shape}
        config = AutoConfig.for_model(**shape)
        model = auto_class(config).from_config(config, dtype=args.dtype)
    if args.lora_r is None:
        return model
    targets = args.lora_target_modules or "all-linear"
    lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # of its own use of transformers, which nobody here can change
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, lora)


def auto_class(config: Any) -> Any:
    """What loads a language model: as one that sees images, where transformers knows it only so."""
    sees = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


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
        data = prepare_data(args, data, tokenizer, hetero.weight_column, hetero.source_column)
    if args.max_length_policy == "split":
        hetero = replace(hetero, max_sample_tokens=args.max_length, longer_samples="split")
    with explaining("Cannot make the model"):
        model = load_model(args, getattr(tokenizer, "tokenizer", tokenizer))
    collate = None
    if has_images(data):  # what its rows are made of is no input of the model
        collate, training_args.remove_unused_columns = ImageChats(tokenizer, args.assistant_only_loss), False
    trainer = HeteroTrainer(
        model=model,
        args=training_args,
        train_dataset=data,
        data_collator=PackedCollator(collate),  # rows without labels learn every token
        processing_class=tokenizer,
        callbacks=[PlanMetricsCallback(lines=True, record=True)],
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
    step = most_mixed(read_records(folder))
    report_run(folder, folder / "report.html", cost_model)
    try:
        for name in ("step.png", "step.svg"):
            draw_plan(Plan.from_dict(step["plan"]), step["lengths"], cost_model, folder / name)
    except HeteroError as error:  # no matplotlib: the run itself is done
        say(f"Wrote {folder / 'report.html'} (the run). No pictures: {error}")
    else:
        say(f"Wrote {folder / 'report.html'} (the run), {folder / 'step.png'} and .svg (step {step['step']}).")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HeteroError as error:  # it says what to change, which no traceback does
        sys.exit(f"{Path(__file__).name}: {error}")
