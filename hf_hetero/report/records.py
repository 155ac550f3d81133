"""This module reads, and checks, the steps of a run as `PlanMetricsCallback(record=True)` leaves them in `plans.jsonl`.

The file may have been cut short by a full disk or the end of a job, and it may come from anywhere.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from hf_hetero.errors import ConfigError, HeteroError
from hf_hetero.plan import Plan

Record = Mapping[str, Any]

COLUMNS = ("step", "lengths", "plan", "seconds", "busy_s", "wait_s")
MOST_STEPS, MOST_TOKENS, MOST_SECONDS, MOST_BYTES = 1 << 53, 1 << 40, 1e9, 1 << 60

logger = logging.getLogger(__name__)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read the steps of a run, in order, from its `plans.jsonl` or the folder that holds it.

    A run resumed from a checkpoint may have trained a step twice; the last one counts. A line that was cut short costs
    its step, and that is said.

    Raises:
        ConfigError: no such file, a line that is no step's record, or no line at all.
    """
    steps = {record["step"]: record for _, record in scan(path)}
    return [steps[step] for step in sorted(steps)]


def scan(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a record after the other, as they stand in the file, so that a long run need not fit into memory.

    Yields:
        Where the record's line begins, in bytes (for `record_at`), and the record.

    Raises:
        ConfigError: as `read_records`.
    """
    file = file_of(path)
    cut: list[int] = []
    num_steps, start = 0, 0
    for number, line in enumerate(_lines(file), 1):
        place, start = start, start + len(line)
        # a line cut inside a letter is no text, and shall cost that line only
        if not (text := line.decode("utf-8", errors="replace")).strip():
            continue
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            cut.append(number)
            continue
        num_steps += 1
        yield place, _checked(entry, f"{file}, line {number}")
    if not num_steps:
        where = f", only line {cut[0]}, which is not a step's record" if cut else ""
        raise ConfigError(f"{file} holds no step{where}. Train with PlanMetricsCallback(record=True).")
    if cut:
        logger.warning("%s: lines %s were cut short and are left out.", file, ", ".join(map(str, cut)))


def _lines(file: Path) -> Iterator[bytes]:
    """Read a file's lines, with their ends.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with file.open("rb") as lines:
            yield from lines
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ConfigError(f"Cannot read {str(file)!r}: {getattr(error, 'strerror', None) or error}.") from error


def record_at(path: str | Path, place: int) -> dict[str, Any]:
    """Read one record again, whose line `scan` found to begin at this byte."""
    file = file_of(path)
    with file.open("rb") as lines:
        lines.seek(place)
        return _checked(json.loads(lines.readline().decode("utf-8", errors="replace")), f"{file}, byte {place}")


def file_of(path: str | Path) -> Path:
    """Return the file of records that a path names: itself, or the one in this folder."""
    file = Path(path)
    try:
        return file / "plans.jsonl" if file.is_dir() else file
    except (OSError, ValueError):  # a name that no file can have: whoever opens it says so
        return file


def _checked(record: object, place: str) -> dict[str, Any]:
    """Return a record whose fields are what they must be, and no others.

    Raises:
        ConfigError: a field is missing, or is not what it must be.
    """
    if not isinstance(record, dict):
        raise ConfigError(f"{place} is not a step's record: it holds {record!r:.60}.")
    if missing := [name for name in COLUMNS if name not in record]:
        raise ConfigError(f"{place} is not a step's record: it lacks {', '.join(missing)}.")
    values: dict[str, Any] = {
        **{name: record[name] for name in COLUMNS},
        # older records are without these
        "is_lockstep": record.get("is_lockstep", False),
        "peak_bytes": record.get("peak_bytes", 0),
        # of steps with images only
        "planned_lengths": record.get("planned_lengths", record["lengths"]),
    }
    try:
        plan = Plan.from_dict(values["plan"])
    except HeteroError as error:
        raise ConfigError(f"{place}: {error}") from error
    lengths, busy_s = values["lengths"], values["busy_s"]
    rules = {
        "step": is_step(values["step"]),
        "lengths": _is_list(lengths, plan.num_samples) and _are_whole(lengths, MOST_TOKENS, least=1),
        "planned_lengths": _is_list(planned := values["planned_lengths"], plan.num_samples)
        and _are_whole(planned, MOST_TOKENS, least=1),
        "seconds": _is_seconds(values["seconds"]),
        "wait_s": _is_seconds(values["wait_s"]),
        "busy_s": _is_list(busy_s, len(plan.micro_batches))
        and all(_is_list(ranks, plan.num_ranks) and _are_seconds(ranks) for ranks in busy_s),
        "is_lockstep": isinstance(values["is_lockstep"], bool),
        "peak_bytes": _is_whole(values["peak_bytes"], MOST_BYTES, least=0),
    }
    if wrong := next((name for name, is_right in rules.items() if not is_right), None):
        raise ConfigError(f"{place}: {wrong} is {values[wrong]!r:.60}, which the plan's step cannot have.")
    if not lengths or not all(map(_is_seconds, (plan.seconds, plan.lower_bound_s, plan.planning_s))):
        raise ConfigError(f"{place}: its plan is of no samples, or takes {plan.seconds} seconds.")
    return values


def priced(record: Record) -> Sequence[int]:
    """Return the lengths that a step's plan was made of: its samples' own, but where they have images."""
    return record.get("planned_lengths", record["lengths"])


def is_step(value: object) -> TypeGuard[int]:
    """Tell whether a value from JSON is a number of a step."""
    return _is_whole(value, MOST_STEPS, least=0)


def _is_list(value: object, size: int) -> bool:
    """Tell whether a value from JSON is a list of this size."""
    return isinstance(value, list) and len(value) == size


def _is_whole(value: object, most: int, least: int) -> bool:
    """Tell whether a value from JSON is a whole number in these limits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _are_whole(values: Sequence[Any], most: int, least: int) -> bool:
    """Tell whether values from JSON are all whole numbers in these limits."""
    return set(map(type, values)) <= {int} and (not values or (least <= min(values) and max(values) <= most))


def _are_seconds(values: Sequence[Any]) -> bool:
    """Tell whether values from JSON are all durations."""
    if not set(map(type, values)) <= {int, float} or not values:
        return not values
    # NaN is neither the least nor the most, unless it comes first; but a sum with it is NaN
    return min(values) >= 0 and max(values) <= MOST_SECONDS and not math.isnan(sum(values))


def _is_seconds(value: object) -> bool:
    """Tell whether a value from JSON is a duration."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= MOST_SECONDS  # which NaN is not
