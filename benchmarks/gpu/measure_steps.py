"""Whole steps beside those of Trainer: `python benchmarks/gpu/measure_steps.py --device cpu`.

The same samples, of real lengths, the same model with random weights: `HeteroTrainer`, and `Trainer` padded, with
samples grouped by length, and flattened without padding (`DataCollatorWithFlattening`), each of these at the largest
batch a device that fits. Tokens are those of samples, padding does not count; the second epoch is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shapes import MINIATURES, SHAPES, Shape, make_model, mix_lengths, model_flops, samples
from short_runs import Ran, padded, run
from stage import Stage, begin, free_memory
from transformers import DataCollatorWithFlattening
from transformers.utils import is_flash_attn_2_available

from hf_hetero import HeteroConfig
from hf_hetero.estimate.estimate import known_device

GLOBAL_BATCH = 16
TABLE = "Tokens a second"


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
    if flash is None and stage.device.type == "cuda":
        # sdpa has a mask of all pairs for a flattened row; this kernel passes over what is masked
        found["Trainer, flattened, flex_attention"] = {"collator": flat, "attention": "flex_attention"}
    return found


def measure(stage: Stage, name: str, shape: Shape, num_samples: int, most: int) -> None:
    """All ways with one model."""
    device = stage.device
    lengths = mix_lengths("github", num_samples, most)
    data = samples(lengths, shape.sizes["vocab_size"])
    hetero_losses: list[float] = []
    for way, settings in ways(stage).items():
        if stage.left_s < stage.pick(20, 3):
            stage.note(f"No time left for {way} with {name}.")
            continue
        with stage.alone(f"{way} with {name}"):
            settings = dict(settings)
            attention = settings.pop("attention", None) or "sdpa"
            made = make_model(shape, device, attention)
            flops = model_flops(made, shape, lengths)

            def once(per_device: int, made: Any = made, settings: dict[str, Any] = settings) -> Ran:
                return run(made, device, data, per_device, GLOBAL_BATCH // per_device, **settings)

            try:
                ran, per_device = (once(GLOBAL_BATCH), None) if way == "HeteroTrainer" else largest(once, device)
            finally:
                made.to("meta")
            hetero_losses = hetero_losses or ran.losses
            row = as_row(device, ran, per_device, lengths, flops)
            # samples grouped by length make other batches, whose losses are others
            comparable = "grouped" not in way
            difference = max(abs(a / b - 1) for a, b in zip(ran.losses, hetero_losses, strict=True))
            row["loss differs by"] = f"{difference:.1e}" if comparable else "other batches"
            stage.row(TABLE, model=name, way=way, **row)


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
        for name, shape in MINIATURES.items():
            measure(stage, name, shape, num_samples=16, most=100)
    else:
        # fewer samples where a token takes longer
        for (name, shape), num_samples in zip(SHAPES.items(), (64, 32, 32), strict=True):
            measure(stage, name, shape, num_samples, most=16384)
    stage.done()


if __name__ == "__main__":
    main()
