"""Train the same model on the same real text in several ways, in turns, and compare them.

    OMP_NUM_THREADS=1 accelerate launch --config_file recipes/accelerate/cpu.yaml --num_processes 2 \
        recipes/compare.py --config recipes/compare/train.yaml --max_length 8192

Stock `Trainer` as it is, a row at a time, with rows grouped by length, rebalanced, and flattened; TRL's packing; one
static degree for the whole run; and a new plan for each step. What is not installed, or needs GPUs, has a row that says
so. The file gives values to the fields of `recipes/sft.py` and of `CompareArguments`; the command line overrides it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from sft import RecipeArguments, load_data, load_model, load_tokenizer, prepare_data, say
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, TrainingArguments
from transformers.utils import is_flash_attn_2_available
from turns import Counted, CountedHetero, CountedStatic, Subject, Turn, Way, take_turns, train

from hf_hetero import HeteroConfig, HeteroError
from hf_hetero.fine_tuning import check_fields, parse_settings
from hf_hetero.report.drawing import ACCENT, DEGREE_COLOURS, INK, new_figure, short, write_picture

CALIBRATING_STEPS = 11
"""Of a run that is not counted: the estimate of the machine is refitted after ten."""
PADDED, ADAPTIVE = "Trainer, padded", "a plan a step"
MIB = 2**20


@dataclass
class CompareArguments:
    """How ways are compared."""

    global_batch: int = field(default=16, metadata={"help": "Samples of a step, over all ranks"})
    rounds: int = field(default=3, metadata={"help": "How often each way has its turn"})
    steps: int = field(default=3, metadata={"help": "Steps that are timed in a turn; one before them is not"})
    only: list[str] | None = field(default=None, metadata={"help": "Ways to compare, by parts of their names"})

    def __post_init__(self) -> None:
        """A YAML file may hold anything."""
        check_fields(self)


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, CompareArguments, TrainingArguments, HeteroConfig]:
    """Fields from the file after `--config`, then from the command line."""
    kinds = (RecipeArguments, CompareArguments, TrainingArguments, HeteroConfig)
    return parse_settings(argv, kinds, "recipes/compare.py")


# ---------------------------------------------------------------------------------------------------------------- ways


def ways_of(args: TrainingArguments, batch: int, tokenizer: Any, longest: int, most_tokens: int) -> list[Way]:
    """All ways, those that cannot be tried here included.

    Args:
        args: with as many rows at once as padded ways take.
        batch: samples of a step.
        tokenizer: which pads.
        longest: tokens of the longest sample.
        most_tokens: of a rank at once, in planned ways.
    """
    world, rows = args.world_size, args.per_device_train_batch_size
    if batch % (rows * world):
        raise HeteroError(f"global_batch={batch}: it must be a multiple of {rows} rows at once on {world} ranks.")
    together = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batch // (rows * world)}
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch // world}
    padding = DataCollatorForSeq2Seq(tokenizer)
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=has_flash(args))
    strategies = ("group_by_length", "batch_rebalance")
    ways = [
        Way(PADDED, Counted, together, padding),
        Way("Trainer, a row at a time", Counted, single, padding),
        *(Way(s, Counted, {**together, "train_sampling_strategy": s}, padding, is_same=False) for s in strategies),
        Way("flattened", Counted, together, flat),
        trl_packing(args, batch, longest),
        *sequence_parallel(world, batch, tokenizer, args.device.type == "cuda"),
    ]
    for degree in (2**power for power in range(world.bit_length())):
        room = degree * most_tokens
        why_not = "" if longest <= room else f"a group holds {room:,} tokens, the longest sample has {longest:,}"
        kind = type(f"Degree{degree}", (CountedStatic,), {"degree": degree})
        ways.append(Way(f"static degree {degree}", kind, together, why_not=why_not))
    return [*ways, Way(ADAPTIVE, CountedHetero, together)]


def has_flash(args: TrainingArguments) -> bool:
    """Whether stock ways have an attention that passes over what lies between samples."""
    return args.device.type == "cuda" and is_flash_attn_2_available()


def make_model(recipe: RecipeArguments, tokenizer: Any, flash: bool) -> Any:
    """The model of the recipe, with the fastest attention of stock ways; planned ones choose their own."""
    model = load_model(recipe, tokenizer)
    if flash:
        model.set_attn_implementation("flash_attention_2")
    return model


def trl_packing(args: TrainingArguments, batch: int, longest: int) -> Way:
    """TRL's packing: rows as long as the longest sample, filled best-fit decreasing, so that steps are of others."""
    name = "TRL, packed"
    if find_spec("trl") is None:
        return Way(name, why_not="trl is not installed")
    from trl import SFTConfig, SFTTrainer

    # a full row holds several samples: a quarter as many make a step of about as many tokens
    rows = max(1, batch // args.world_size // 4)
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows, "packing": True}
    kind = type("CountedSFT", (Counted, SFTTrainer), {})
    return Way(name, kind, {**settings, "max_length": longest}, kind=SFTConfig, is_same=False)


def sequence_parallel(world: int, batch: int, tokenizer: Any, cuda: bool) -> list[Way]:
    """Accelerate's, of one degree, a row at a time on all ranks: torch's context parallel, and DeepSpeed's Ulysses."""
    names = ("torch CP (FSDP2)", "DeepSpeed Ulysses")
    if not cuda or world == 1:
        return [Way(name, why_not="needs several GPUs") for name in names]
    from accelerate.parallelism_config import ParallelismConfig

    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch}
    padding = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=2 * world)
    sharded = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}
    torch_cp = {**alone, **sharded, "parallelism_config": ParallelismConfig(cp_size=world)}
    if find_spec("deepspeed") is None:
        missing = Way(names[1], why_not="deepspeed is not installed")
        return [Way(names[0], Counted, torch_cp, padding, is_shared=True), missing]
    zero = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
    zero |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    ulysses = {"parallelism_config": ParallelismConfig(sp_backend="deepspeed", sp_size=world), "deepspeed": zero}
    shared = partial(Way, trainer=Counted, collator=padding, is_shared=True)
    return [shared(names[0], arguments=torch_cp), shared(names[1], arguments={**alone, **ulysses})]


def calibrated(subject: Subject, adaptive: Way, folder: Path) -> HeteroConfig:
    """Settings with a cost model that a run has refitted to this machine; its steps do not count."""
    trainer, _ = train(adaptive, replace(subject, hetero=replace(subject.hetero, calibrate=True)), CALIBRATING_STEPS)
    path = folder / "cost_model.json"
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        trainer.cost_model.save(path)
    trainer.accelerator.wait_for_everyone()
    return replace(subject.hetero, cost_model=str(path), calibrate=False)


# ------------------------------------------------------------------------------------------------------------- results


def as_row(way: Way, turns: dict[str, list[Turn]], why_not: str, reference: str | None) -> dict[str, Any]:
    """What is said of a way: medians over rounds, ratios to the reference in the same round, with their range.

    Args:
        way: which.
        turns: of all ways.
        why_not: it has none.
        reference: the way that others' speed and losses are compared with.
    """
    own, others = turns[way.name], [] if reference is None else turns[reference]
    if why_not or not own:
        return {"way": way.name, "why not": why_not or "not asked for"}
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in zip(own, others, strict=False)]
    peaks = [turn.peak_bytes for turn in own if turn.peak_bytes is not None]
    difference: float | None = None
    if way.is_same and reference is not None:
        pairs = zip(own[0].losses, others[0].losses, strict=True)
        difference = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    return {
        "way": way.name,
        "tokens/s": median(turn.tokens_per_s for turn in own),
        "range": [min(turn.tokens_per_s for turn in own), max(turn.tokens_per_s for turn in own)],
        "times": [median(ratios), min(ratios), max(ratios)] if ratios else None,
        "peak (MiB)": max(peaks) / MIB if peaks else None,
        "last loss": own[0].losses[-1],
        "loss differs by": difference,
    }


def as_table(rows: Sequence[dict[str, Any]], reference: str | None) -> str:
    """The rows as a table in Markdown."""
    times_what = "times" if reference is None else f"times `{reference}`"
    lines = [f"| way | tokens/s | {times_what} (range) | peak (MiB a rank) | loss differs by |", "|---" * 5 + "|"]
    for row in rows:
        if "why not" in row:
            lines.append(f"| {row['way']} | {row['why not']} | | | |")
            continue
        times, peak, differs = row["times"], row["peak (MiB)"], row["loss differs by"]
        ratio = "" if times is None else f"{times[0]:.2f} ({times[1]:.2f} to {times[2]:.2f})"
        loss = "other batches" if differs is None else f"{differs:.1e}"
        memory = "" if peak is None else f"{peak:,.0f}"
        lines.append(f"| {row['way']} | {row['tokens/s']:,.0f} | {ratio} | {memory} | {loss} |")
    return "\n".join(lines)


def bars(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """A bar for each way, with the range of its turns."""
    shown = [row for row in rows if "why not" not in row]
    figure, axes = new_figure(8, 1.2 + 0.36 * len(shown))
    for place, row in enumerate(shown):
        low, high = row["range"]
        speed, colour = row["tokens/s"], ACCENT if row["way"] == ADAPTIVE else DEGREE_COLOURS[1]
        axes.barh(place, speed, 0.66, color=colour).patches[0].set_gid(f"way-{place}")
        axes.plot([low, high], [place, place], color=INK, linewidth=1.5)
        times = "" if row["times"] is None else f"  {row['times'][0]:.2f}x"
        axes.text(high, place, f"  {speed:,.0f}{times}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(shown)), [row["way"] for row in shown])
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlim=(0, 1.25 * max(row["range"][1] for row in shown)))
    axes.set_xlabel("tokens of samples a second, over all ranks. Lines: from the slowest turn to the fastest")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    return figure


# ----------------------------------------------------------------------------------------------------------------- run


def main(argv: Sequence[str]) -> None:
    """Load, calibrate, take turns, say, draw."""
    recipe, how, args, hetero = parse(argv)
    with args.main_process_first(desc="data"):
        data = load_data(recipe)
        tokenizer = load_tokenizer(recipe, data)
        data = prepare_data(recipe, data, tokenizer)
        data = data.map(lambda row: {"labels": row["input_ids"]}, desc="Labels")
    longest = max(data["length"])
    # as on a device that a sample of the full length does not fit
    most_tokens = hetero.max_tokens_per_rank or 3 * (recipe.max_length or longest) // 4
    hetero = replace(hetero, max_tokens_per_rank=most_tokens)
    common = {"train_dataset": data, "processing_class": tokenizer}
    subject = Subject(args, partial(make_model, recipe, tokenizer, has_flash(args)), common, hetero)
    ways = ways_of(args, how.global_batch, tokenizer, longest, most_tokens)
    asked = [way for way in ways if how.only is None or any(part in way.name for part in how.only)]
    folder = Path(args.output_dir) / short(recipe.max_length or longest)
    if hetero.cost_model is None and any(issubclass(way.trainer, CountedHetero) for way in asked):
        say("A run that does not count fits the cost model to this machine.")
        subject = replace(subject, hetero=calibrated(subject, ways[-1], folder))

    turns: dict[str, list[Turn]] = {way.name: [] for way in ways}
    why_not = {way.name: way.why_not for way in ways}
    for number, way, turn in take_turns(asked, subject, how.rounds, how.steps):
        if isinstance(turn, Turn):
            turns[way.name].append(turn)
            said = f"{turn.seconds:9.1f} s" if way.is_shared else f"{turn.tokens_per_s:9,.0f} tokens/s"
        else:
            said = why_not[way.name] = f"{type(turn).__name__}: {' '.join(str(turn).split()):.200}"
        say(f"round {number + 1}  {way.name:<26}{said}")
    counted = [way for way in asked if way.is_same and not way.is_shared and turns[way.name]]
    reference = counted[0].name if counted else None
    for way in asked:
        if way.is_shared and turns[way.name]:  # of the same samples, step by step
            if reference is None:
                raise HeteroError(f"{way.name} does not count tokens: compare it with {PADDED!r}, too.")
            tokens = turns[reference][0].tokens
            turns[way.name] = [replace(turn, tokens=tokens) for turn in turns[way.name]]
    rows = [as_row(way, turns, why_not[way.name], reference) for way in ways]
    if args.process_index == 0:
        write(folder, rows, turns, reference, f"Up to {short(longest)} tokens, {args.world_size} ranks")


def write(
    folder: Path, rows: list[dict[str, Any]], turns: dict[str, list[Turn]], reference: str | None, title: str
) -> None:
    """The table, all that was measured, and the bars."""
    table = as_table(rows, reference)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    every = {name: [asdict(turn) for turn in of_way] for name, of_way in turns.items()}
    measured = {"reference": reference, "rows": rows, "turns": every}
    (folder / "results.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
    print(table, flush=True)
    try:
        for name in ("bars.png", "bars.svg"):
            write_picture(partial(bars, rows, title), folder / name)
    except HeteroError as error:  # no matplotlib: what was measured is written
        say(f"No picture: {error}")
    else:
        say(f"Wrote {folder / 'table.md'}, results.json, bars.png and .svg.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HeteroError as error:  # it says what to change, which no traceback does
        sys.exit(f"{Path(__file__).name}: {error}")
