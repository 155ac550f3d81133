"""Ways to train take turns: what a way is, how a turn of it is trained, and what is measured of it (`compare.py`)."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from hf_hetero import HeteroConfig, HeteroTrainer, Plan, Planner


@dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        name: for people.
        trainer: what makes it, of the usual keywords.
        arguments: changes of the training arguments.
        collator: None: the trainer's own.
        kind: of the training arguments.
        is_same: its steps are of the same samples as those of most others, so that losses can be compared.
        is_shared: ranks are given the same samples, or parts of them, so that what each counts does not add up.
        why_not: it cannot be tried here, for this reason.
    """

    name: str
    trainer: Any = Trainer
    arguments: dict[str, Any] = field(default_factory=dict)
    collator: Any = None
    kind: Callable[..., Any] = TrainingArguments
    is_same: bool = True
    is_shared: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class Turn:
    """A turn: seconds and tokens of samples of its timed steps over all ranks, losses, most bytes of any rank."""

    seconds: float
    tokens: int
    losses: list[float]
    peak_bytes: int | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of samples a second, over all ranks."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Subject:
    """What each way trains, and on what.

    Args:
        args: as the user gives them; a way changes some.
        make_model: a new one, each time with the same weights.
        common: keywords of every trainer: dataset and tokenizer.
        hetero: settings of planned ways.
    """

    args: TrainingArguments
    make_model: Callable[[], Any]
    common: dict[str, Any]
    hetero: HeteroConfig


# -------------------------------------------------------------------------------------------------------- the trainers


class Counted(Trainer):
    """Counts the tokens of samples that it is given; padding does not count."""

    num_counted: Any = 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Count, and go on."""
        has_mask = "attention_mask" in inputs
        self.num_counted += inputs["attention_mask"].sum() if has_mask else inputs["input_ids"].numel()
        return super().training_step(model, inputs, num_items_in_batch)


class CountedHetero(Counted, HeteroTrainer):
    """HeteroTrainer, counted in the same way."""


@dataclass(frozen=True)
class PlansOfOneDegree:
    """Plans whose groups all have one degree: the best that there are with it, packed and balanced.

    Args:
        planner: asked anew for each plan.
        degree: of all groups.
    """

    planner: Callable[[], Planner]
    degree: int

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Plan a step."""
        return self.planner().static(lengths, self.degree)

    static = plan

    def improve(self, plan: Plan, lengths: Sequence[int]) -> Plan:
        """Leave it as it is."""
        return plan


class CountedStatic(CountedHetero):
    """HeteroTrainer with one degree for the whole run."""

    degree = 1

    def _plan_source(self) -> PlansOfOneDegree:
        return PlansOfOneDegree(partial(self._planners().planner, "fast"), self.degree)


# ----------------------------------------------------------------------------------------------------------- measuring


class Clock(TrainerCallback):
    """Notes when each step ends, and the tokens that were counted until then."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.ends: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is over when its device has done it."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.ends.append((time.perf_counter(), int(self.trainer.num_counted)))


def memory_bytes(name: str) -> int | None:
    """This process's VmRSS (now) or VmHWM (most since `start_peak`); None where the system does not say."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
    return None


def start_peak(device: torch.device) -> int:
    """Begin to look for the most memory; return what is held already."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what a way before has freed shall not count for this one
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
    return memory_bytes("VmRSS") or 0


def peak_bytes(device: torch.device, held: int) -> int | None:
    """Most bytes since `start_peak` beyond what was held then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = memory_bytes("VmHWM")
    return None if most is None else max(0, most - held)


def of_all_ranks(value: float, join: Any, device: torch.device) -> float:
    """A number of all ranks: their sum, or the largest."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, join)
    return float(tensor)


# --------------------------------------------------------------------------------------------------------------- turns


def train(way: Way, subject: Subject, steps: int) -> tuple[Any, Turn]:
    """Train a new model for some steps, and one before them that is not timed; return the trainer, too."""
    args = subject.args
    if args.device.type == "cuda":
        AcceleratorState._reset_state()  # the way before may have sharded its model; on a CPU none does
    set_seed(args.seed)
    values = {item.name: getattr(args, item.name) for item in fields(args) if item.init}
    settings = way.kind(**{**values, **way.arguments, "max_steps": steps + 1, "logging_steps": 1})
    clock, held = Clock(), start_peak(args.device)
    extra = {"hetero": subject.hetero} if issubclass(way.trainer, HeteroTrainer) else {}
    options = {"data_collator": way.collator, "callbacks": [clock], **subject.common, **extra}
    trainer = clock.trainer = way.trainer(model=subject.make_model(), args=settings, **options)
    trainer.remove_callback(PrinterCallback)  # what is compared is said by turns, not by steps
    trainer.train()
    (start, before), (end, after) = clock.ends[0], clock.ends[-1]
    peak = peak_bytes(args.device, held)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = int(of_all_ranks(after - before, dist.ReduceOp.SUM, args.device))
    most = None if peak is None else int(of_all_ranks(peak, dist.ReduceOp.MAX, args.device))
    return trainer, Turn(end - start, tokens, losses, most)


def take_turns(
    ways: Sequence[Way], subject: Subject, rounds: int, steps: int
) -> Iterator[tuple[int, Way, Turn | Exception]]:
    """Give each way a turn in each round, which begins with another way each time; a way that fails has no other turn.

    A failure is expected to be one of all ranks, such as a library that refuses a setting.
    """
    failed: set[str] = set()
    for number in range(rounds):
        first = number * len(ways) // rounds
        for way in (*ways[first:], *ways[:first]):
            if way.why_not or way.name in failed:
                continue
            try:
                _, turn = train(way, subject, steps)
            except Exception as error:  # the others shall be compared all the same
                failed.add(way.name)
                yield number, way, error
            else:
                yield number, way, turn
