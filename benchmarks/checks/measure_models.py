"""Which models of transformers are exact: `python benchmarks/checks/measure_models.py --results FILE [--types A B]`.

Of every type that transformers loads as a causal language model, or as one of images and text, a tiny instance is
trained two steps on text, or where it takes no text alone, on rows that have an image each: by plain Trainer on one
process, each sample alone; and by HeteroTrainer on two ranks, under plans of mixed degrees that use each method. Both
compute in fp64, whatever type a model asks for in between, and their weights are compared:

    exact           they differ by rounding, relative to how far training has moved them: by less than 1e-9, or, under
                    1e-6, less than 10 times what plain Trainer differs from itself with torch's attention, all samples
                    of a step together; "whole samples": ranks cannot share one, so each goes over all of it
    refused         HeteroTrainer refuses the model when it is made, in words
    wrong           they differ by more
    crash           HeteroTrainer accepts the model and then fails
    stock cannot    plain Trainer fails, too: on this config, without a package that is missing, or by itself

Each type has processes of its own, forked from this one, and a bound on the seconds that they compute: another load of
the machine changes no result. A type whose result is in FILE is not measured again. `--markdown FILE` writes the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing as mp
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import CONFIG_MAPPING, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from instances import KINDS, model_of
from models_page import WHOLE, table
from samples_to_train import IMAGES, STEPS, as_batch, num_before, rows, steps_of

from hf_hetero import Group, HeteroConfig, HeteroError, HeteroTrainer, MicroBatch, Plan
from hf_hetero.checks.in_double import InDouble
from hf_hetero.data.plan_ahead import PlanSource

EXTRAS: dict[str, tuple[str, ...]] = {"paligemma": ("token_type_ids",)}
"""What a type's processor says of each token, and a plan needs; of text alone, that all look at each other."""
MOST_WAITING = 300
"""Seconds in which no process of a type computes, before it counts as one that hangs."""
PLANS = (
    [[((0, 1), (7, 0, 1), "ulysses")], [((0,), (3,), None), ((1,), (2, 4), None)], [((0, 1), (5, 6), "ring")]],
    [
        [((0, 1), (2, 0, 1), "gather")],
        [((0,), (3, 4, 5), None), ((1,), (6,), None)],
        [((0,), (7,), None), ((1,), (), None)],
    ],
)
"""Micro-batches of each step: ranks, samples and method of each group."""
EXACT = 1e-9  # of the movement; fp64 rounds at 1e-16, and two steps of a deep sum lose a few digits of that
STEEP = 1e-6  # a model may lose more, under plain Trainer, too; a sample that sees another gives 1e-3 and more


class ScriptedTrainer(HeteroTrainer):
    """A `ScriptedTrainer` follows `PLANS`."""

    def _plan_source(self) -> PlanSource:
        def plan(lengths: Sequence[int]) -> Plan:
            before = num_before(getattr(self.model, "config"))  # noqa: B009
            step = steps_of(self.model).index(tuple(length - before for length in lengths))
            groups = [[Group(ranks, samples, method or "ulysses") for ranks, samples, method in m] for m in PLANS[step]]
            return Plan(2, tuple(MicroBatch(tuple(m)) for m in groups), seconds=1.0, lower_bound_s=1.0)

        return Scripted(plan)


class Scripted:
    """A `PlanSource` of given plans."""

    def __init__(self, plan: Any) -> None:
        self.plan = self.static = plan
        self.improve = lambda plan, _: plan
        self.close = lambda: None


def trained(
    model: Any, trainer_class: type[Trainer], num_ranks: int, extras: Sequence[str] = (), together: bool = False
) -> Any:
    """Train two steps, one process's samples one by one or together; return the weights, and the trainer."""
    data = rows(model, extras)
    batch = (len(STEPS[0]) // num_ranks, 1) if together or num_ranks > 1 else (1, len(STEPS[0]))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=batch[0],
            gradient_accumulation_steps=batch[1],
            max_steps=len(STEPS),
            learning_rate=0.05,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        options: dict[str, Any] = {"data_collator": as_batch}
        if issubclass(trainer_class, HeteroTrainer):
            # two ranks may share what nobody would have them share unasked, too
            options = {"hetero": HeteroConfig(max_degree=num_ranks)}
        trainer: Any = trainer_class(model, args, train_dataset=data, **options)  # pyright: ignore[reportArgumentType]
        with InDouble():  # not before, because a tiny instance that is tried has types of its own
            trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, trainer


def takes_divisor(model: Any) -> bool:
    """Return whether a model divides its loss by what it is told to, so that samples of a step may come one by one.

    Else plain Trainer adds up the means of its batches: then all samples of a step are one batch.
    """
    batch = as_batch(rows(model, ())[:1])
    try:
        with torch.no_grad(), InDouble():
            mean, sum_ = (model(**batch, num_items_in_batch=n).loss for n in (None, torch.tensor(1)))
    except Exception:  # it knows no such keyword, or needs others than these
        return getattr(model, "accepts_loss_kwargs", True)
    return getattr(model, "accepts_loss_kwargs", True) and not torch.isclose(mean, sum_)


def stock(model_type: str, kind: str, extras: Sequence[str], together: bool = False) -> Any:
    """Train by plain Trainer; return the class's name, and the weights, before and after."""
    model = model_of(model_type, kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if together:
        model.set_attn_implementation("sdpa")
    after, _ = trained(model, Trainer, 1, extras, together or not takes_divisor(model))
    return type(model).__name__, before, after


def hetero(model_type: str, kind: str, rank: int, meeting: str) -> Any:
    """Train on one of two ranks; return the weights, and why the ranks could not share a sample, if so."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    waiting = timedelta(seconds=MOST_WAITING)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=waiting)
    weights, trainer = trained(model_of(model_type, kind), ScriptedTrainer, 2, EXTRAS.get(model_type, ()))
    return weights, trainer._between_runs.manner.whole


def into(path: str, seconds: int, function: Any, *args: Any) -> None:
    """Call in this process, in fp64; write what it returns, or its error in words."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the process ends with it
    torch.set_default_dtype(torch.float64)
    try:
        value, error, refused = function(*args), "", False
    except BaseException as raised:
        words = f"{raised}" if isinstance(raised, HeteroError) else f"{type(raised).__name__}: {raised}"
        value, error, refused = None, " ".join(words.split()), isinstance(raised, HeteroError)
    torch.save((value, error, refused), f"{path}.part")
    os.rename(f"{path}.part", path)
    os._exit(0)


def called(tasks: Sequence[tuple[Any, ...]], seconds: int) -> list[tuple[Any, str, bool]]:
    """Call functions in a process each; return what each returns, its error, and whether that is a refusal."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}" for number in range(len(tasks))]
        calls = [(path, seconds, *task) for path, task in zip(paths, tasks, strict=True)]
        processes = [context.Process(target=into, args=call) for call in calls]
        for process in processes:
            process.start()
        last, since = 0, time.monotonic()
        while any(process.is_alive() for process in processes) and time.monotonic() - since < MOST_WAITING:
            for process in processes:
                process.join(0.05)
            if (now := sum(ticks(process.pid) for process in processes)) != last:
                last, since = now, time.monotonic()
        lost: list[str] = []
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
            used_up = process.exitcode == -signal.SIGXCPU
            lost.append(f"more than {seconds} s of computing" if used_up else f"ended: {process.exitcode}")
        return [
            torch.load(path, weights_only=False) if Path(path).exists() else (None, words, False)
            for path, words in zip(paths, lost, strict=True)
        ]


def ticks(pid: int | None) -> int:
    """Return how long a process has computed; 0 once it has ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def measured(model_type: str, kind: str, seconds: int) -> dict[str, Any]:
    """Measure one type."""
    start = time.monotonic()
    with suppress(Exception):  # imported once, and not in each process; said by the first of them
        KINDS[kind][1][CONFIG_MAPPING[model_type]]
    extras = EXTRAS.get(model_type, ())
    [[plain, stock_error, _]] = called([(stock, model_type, kind, extras)], seconds)
    for extra in ("mm_token_type_ids", "token_type_ids"):
        if plain is None and f"`{extra}`" in stock_error:
            [[plain, stock_error, _]] = called([(stock, model_type, kind, (extra,))], seconds)
    found: dict[str, Any] = {"type": model_type, "kind": kind, "class": "", "with_images": model_type in IMAGES}
    found |= {"result": "stock cannot", "why": stock_error}
    if plain is not None:
        with tempfile.TemporaryDirectory() as folder:
            ranks = called([(hetero, model_type, kind, rank, f"{folder}/ranks") for rank in range(2)], seconds)
        found["class"] = plain[0]
        found |= judged(plain, ranks)
        if found["result"] == "wrong" and found["error"] < STEEP:
            [[other, _, _]] = called([(stock, model_type, kind, (), True)], seconds)
            found["floor"] = judged(plain, [((other[2], ""), "", False)])["error"] if other is not None else 0.0
            found["result"] = "exact" if found["error"] <= 10 * found["floor"] else "wrong"
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def judged(plain: Any, ranks: list[tuple[Any, str, bool]]) -> dict[str, Any]:
    """Compare the weights of both ranks with those of plain training."""
    _, before, after = plain
    errors = [(error, refused) for value, error, refused in ranks if value is None]
    if errors:
        error, refused = max(errors, key=lambda one: one[1])
        return {"result": "refused" if refused else "crash", "why": error}
    found, whole = [value[0] for value, _, _ in ranks], ranks[0][0][1]
    # by torch, whose largest of nan and anything is nan
    movement = float(torch.stack([(after[name] - before[name]).abs().max() for name in before]).max())
    error = float(torch.stack([(weights[name] - after[name]).abs().max() for weights in found for name in after]).max())
    if not 0 < movement < float("inf"):
        return {"result": "stock cannot", "why": f"plain training moves the weights by {movement}"}
    # "not <=", so that nan is wrong
    result, why = "wrong" if not error <= EXACT * movement else "exact", f"{WHOLE}{whole}" if whole else ""
    return {"result": result, "why": why, "error": error / movement}


def main() -> None:
    """Measure what is asked for and not yet recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; what is there is not measured again")
    parser.add_argument("--types", nargs="*", help="model types; all without")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seconds", type=int, default=120, help="that each training may compute")
    parser.add_argument("--again", action="store_true", help="measure recorded types again")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    gc.freeze()  # what all processes share is not looked through, and so not copied, in each
    found: dict[tuple[str, str], dict[str, Any]] = {}
    if asked.results.exists():
        lines = map(json.loads, asked.results.read_text(encoding="utf-8").splitlines())
        found = {(one["kind"], one["type"]): one for one in lines}
    for kind in asked.kinds:
        for model_type in asked.types or KINDS[kind][0]:
            if model_type not in KINDS[kind][0] or ((kind, model_type) in found and not asked.again):
                continue
            one = found[kind, model_type] = measured(model_type, kind, asked.seconds)
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")
            error = f"{one['error']:.0e}" if "error" in one else ""
            print(
                f"{kind:6} {model_type:28} {one['result']:12} {error:6} {one['seconds']:5} s  {one['why'][:160]}",
                flush=True,
            )
    print(Counter((one["kind"], one["result"]) for one in found.values()))
    if asked.markdown:
        asked.markdown.write_text(table(list(found.values()), EXACT, STEEP), encoding="utf-8")


if __name__ == "__main__":
    main()
