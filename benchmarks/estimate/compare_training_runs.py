"""Estimates beside public training runs: `python benchmarks/estimate/compare_training_runs.py [CSV]`.

The runs are those of the repository PrimeIntellect-ai/prime-rl (benchmarks/baselines): FSDP2, fp32 weights, bf16
products, `torch.compile`, one full-length sample a rank and micro-batch. A row's estimate is what the package says of
such a run, plus what prime-rl does beside, read in its source of 2026-01-15 and written down here as constants; those
in seconds were fitted together with the shares of `hf_hetero.estimate.shares`. Dense models are judged, mixtures of
experts only printed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_hetero.estimate.clusters import Dense
from hf_hetero.estimate.devices import GIB, Device, device_named
from hf_hetero.estimate.estimate import estimate_cost_model, optimizer_s
from hf_hetero.estimate.memory import Shards, peak_bytes, sharded_bytes
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.estimate.shares import reached
from hf_hetero.topology import Topology

RUNS = Path(__file__).parents[3] / "shared" / "data" / "measured" / "training_runs.csv"
DENSE = {
    "Qwen3-0.6B": Dense("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151936, tied=True),
    "Qwen3-4B": Dense("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151936, tied=True),
}
EXPERTS = {  # layers, hidden, heads, key-value heads, inner of a token's experts, vocabulary, all and active weights
    "Qwen3-30B-A3B": (48, 2048, 32, 4, 8 * 768, 151936, 30.5e9, 3.3e9),
    "Qwen3-235B-A22B": (94, 4096, 64, 4, 8 * 1536, 151936, 235e9, 22e9),
    "INTELLECT-3": (46, 4096, 96, 8, 9 * 1408, 151552, 106e9, 12e9),
}
NUM_ADAPTERS = 4  # prime-rl holds several runs' adapters
KERNELS = {"flash_attention_2": "fa2", "flash_attention_3": "fa3", "flash_attention_4": "fa4"}

# What prime-rl does beside. "rl" looks at every position of a sample on the host, one after the other, after the
# forward pass (until 2026-06-15); its head makes each logit twice, in chunks of the vocabulary, by some thirty
# operations; the gradient of its weights is made although they are frozen. An adapter's products wait for the host in
# each linear layer, and but for Hopper are made in slices. "sft" holds whole logits in fp32 through backward, beside
# the loss's own three copies.
LOOP_S, LOOP_UNTIL = 2.0e-5, "2026-06-15"
HEAD_FLOPS, HEAD_LOGIT_BYTES = 8, 70
ADAPTER_LAYER_S, SLICED_LAYER_S = 8.5e-3, 1.0e-2
HELD_LOGIT_BYTES = 4
# These adapters belong to no run, and so have no optimizer. Gradients are reduced in fp32; those of embeddings and
# head, which are one group, are whole until then.
ADAM_BYTES, REDUCED_BYTES = 8, 4
HEAD_CHANGED = "2026-02-20"
"""From then on chunks of the head were others, and later of another kind: peaks are not judged."""


@dataclass(frozen=True)
class Compared:
    """One run: what was measured, and the estimate of it.

    Args:
        name: of the run, for people.
        judged: whether the estimate of seconds claims to be right: of dense models.
        peak_judged: whether that of memory does.
        seconds, peak_gib: measured and estimated; of a micro-batch, and of a rank.
    """

    name: str
    judged: bool
    peak_judged: bool
    seconds: tuple[float, float]
    peak_gib: tuple[float, float]

    @property
    def speed_ratio(self) -> float:
        """Return the estimated seconds by the measured ones."""
        return self.seconds[1] / self.seconds[0]

    @property
    def peak_ratio(self) -> float:
        """Return the estimated peak by the measured one."""
        return self.peak_gib[1] / self.peak_gib[0]


def shape_of_run(row: Mapping[str, str]) -> tuple[ModelShape, bool]:
    """Return the model of a run, as it was trained there, and whether it is a dense one."""
    rank = int(row["lora_rank"]) * NUM_ADAPTERS
    name = row["model"].split("/")[-1]
    if (dense := next((model for start, model in DENSE.items() if name.startswith(start)), None)) is not None:
        shape = replace(dense, adapter_rank=rank or None).shape()
    else:
        values = next(values for start, values in EXPERTS.items() if name.startswith(start))
        *sizes, num_params, active = values
        layers, hidden, heads, kv_heads, inner, vocab = (int(size) for size in sizes)
        base = Dense(name, layers, hidden, heads, kv_heads, 128, inner, vocab, adapter_rank=rank or None).shape()
        whole = int(num_params) + (base.trainable_params if rank else 0)
        trained = base.trainable_params if rank else whole
        shape = replace(base, num_params=whole, active_params=int(active), trainable_params=trained)
    shape = replace(
        shape,
        compiled=True,
        param_bytes=4 * shape.num_params,
        checkpointing=row["ac"] != "None",
        offloads=row["ac"] == "Offload",
        keeps_exchanged=False,
        chunked_loss=row["loss"] == "rl",
    )
    return shape, dense is not None


def beside_s(row: Mapping[str, str], shape: ModelShape, device: Device, tokens: int) -> float:
    """Return the seconds of a micro-batch that prime-rl takes beside what the package would."""
    seconds = 0.0
    if row["loss"] == "rl":
        flops = (HEAD_FLOPS - (4 if shape.has_adapters else 6)) * shape.head_params
        assert device.card_bytes_per_s is not None
        seconds += tokens * (flops / device.flops + HEAD_LOGIT_BYTES * shape.vocab / device.card_bytes_per_s)
        seconds += LOOP_S * tokens if row["date"] < LOOP_UNTIL else 0.0
    if shape.has_adapters:
        sliced = 0.0 if device.generation == "Hopper" else SLICED_LAYER_S
        seconds += shape.num_layers * (ADAPTER_LAYER_S + sliced)
    return seconds


def peak_of(shape: ModelShape, num_ranks: int, tokens: int) -> float:
    """Return the most bytes of a rank in a micro-batch of such a run."""
    states = sharded_bytes(shape, num_ranks, Shards())
    if shape.has_adapters:
        states -= ADAM_BYTES * shape.trainable_params / num_ranks
    else:
        states += REDUCED_BYTES * shape.outside_params
    if not shape.chunked_loss:
        states += HELD_LOGIT_BYTES * shape.vocab * tokens
    return peak_bytes(shape, states, tokens)


def compared(row: Mapping[str, str]) -> Compared:
    """Estimate a run of the table, and put it beside what was measured."""
    num_ranks, length, micro_batches = (int(row[name]) for name in ("gpus", "seq_len", "micro_batches"))
    shape, is_dense = shape_of_run(row)
    card = device_named(row["gpu"])
    device = reached(card, KERNELS.get(row["attention"], "fa2"))
    degree = int(row["cp"])
    topology = Topology(num_ranks, None, 10**15)
    cost = estimate_cost_model(shape, device, topology, tuple({1, degree}), Shards())
    seconds = cost.seconds([length], degree) + beside_s(row, shape, device, length // degree)
    seconds += optimizer_s(shape, device, num_ranks) / micro_batches
    step_s = float(row["step_s"])
    if row["loss"] == "sft":  # all that lies between two steps, too
        step_s = num_ranks * length * micro_batches / degree / float(row["tokens_per_s"])
    trained = f"LoRA {row['lora_rank']}" if shape.has_adapters else "all"
    name = (
        f"{num_ranks} {card.name}, {row['model'].split('/')[-1][:15]}, {row['loss']}, {trained}, {length}, {row['ac']}"
    )
    peaks = (float(row["peak_gib"]), peak_of(shape, num_ranks, length // degree) / GIB)
    peak_judged = is_dense and row["date"] < HEAD_CHANGED
    return Compared(f"{name}, {row['attention'][-1]}", is_dense, peak_judged, (step_s / micro_batches, seconds), peaks)


def read_runs(path: Path) -> list[Compared]:
    """Read a table of runs, and estimate each whose model is known here."""
    known = (*DENSE, *EXPERTS)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [compared(row) for row in rows if row["model"].split("/")[-1].startswith(known)]


def off(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the median and the most of how many times too large or too small estimates are."""
    factors = [max(ratio, 1 / ratio) for ratio in ratios]
    return statistics.median(factors), max(factors)


def main() -> None:
    """Print the table, and how far estimates of dense models are off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=RUNS, help=f"default: {RUNS}")
    runs = sorted(read_runs(parser.parse_args().runs), key=lambda run: not run.judged)
    columns = ("GPUs, model, loss, trained, tokens, recompute, kernel", "s measured", "estimated", "by")
    rows = [(*columns, "GiB measured", "estimated", "by"), ("---",) * 7]
    for run in runs:
        ratios = [f"{run.speed_ratio:.2f}", f"{run.peak_ratio:.2f}"]
        for place, is_judged in enumerate((run.judged, run.peak_judged)):
            ratios[place] += "" if is_judged else " (not judged)"
        seconds = [f"{value:.3f}" for value in run.seconds]
        rows.append((run.name, *seconds, ratios[0], *(f"{value:.2f}" for value in run.peak_gib), ratios[1]))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    speed = off([run.speed_ratio for run in runs if run.judged])
    memory = off([run.peak_ratio for run in runs if run.peak_judged])
    print(
        f"\nOff by: seconds {speed[0]:.2f} times in the median, {speed[1]:.2f} at most; peak {memory[0]:.2f} in the "
        f"median, {memory[1]:.2f} at most."
    )


if __name__ == "__main__":
    main()
