"""Learn from preference pairs of any length: DPO, and the other losses of TRL's DPOTrainer.

    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/dpo.py --config my.yaml
    python recipes/dpo.py --config my.yaml --beta 0.05

The file gives values to the fields of `RecipeArguments`, `trl.DPOConfig` and `hf_hetero.HeteroConfig`; the command line
overrides it. This script uses the public API only: copy it and change what you like.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig

from hf_hetero import HeteroConfig, HeteroDPOTrainer, HeteroError
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.fine_tuning import check_fields, explaining, load_rows, parse_settings
from hf_hetero.report import read_records, write_report

PAIR = ("chosen", "rejected")


@dataclass
class RecipeArguments:
    """What to train, and on what."""

    config: str | None = field(default=None, metadata={"help": "YAML file with values for any of these fields"})
    model: str | None = field(default=None, metadata={"help": "Local folder or hub name"})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or hub name; default: the model's"})
    dataset: str | None = field(default=None, metadata={"help": "Hub name, saved folder, json/parquet/csv"})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset"})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on"})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA adapters; without it, all weights train"})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linear layers"})
    save_model: bool = field(default=True, metadata={"help": "Save the trained model under output_dir"})

    def __post_init__(self) -> None:
        """A YAML file may hold anything."""
        check_fields(self)


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, DPOConfig, HeteroConfig]:
    """Fields from the file after `--config`, then from the command line."""
    args, training_args, hetero = parse_settings(argv, (RecipeArguments, DPOConfig, HeteroConfig), "recipes/dpo.py")
    for name in ("model", "dataset"):
        if getattr(args, name) is None:
            raise HeteroError(f"Set `{name}`: a folder or a name on the hub.")
    return args, training_args, hetero


def say(line: str) -> None:
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def load_data(args: RecipeArguments, tokenizer: Any) -> datasets.Dataset:
    """The pairs as they are found: `chosen` and `rejected`, texts or chats, and `prompt` unless both begin with it.

    Raises:
        HeteroError: there are none, or they are chats and the tokenizer has no template for them.
    """
    data = load_rows(args.dataset, args.dataset_config, args.dataset_split)
    if missing := [name for name in PAIR if name not in data.column_names]:
        raise HeteroError(f"dataset={args.dataset!r} has no {', '.join(missing)}, only {data.column_names}.")
    if not len(data):
        raise HeteroError(f"dataset={args.dataset!r} has no rows in its split {args.dataset_split!r}.")
    if isinstance(data.with_format(None)[0]["chosen"], list) and tokenizer.chat_template is None:
        raise HeteroError(
            f"dataset={args.dataset!r} holds chats, and the tokenizer has no chat template. Name a tokenizer that has "
            "one, or give it one: a file chat_template.jinja in its folder."
        )
    say(f"{len(data):,} pairs")
    return data.select_columns([name for name in ("prompt", *PAIR, "tools") if name in data.column_names])


def adapters(args: RecipeArguments) -> LoraConfig | None:
    """Adapters if `lora_r` is set: without them, the same model is its own reference."""
    if args.lora_r is None:
        return None
    targets = args.lora_target_modules or "all-linear"
    return LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")


def main(argv: Sequence[str]) -> None:
    """Load, train, save, draw."""
    args, training_args, hetero = parse(argv)
    # the first rank downloads and fills the caches, which the others then read
    with training_args.main_process_first(desc="data"):
        with explaining(f"Cannot load tokenizer={args.tokenizer or args.model!r}"):
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, trust_remote_code=False)
        with explaining(f"Cannot load dataset={args.dataset!r}"):
            data = load_data(args, tokenizer)
    with explaining(f"Cannot make the trainer of model={args.model!r}"):
        trainer = HeteroDPOTrainer(
            args.model,  # TRL loads it, and its reference where there are no adapters: see model_init_kwargs
            args=training_args,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=adapters(args),
            callbacks=[PlanMetricsCallback(lines=True, record=True)],
            hetero=hetero,
        )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if args.save_model:
        if trainer.is_fsdp_enabled:  # checkpoints may be in parts; what others load must not be
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        try:
            write_report(read_records(folder / "plans.jsonl"), folder / "report.html", trainer.cost_model)
        except HeteroError as error:  # no matplotlib: the run itself is done
            say(f"No report: {error}")
        else:
            say(f"Wrote {folder / 'report.html'}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HeteroError as error:  # it says what to change, which no traceback does
        sys.exit(f"{Path(__file__).name}: {error}")
