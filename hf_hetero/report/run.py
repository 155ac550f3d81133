"""A run, as a report looks at it: a row for each step, and whatever else was written down beside its records.

A long run is not held in memory: of each step stays its row, and the few that are drawn whole are read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_hetero.costs import CostModel
from hf_hetero.errors import HeteroError
from hf_hetero.report.records import Record, file_of, is_step, record_at, scan
from hf_hetero.report.rows import StepRow, row_of

RUN_FORMAT = "hf-hetero-run/1"
"""Of `run.json`, which `callbacks.recording` writes."""
MOST_LOSS = 1e9
MOST_WORDS = 200
"""Letters of a setting that are shown."""


@dataclass(frozen=True)
class Run:
    """A `Run` is what a report is made of.

    Args:
        rows: of the steps, ascending.
        record_of: reads the whole record of a step.
        settings: by heading ("Model", "Training", ...): names and values, as text.
        num_steps: that the run shall have; None: nobody said.
        has_ended: it said that it came to its end; None: nobody would have said so.
        losses: by step, as they were logged.
        cost_model: what plans were made by; None: not known.
    """

    rows: Sequence[StepRow]
    record_of: Callable[[int], Record]
    settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    num_steps: int | None = None
    has_ended: bool | None = None
    losses: Mapping[int, float] = field(default_factory=dict[int, float])
    cost_model: CostModel | None = None

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample."""
        return max(row.longest for row in self.rows)


def run_of(records: Sequence[Record], cost_model: CostModel | None = None) -> Run:
    """Make a run of records in memory, and of what plans were made by."""
    by_step = {record["step"]: record for record in records}
    return Run([row_of(record) for record in records], by_step.__getitem__, cost_model=cost_model)


def read_run(path: str | Path, cost_model: CostModel | None = None) -> Run:
    """Read a run from the folder of its records, or from their file: also one that is not at its end.

    Beside `plans.jsonl` there may be `run.json` (settings, cost model) and `logs.jsonl` (losses). What is odd in them
    is left out, because a page without it is better than none.

    Args:
        path: of the records.
        cost_model: what plans were made by, where the caller knows better than `run.json`.

    Raises:
        ConfigError: as `read_records`.
    """
    rows: dict[int, tuple[StepRow, int]] = {}
    for place, record in scan(path):
        rows[record["step"]] = row_of(record), place  # of a step trained twice, the last counts
    folder = file_of(path).parent
    said = _read_object(folder / "run.json")
    if said.get("format") != RUN_FORMAT:
        said = {}
    num_steps, has_ended = said.get("num_steps"), said.get("has_ended")
    return Run(
        rows=[rows[step][0] for step in sorted(rows)],
        record_of=lambda step: record_at(path, rows[step][1]),
        settings=_settings(said.get("settings")),
        num_steps=num_steps if is_step(num_steps) and num_steps > 0 else None,
        has_ended=has_ended if isinstance(has_ended, bool) else None,
        losses=_losses(folder / "logs.jsonl"),
        cost_model=cost_model or _cost_model(said.get("cost_model")),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is none."""
    try:
        found: object = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _settings(found: object) -> dict[str, dict[str, str]]:
    """Return settings as text, whatever a file holds."""
    headings: dict[Any, Any] = found if isinstance(found, dict) else {}
    return {
        _words(heading): {_words(name): _words(value) for name, value in dict[Any, Any](values).items()}
        for heading, values in headings.items()
        if isinstance(values, dict) and values
    }


def _words(value: object) -> str:
    """Write a value for people, not too long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MOST_WORDS else f"{text[:MOST_WORDS]}…"


def _losses(path: Path) -> dict[int, float]:
    """Read the losses of a run from its logs; of a step logged twice, the last counts."""
    losses: dict[int, float] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return {}
    for line in lines:
        try:
            entry: Any = json.loads(line)
            step, loss = entry["step"], entry["loss"]
        except (ValueError, RecursionError, KeyError, TypeError):
            continue
        if is_step(step) and isinstance(loss, float | int) and abs(loss) <= MOST_LOSS:  # which NaN is not
            losses[step] = float(loss)
    return dict(sorted(losses.items()))


def _cost_model(found: object) -> CostModel | None:
    """Return the cost model of a file, if it is one."""
    try:
        return CostModel.from_dict(found) if isinstance(found, dict) else None
    except HeteroError:
        return None
