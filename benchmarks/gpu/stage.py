"""What the stages of `make gpu` share: their arguments, their results on the way, a clock, the machine's name.

A stage writes what it has after each number, so that whatever ends it takes nothing back. Its results are facts
(a name, a value), tables (a title, rows that are dictionaries) and notes (what a reader must know), which `page` shows
as they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "mip", "flash-attn")


class Stage:
    """A stage underway.

    Args:
        device: what it measures; on a CPU it runs in miniature, so that it can be tried anywhere.
        output: its JSON.
        limit_s: seconds that it may take in all.
    """

    def __init__(self, device: torch.device, output: Path | None, limit_s: float) -> None:
        self.device, self._output, self._limit_s, self._started = device, output, limit_s, time.monotonic()
        self._results: dict[str, Any] = {
            "state": "running",
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "device": device_name(device),
            "versions": versions(),
            "seconds": 0.0,
            "facts": {},
            "tables": {},
            "notes": [],
        }
        self._write()

    @property
    def is_miniature(self) -> bool:
        """Whether this is only to show that the stage works."""
        return self.device.type != "cuda"

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self._limit_s - (time.monotonic() - self._started)

    def pick(self, whole: Any, miniature: Any) -> Any:
        """One of two sizes."""
        return miniature if self.is_miniature else whole

    def fact(self, name: str, value: Any) -> None:
        """Note a single value."""
        self._results["facts"][name] = value
        self._write(f"{name}: {value}")

    def row(self, table: str, **columns: Any) -> None:
        """Note a row of a table."""
        self._results["tables"].setdefault(table, []).append(columns)
        self._write(f"{table}: {columns}")

    def note(self, text: str) -> None:
        """Note what a reader must know."""
        self._results["notes"].append(text)
        self._write(text)

    def done(self) -> None:
        """Note that nothing is missing."""
        self._results["state"] = "done"
        self._write()

    @contextmanager
    def alone(self, what: str) -> Any:
        """A part of the stage whose failure costs only itself; it is noted."""
        try:
            yield
        except Exception as error:
            self.note(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        finally:
            free_memory(self.device)

    def _write(self, said: str | None = None) -> None:
        self._results["seconds"] = round(time.monotonic() - self._started, 1)
        if said is not None:
            print(said, flush=True)
        if self._output is not None:
            write_json(self._output, self._results)


def begin(description: str | None) -> Stage:
    """A stage as the command line asks for it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: in miniature")
    parser.add_argument("--output", type=Path, help="JSON to write as results come; they are printed, too")
    parser.add_argument("--seconds", type=float, default=600.0, help="that it may take; it leaves out what is too much")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs in miniature")
    if options.device == "cpu":
        torch.set_num_threads(1)  # more would wait for each other where cores are shared
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    return Stage(device, options.output, options.seconds)


def write_json(path: Path, data: Any) -> None:
    """Write whole or not at all: the writer may be ended at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    new.replace(path)


def seconds(device: torch.device, call: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
    """Median seconds of a call on the device, after some that do not count."""
    for _ in range(warm_up):
        call()
    if device.type != "cuda":
        taken: list[float] = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start_mark, end_mark in marks:
        start_mark.record()
        call()
        end_mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(start_mark.elapsed_time(end_mark) / 1e3 for start_mark, end_mark in marks)


def seconds_in_turns(device: torch.device, calls: dict[str, Callable[[], Any]], turns: int = 5) -> dict[str, float]:
    """Median seconds of several calls that take turns, so that a clock that changes changes for all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        for name, call in calls.items():
            taken[name].append(seconds(device, call, repeats=3, warm_up=0 if turn else 2))
    return {name: statistics.median(values) for name, values in taken.items()}


def waits_for_device(device: torch.device, call: Callable[[], Any]) -> bool | None:
    """Whether a call makes the host wait for the device; None where there is nothing to wait for."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    """Most memory in use at once since `start_peak`; None where it is not counted."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None


def start_peak(device: torch.device) -> None:
    """Count the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bf16(device: torch.device) -> Any:
    """Compute in bf16, as `TrainingArguments(bf16=True)` does."""
    return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext()


def device_name(device: torch.device) -> str:
    """What is measured, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), in miniature"


def versions() -> dict[str, str]:
    """Python, and the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
