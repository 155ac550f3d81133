"""Fine-tune a model to tell classes of documents, or of words, or how relevant a passage is, at any length.

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/classify.py --config my.yaml
    python recipes/classify.py --config my.yaml --learning_rate 1e-5

The file gives values to the fields of `RecipeArguments`, `transformers.TrainingArguments` and `hf_hetero.HeteroConfig`;
the command line overrides it. This script uses the public API only: copy it and change what you like.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low as median
from typing import Any, Literal

import datasets
import numpy as np
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer, __version__
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.fine_tuning import check_fields, explaining, load_rows, parse_settings
from hf_hetero.report import read_records, write_report

IGNORED = -100  # the label of what is not learned
PROBLEMS = {  # what labels are -> transformers' name of the problem
    "class": "single_label_classification",
    "classes": "multi_label_classification",
    "number": "regression",
    "relevance": "multi_label_classification",
    "words": None,
}


@dataclass
class RecipeArguments:
    """What to train, and on what."""

    config: str | None = field(default=None, metadata={"help": "YAML file with values for any of these fields"})
    model: str | None = field(default=None, metadata={"help": "Local folder or hub name of a decoder"})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights; `bf16: true` computes in bf16"})
    labels: Literal["class", "classes", "number", "relevance", "words"] = field(
        default="class",
        metadata={
            "help": "class: one of several. classes: a list of those that apply. number: is predicted. relevance: 0 to "
            "1, of a pair of texts (a reranker). words: a list, of the words in a list"
        },
    )
    dataset: str = field(default="", metadata={"help": "Hub name, saved folder, json/parquet/csv"})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset"})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on"})
    eval_dataset: str | None = field(default=None, metadata={"help": "What is evaluated on; its split: eval_split"})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on"})
    text_column: str = field(default="text", metadata={"help": "Column of text, or of lists of words"})
    pair_column: str | None = field(default=None, metadata={"help": "Column of a second text: query, then passage"})
    label_column: str = field(default="label", metadata={"help": "Column of labels: names, or numbers"})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a sample"})
    max_length_policy: Literal["error", "truncate"] = field(
        default="error", metadata={"help": "For longer samples: stop, or drop the rest"}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise"})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA adapters; without it, all weights train"})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linear layers"})
    save_model: bool = field(default=True, metadata={"help": "Save the trained model under output_dir"})

    def __post_init__(self) -> None:
        """A YAML file may hold anything."""
        check_fields(self)


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, TrainingArguments, HeteroConfig]:
    """Fields from the file after `--config`, then from the command line."""
    return parse_settings(argv, (RecipeArguments, TrainingArguments, HeteroConfig), "recipes/classify.py")


def say(line: str) -> None:
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# ------------------------------------------------------------------------------------------------------------ data


def load_data(args: RecipeArguments, name: str, split: str) -> datasets.Dataset:
    """The dataset as it is found, with the columns that are needed.

    Raises:
        HeteroError: there is none, or a column is missing.
    """
    if not name:
        raise HeteroError("Name a dataset: a file (json, parquet, csv), a save_to_disk folder, or a hub name.")
    data = load_rows(name, args.dataset_config, split).with_format(None)
    needed = [args.text_column, args.label_column, *([args.pair_column] if args.pair_column else [])]
    if missing := [column for column in needed if column not in data.column_names]:
        raise HeteroError(
            f"dataset={name!r} has no column {missing[0]!r}, only {data.column_names}. Name its columns: text_column, "
            "label_column, and pair_column where there are two texts."
        )
    if not len(data):
        raise HeteroError(f"dataset={name!r} has no rows in its split {split!r}.")
    return data


def class_names(args: RecipeArguments, data: datasets.Dataset) -> list[str]:
    """The names of all classes, in the order of their numbers; one without a name where a number is learned."""
    if args.labels in ("number", "relevance"):
        return ["LABEL_0"]
    feature: Any = data.features[args.label_column]
    feature = getattr(feature, "feature", feature)  # of a list, its items'
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    found: set[Any] = set()
    for label in data[args.label_column]:
        found.update(label if isinstance(label, list) else [label])
    found -= {IGNORED, None}
    if all(type(label) is int for label in found):
        return [f"LABEL_{number}" for number in range(max(found, default=0) + 1)]
    return sorted(map(str, found))


def prepare(
    row: Mapping[str, Any], tokenizer: Any, names: Sequence[str], args: Mapping[str, Any], version: str
) -> dict[str, Any]:
    """Tokens and labels of a row.

    Args:
        row: with a text, or two, or a list of words.
        tokenizer: of the model.
        names: of the classes.
        args: of the recipe, those that matter: `datasets` caches by them.
        version: of the package, for the same reason.
    """
    text, pair, given = row[args["text_column"]], args["pair_column"], row[args["label_column"]]
    numbers = {name: number for number, name in enumerate(names)}

    def number_of(label: Any) -> int:
        return label if type(label) is int else IGNORED if label is None else numbers[str(label)]

    options: dict[str, Any] = {"truncation": args["truncates"], "max_length": args["max_length"]}
    if args["labels"] == "words":
        encoded = tokenizer(text, is_split_into_words=True, **options)
        words, labels = encoded.word_ids(), [number_of(label) for label in given]
        # a word is learned at its first token
        firsts = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        labels = [labels[word] if first else IGNORED for word, first in zip(words, firsts, strict=True)]
    else:
        encoded = tokenizer(text, row[pair] if pair else None, **options)
        if args["labels"] == "class":
            labels = number_of(given)
        elif args["labels"] == "classes":
            labels = [float(number in set(map(number_of, given))) for number in range(len(names))]
        else:
            labels = float(given)
    return {"input_ids": encoded["input_ids"], "labels": labels, "length": len(encoded["input_ids"])}


def prepare_data(
    args: RecipeArguments, data: datasets.Dataset, tokenizer: Any, names: Sequence[str]
) -> datasets.Dataset:
    """Rows of tokens and labels, of at most `max_length` tokens.

    Raises:
        HeteroError: a row that cannot be tokenised, or one that is longer under the policy "error".
    """
    truncates = args.max_length_policy == "truncate" and args.max_length is not None
    kept = {name: getattr(args, name) for name in ("text_column", "pair_column", "label_column", "labels")}
    kept |= {"truncates": truncates, "max_length": args.max_length if truncates else None}
    with explaining(f"A row of dataset={args.dataset!r} cannot be prepared, so mend it, or leave it out"):
        data = data.map(
            prepare,
            fn_kwargs={"tokenizer": tokenizer, "names": list(names), "args": kept, "version": __version__},
            remove_columns=data.column_names,
            num_proc=args.num_proc,
            desc="Tokenising",
        )
    lengths = data["length"][:]
    if args.max_length is not None and max(lengths) > args.max_length:
        raise HeteroError(
            f"Row {lengths.index(max(lengths))} has {max(lengths)} tokens, more than max_length={args.max_length}. "
            "Raise max_length, or cut such rows: max_length_policy: truncate."
        )
    say(f"{len(lengths):,} samples, {sum(lengths):,} tokens; median {median(lengths):,}, longest {max(lengths):,}")
    return data


# ----------------------------------------------------------------------------------------------------------- model


def load_model(args: RecipeArguments, tokenizer: Any, names: Sequence[str]) -> Any:
    """The model with a head of these classes; with adapters if `lora_r` is set."""
    of_words = args.labels == "words"
    # said outright, because transformers would ask at the terminal, and ranks have none
    config: Any = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = PROBLEMS[args.labels]
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    kind: Any = AutoModelForTokenClassification if of_words else AutoModelForSequenceClassification
    model = kind.from_pretrained(args.model, config=config, dtype=args.dtype, trust_remote_code=False)
    if args.lora_r is None:
        return model
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=args.lora_target_modules or "all-linear",
        exclude_modules=["score"],  # the head is trained whole
        task_type="TOKEN_CLS" if of_words else "SEQ_CLS",
    )
    return get_peft_model(model, lora)


def metrics_of(labels: str) -> Callable[[Any], dict[str, float]]:
    """What an evaluation tells beside the loss: the share that is right, or the error of numbers."""

    def metrics(prediction: Any) -> dict[str, float]:
        scores, expected = prediction.predictions, prediction.label_ids
        if labels == "number":
            return {"mean_squared_error": float(np.mean((scores[:, 0] - expected) ** 2))}
        if labels in ("class", "words"):
            counted = expected != IGNORED
            return {"accuracy": float(np.mean(scores.argmax(-1)[counted] == expected[counted]))}
        return {"accuracy": float(np.mean((scores > 0) == (expected > 0.5)))}

    return metrics


# ------------------------------------------------------------------------------------------------------------- run


def main(argv: Sequence[str]) -> None:
    """Load, train, evaluate, save, draw."""
    args, training_args, hetero = parse(argv)
    if args.model is None:
        raise HeteroError("Set `model`: a folder or a hub name of a decoder, such as Qwen/Qwen3-0.6B.")
    set_seed(training_args.seed)
    evaluated: datasets.Dataset | None = None
    # the first rank downloads and fills the caches, which the others then read
    with training_args.main_process_first(desc="data"):
        with explaining(f"Cannot load tokenizer={args.model!r}"):
            tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        with explaining(f"Cannot load dataset={args.dataset!r}"):
            data = load_data(args, args.dataset, args.dataset_split)
        names = class_names(args, data)
        data = prepare_data(args, data, tokenizer, names)
        if args.eval_dataset is not None:
            with explaining(f"Cannot load eval_dataset={args.eval_dataset!r}"):
                evaluated = load_data(args, args.eval_dataset, args.eval_split)
            evaluated = prepare_data(args, evaluated, tokenizer, names)
    with explaining("Cannot make the model"):
        model = load_model(args, tokenizer, names)
    trainer = HeteroTrainer(
        model=model,
        args=training_args,
        train_dataset=data,
        eval_dataset=evaluated,
        compute_metrics=metrics_of(args.labels),
        processing_class=tokenizer,
        callbacks=[PlanMetricsCallback(lines=True, record=True)],
        hetero=hetero,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if evaluated is not None:
        found = trainer.evaluate()
        trainer.save_metrics("eval", found)
        say(", ".join(f"{name} {value:.4g}" for name, value in found.items() if name.startswith("eval_")))
    if args.save_model:
        if trainer.is_fsdp_enabled:  # checkpoints may be in parts; what others load must not be
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        write_report(read_records(folder / "plans.jsonl"), folder / "report.html", trainer.cost_model)
        say(f"Wrote {folder / 'report.html'}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HeteroError as error:  # it says what to change, which no traceback does
        sys.exit(f"{Path(__file__).name}: {error}")
