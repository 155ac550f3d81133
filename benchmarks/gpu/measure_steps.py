"""Whole steps beside those of Trainer: `python benchmarks/gpu/measure_steps.py --device cpu`.

The same samples, of real lengths, the same model with random weights: `HeteroTrainer`, and `Trainer` padded, with
samples grouped by length, and flattened without padding (`DataCollatorWithFlattening`), each of these at the largest
batch a device that fits. Tokens are those of samples, padding does not count; the second epoch is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from shapes import MINIATURES, SHAPES, Shape, make_model, mix_lengths, model_flops, samples
from short_runs import Ran, padded, run
from stage import Stage, begin, free_memory
from transformers import DataCollatorWithFlattening
from transformers.utils import is_flash_attn_2_available

from hf_hetero import HeteroConfig
from hf_hetero.estimate.devices import known_device

GLOBAL_BATCH = 16
TABLE = "Tokens a second"
FLEX = {"attention": "flex_attention"}


def ways(stage: Stage) -> dict[str, dict[str, Any]]:
    """What each way needs: settings of a run, and the attention of the model."""
    flash = "flash_attention_2" if is_flash_attn_2_available() and stage.device.type == "cuda" else None
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=flash is not None)
    grouped = {"collator": padded, "train_sampling_strategy": "group_by_length"}
    found: dict[str, dict[str, Any]] = {
        "HeteroTrainer": {"hetero": HeteroConfig()},
        "Trainer, padded": {"collator": padded, "attention": flash},
        "Trainer, grouped by length": {**grouped, "attention": flash},
        "Trainer, flattened": {"collator": flat, "attention": flash},
    }
    return found


def slow_to_start(stage: Stage) -> dict[str, dict[str, Any]]:
    """A way that is compiled first, so that it is tried once all others are measured."""
    if stage.is_miniature or is_flash_attn_2_available():
        return {}
    # sdpa has a mask of all pairs for a flattened row; this kernel passes over what is masked
    return {"Trainer, flattened, flex_attention": {"collator": DataCollatorWithFlattening(), **FLEX}}


class Subject:
    """A model and its samples.

    Args:
        name, shape: of the model.
        num_samples: a whole number of global batches.
        most: tokens of the longest sample.
    """

    def __init__(self, name: str, shape: Shape, num_samples: int, most: int) -> None:
        self._name, self._shape = name, shape
        self._lengths = mix_lengths("github", num_samples, most)
        self._data = samples(self._lengths, shape.sizes["vocab_size"])
        self._flops = model_flops(make_model(shape, torch.device("meta")), shape, self._lengths)
        self._hetero_losses: list[float] = []

    def measure(self, stage: Stage, ways: dict[str, dict[str, Any]], least_s: float) -> None:
        """Some ways, as long as there are so many seconds left for each."""
        for way, settings in ways.items():
            if stage.left_s < least_s:
                stage.note(f"No time left for {way} with {self._name}.")
                continue
            with stage.alone(f"{way} with {self._name}"):
                once = partial(self._once, stage.device, **settings)
                ran, per_device = (once(GLOBAL_BATCH), None) if "hetero" in settings else largest(once, stage.device)
                row = as_row(stage.device, ran, per_device, self._lengths, self._flops)
                stage.row(TABLE, model=self._name, way=way, **row, **{"loss differs by": self._difference(way, ran)})

    def _once(self, device: torch.device, per_device: int, attention: str | None = None, **settings: Any) -> Ran:
        # a new one each time, for a run that found no room may have made a step before
        model = make_model(self._shape, device, attention or "sdpa")
        try:
            return run(model, device, self._data, per_device, GLOBAL_BATCH // per_device, **settings)
        finally:
            model.to("meta")

    def _difference(self, way: str, ran: Ran) -> str:
        """How far losses are from those of `HeteroTrainer`."""
        if "grouped" in way:
            return "other batches"
        self._hetero_losses = self._hetero_losses or ran.losses
        return f"{max(abs(a / b - 1) for a, b in zip(ran.losses, self._hetero_losses, strict=True)):.1e}"


def largest(once: Callable[[int], Ran], device: torch.device) -> tuple[Ran, int]:
    """The run with the largest batch a device that fits."""
    per_device = 8
    while True:
        try:
            return once(per_device), per_device
        except torch.OutOfMemoryError:
            if per_device == 1:
                raise
        per_device //= 2
        free_memory(device)  # here, where the error, which holds on to what filled it, is gone


def as_row(device: torch.device, ran: Ran, per_device: int | None, lengths: list[int], flops: float) -> dict[str, Any]:
    """The numbers of a run."""
    peak = known_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "rows at once": "planned" if per_device is None else per_device,
        "tokens/s": round(sum(lengths) / ran.epoch_s),
        "MFU": None if peak is None else round(flops / ran.epoch_s / peak.flops, 3),
        "peak (GiB)": ran.peak_gib,
        "loss": f"{ran.losses[0]:.4f}",
    }


def main() -> None:
    """Measure, and write as it comes."""
    stage = begin(__doc__)
    stage.note("MFU counts what a model needs: no padding, and nothing that is computed twice.")
    if stage.is_miniature:
        subjects = [Subject(name, shape, num_samples=16, most=100) for name, shape in MINIATURES.items()]
    else:
        # fewer samples where a token takes longer
        counts = zip(SHAPES.items(), (64, 32, 32), strict=True)
        subjects = [Subject(name, shape, num_samples, most=16384) for (name, shape), num_samples in counts]
    for subject in subjects:
        subject.measure(stage, ways(stage), least_s=stage.pick(20, 3))
    for subject in subjects:
        subject.measure(stage, slow_to_start(stage), least_s=60)
    stage.done()


if __name__ == "__main__":
    main()
