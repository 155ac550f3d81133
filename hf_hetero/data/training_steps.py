"""The planned steps of a run: drawn and planned ahead, one after the other; and once more where memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader

from hf_hetero.data.plan_ahead import PlanAhead
from hf_hetero.data.streams.reading import Position
from hf_hetero.data.streams.stream import Stream
from hf_hetero.errors import ConfigError
from hf_hetero.step import Step, StepBatch

REMEDIES = {
    "batch_size": "per_device_train_batch_size x gradient_accumulation_steps x ranks must stay the same; "
    "HeteroConfig.global_batch_size={} keeps it so on any number of ranks",
    "rows": "go back to the dataset it was trained on",
    "lengths": "go back to the dataset, and to the tokenizer, it was trained on",
}


@dataclass(slots=True)
class TrainingData:
    """`TrainingData` is what a run trains on.

    Args:
        loader: its items are planned steps. Trainer never sees it, so accelerate does not deal them out among ranks.
        plans: where they come from.
        order: what decides which samples make which step, to be compared when a checkpoint is resumed.
        read: a step -> this rank's tensors, if its share is not what the loader has read. A collective of all ranks.
        stream: what reads a dataset that can only be iterated; on rank 0 only.
        entered: where a stream goes on, on all ranks; None: at its start, or a checkpoint does not say.
    """

    loader: DataLoader[Any]
    plans: PlanAhead
    order: dict[str, Any]
    read: Callable[[Step], StepBatch]
    stream: Stream | None = None
    entered: Position | None = None
    _epoch: Any = None
    _steps: Iterator[Any] = field(default_factory=lambda: iter(()))

    def steps_of(self, epoch: object) -> Iterator[Any]:
        """Return the steps left of the epoch that an object stands for; another object begins the next epoch."""
        if epoch is not self._epoch:
            self._epoch, self._steps = epoch, iter(self.loader)
        return self._steps

    def planned_again(self, step: Step) -> Iterator[StepBatch]:
        """Give a step once more, with a plan by the cost model of now, and this rank's share of that. A collective."""
        yield self.read(self.plans.again(step))

    def close(self) -> None:
        """End what works in the background."""
        self.plans.close()
        if self.stream is not None:
            self.stream.close()


def check_order(current: dict[str, Any], saved: dict[str, Any], by_itself: bool = False) -> None:
    """Refuse to go on with other data: what is left of an epoch would not be what was not trained yet.

    Args:
        current, saved: what decides the order, now and in the checkpoint.
        by_itself: nobody asked for the checkpoint, which may be another run's.

    Raises:
        ConfigError: what differs, and what to do.
    """
    anew = "or start the data anew with ignore_data_skip=True"
    if by_itself:
        anew = "or, if that was another run, choose another output_dir (HeteroConfig.auto_resume found it)"
    for name in saved:
        if name in current and name != "contents" and current[name] != saved[name]:
            remedy = REMEDIES.get(name, "set it to {}").format(saved[name])
            raise ConfigError(
                f"The data's {name} was {saved[name]} when the checkpoint was written and is {current[name]} now, so "
                f"steps would draw other samples: {remedy}; {anew}."
            )
    rows: dict[str, int] = saved.get("contents", {})
    if changed := sorted(int(row) for row in rows if current.get("contents", {}).get(row, rows[row]) != rows[row]):
        raise ConfigError(
            f"Row {changed[0]} of the data holds other tokens, labels or weights than when the checkpoint was written "
            f"({len(changed)} of {len(rows)} rows that were looked at do): {REMEDIES['lengths']}; {anew}."
        )
