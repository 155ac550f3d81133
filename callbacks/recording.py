"""What a run writes down beside its plans, for its report: what it is (`run.json`), and what it logs (`logs.jsonl`)."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_hetero.config import HeteroConfig
from hf_hetero.costs import CostModel

RUN_FORMAT = "hf-hetero-run/1"
PACKAGES = ("hf-hetero", "torch", "transformers", "accelerate", "peft", "trl", "datasets", "flash-attn")
SETTINGS = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "optim",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "fsdp",
    "torch_compile",
    "seed",
)
"""Of the training: a report may be sent to others, so that no names of folders and no keys are among them."""


def describe_run(
    args: TrainingArguments, model: Any, num_steps: int, hetero: HeteroConfig | None, cost: CostModel | None
) -> dict[str, Any]:
    """Say what a run is, ready for JSON: format `hf-hetero-run/1`.

    `settings` are by heading, names and values; `cost_model` is what plans are made by (hf-hetero-cost/1).
    """
    settings: dict[str, Any] = {"Model": _model(model), "Training": _told(args)}
    if hetero is not None:
        standard = asdict(HeteroConfig())
        changed = {name: value for name, value in asdict(hetero).items() if value != standard[name]}
        if hetero.cost_model is not None:
            changed["cost_model"] = Path(hetero.cost_model).name
        settings["Planning"] = changed or {"all settings": "as they come"}
    settings["Versions"] = _versions()
    return {
        "format": RUN_FORMAT,
        "settings": settings,
        "num_steps": num_steps,
        "has_ended": False,
        "cost_model": None if cost is None else cost.to_dict(),
    }


def numbers_of(logs: Mapping[str, Any], step: int) -> dict[str, float]:
    """Keep the numbers of a trainer's log, with its step."""
    kept = {name: value for name, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {**kept, "step": step}


def append(path: Path, line: str) -> None:
    """Add a line to a file, and begin a new one where the last was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def write_object(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object whole or not at all: a report may be made at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(path)


def record_path(args: TrainingArguments, name: str = "plans.jsonl") -> Path:
    """Return a file in which `record=True` keeps what a report is made of."""
    return Path(args.output_dir or ".") / name


def _model(model: Any) -> dict[str, Any]:
    """Say which model is trained; a folder is named by its last part."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "").rstrip("/")
    kind = str(getattr(config, "model_type", "") or type(model).__name__)
    parameters = list(model.parameters()) if hasattr(model, "parameters") else []
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return {
        "name": (name.rsplit("/", 1)[-1] if os.path.isabs(name) else name) or kind,
        "type": kind,
        "parameters": f"{sum(parameter.numel() for parameter in parameters):,}",
        "trained": f"{trained:,}",
    }


def _told(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of training that a report shows, if they are set to anything."""
    values: dict[str, Any] = {name: getattr(args, name, None) for name in SETTINGS}
    told = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: value for name, value in told.items() if value not in (None, False, [])}


def _versions() -> dict[str, str]:
    """Return what the run is made with, and when it began."""
    found = {"began": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
