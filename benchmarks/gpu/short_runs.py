"""Short training runs, of `HeteroTrainer` or of `Trainer`, whose last epoch is timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from stage import free_memory, peak_gib, start_peak, wait
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_hetero import HeteroConfig, HeteroTrainer


@dataclass(frozen=True)
class Ran:
    """How a run went.

    Args:
        epoch_s: seconds of its last epoch, waiting for data and plans included.
        losses: of each step.
        peak_gib: of the whole run; None where it is not counted.
    """

    epoch_s: float
    losses: list[float]
    peak_gib: float | None


class Stamps(TrainerCallback):
    """Notes when each step is over."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends_s: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over when the device has done it."""
        wait(self._device)
        self.ends_s.append(time.perf_counter())


def arguments(folder: str, device: torch.device, per_device: int, accumulation: int, **changes: Any) -> Any:
    """Settings as a user's, without what is not training; tiny steps, so that losses can be compared."""
    options: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "remove_unused_columns": False,
        "seed": 7,
    }
    return TrainingArguments(**{**options, **changes})


def run(
    model: Any,
    device: torch.device,
    data: Sequence[Any],
    per_device: int,
    accumulation: int,
    hetero: HeteroConfig | None = None,
    collator: Any = None,
    callbacks: Sequence[Any] = (),
    **changes: Any,
) -> Ran:
    """Train on all samples, as many epochs as the arguments say; the last one is timed.

    Args:
        hetero: settings of `HeteroTrainer`; None: `Trainer`.
    """
    stamps = Stamps(device)
    model.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, device, per_device, accumulation, **changes)
        common = {"model": model, "args": args, "train_dataset": list(data), "data_collator": collator}
        common["callbacks"] = [stamps, *callbacks]
        trainer: Any = HeteroTrainer(**common, hetero=hetero) if hetero is not None else Trainer(**common)
        start_peak(device)
        trainer.train()
        peak = peak_gib(device)
    a_epoch = len(data) // (per_device * accumulation)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # without a step before the epoch, its first one is left out
    start_s = stamps.ends_s[max(0, len(stamps.ends_s) - 1 - a_epoch)]
    ran = Ran(stamps.ends_s[-1] - start_s, losses, peak)
    trainer.model = trainer.model_wrapped = trainer.optimizer = None
    del trainer
    model.zero_grad(set_to_none=True)
    free_memory(device)
    return ran


def padded(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Fill rows up to the longest, as transformers' padding collators do, which want a tokenizer for it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}
