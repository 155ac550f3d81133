"""This advises on a run before it is paid for: what fits, how fast it is by estimate, and what to change next."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from hf_hetero.advice.levers import Lever, Run, planner_of, pulled
from hf_hetero.advice.outlook import Outlook, longest, longest_by_degree, outlook
from hf_hetero.errors import ConfigError
from hf_hetero.forecast.forecast import Forecast, Model, forecast_of
from hf_hetero.forecast.machines import MOST_PER_NODE, Machines, machines_named
from hf_hetero.what_if.sources import Source, global_batches

ADVICE_FORMAT = "hf-hetero-advice/1"
SAMPLES_A_RANK = 8
STEPS = 4
DAY_S = 86_400
ROUND_TOKENS = 1_000_000_000
"""What days are said for where a mix has no end."""
WORTH = 1.02
"""What a lever must gain to be advised: estimates are off by as much."""


@dataclass(frozen=True, slots=True)
class Advice:
    """`Advice` is everything that `hf-hetero advise` says; seconds and tokens are by estimate.

    Args:
        run: that it is about.
        forecast: its cost model, and in words what it is of.
        source: lengths of what is trained on.
        batch_size: samples of a step, over all ranks.
        num_fitting: samples of the source that fit; the outlook is of these alone.
        context_tokens: the longest of them that the run must be able to take.
        num_tokens: to be trained on in all.
        holds: the longest sample that fits; what groups do -> degree -> tokens.
        outlook: of some steps.
        levers: changes, in the order in which they are told.
    """

    run: Run
    forecast: Forecast
    source: Source
    batch_size: int
    num_fitting: int
    context_tokens: int
    num_tokens: int
    holds: dict[str, dict[int, int]]
    outlook: Outlook
    levers: tuple[Lever, ...]

    @property
    def fits(self) -> bool:
        """Return whether every sample fits."""
        return self.num_fitting == self.source.lengths.size

    def days(self, tokens_per_s: float) -> float:
        """Return how long the run takes at a speed."""
        return self.num_tokens / tokens_per_s / DAY_S

    def next_lever(self) -> Lever | None:
        """Return the change to try first; None: none gains what estimates can tell.

        Where samples do not fit, that is the first that makes room for all of them. Else it is that which gains most
        without more GPUs, or with them, if there is none.
        """
        needed = int(self.source.lengths.max())
        if not self.fits:
            return next((lever for lever in self.levers if (lever.longest_tokens or 0) >= needed), None)
        gaining = [lever for lever in self.levers if self.gain(lever) >= WORTH and not _is_another_task(lever)]
        free = [lever for lever in gaining if lever.num_gpus <= self.run.machines.num_ranks]
        return max(free or gaining, key=self.gain, default=None)

    def gain(self, lever: Lever) -> float:
        """Return how many times as fast a change makes the run; 0 where the steps would not fit."""
        return (lever.tokens_per_s or 0.0) / self.outlook.tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form (format hf-hetero-advice/1)."""
        lever = self.next_lever()
        return {
            "format": ADVICE_FORMAT,
            "estimated": True,
            "model": self.forecast.trained,
            "gpus": self.run.machines.name,
            "source": self.source.name,
            "batch_size": self.batch_size,
            "num_samples": int(self.source.lengths.size),
            "num_fitting": self.num_fitting,
            "num_tokens": self.num_tokens,
            "longest_by_degree": self.holds,
            "adaptive": {
                "tokens_per_s": self.outlook.tokens_per_s,
                "days": self.days(self.outlook.tokens_per_s),
                "ratio_to_bound": self.outlook.adaptive_s / self.outlook.bound_s,
            },
            "static": {
                "degree": self.outlook.best_degree,
                "tokens_per_s": self.outlook.static_tokens_per_s,
                "days": self.days(self.outlook.static_tokens_per_s),
            },
            "levers": [
                {
                    "name": lever.name,
                    "num_gpus": lever.num_gpus,
                    "longest_tokens": lever.longest_tokens,
                    "tokens_per_s": lever.tokens_per_s,
                    "gain": self.gain(lever),
                }
                for lever in self.levers
            ],
            "next": lever and lever.name,
            "setting": asdict(self.run.setting),
        }


def advise(
    source: Source,
    model: Model,
    run: Run,
    batch_size: int | None = None,
    seed: int = 0,
    epochs: float = 1.0,
    steps: int = STEPS,
) -> Advice:
    """Advise on a run.

    Args:
        source: lengths of what is trained on.
        model: by `forecast.model_named`.
        run: GPUs, and how it would be trained.
        batch_size: samples of a step, over all ranks; None: 8 a rank, or as many as there are.
        seed: of the order of samples.
        epochs: over the source; a mix has no end, and days are said for a billion tokens.
        steps: that are planned, if there are enough samples.

    Raises:
        ConfigError: the model does not fit, with what would do; or a number is out of range.
        InfeasibleBatch: no sample fits.
    """
    if not 0 < epochs <= 1e6:
        raise ConfigError(f"--epochs {epochs:g}: it must be above 0, and at most a million.")
    num_ranks = run.machines.num_ranks
    _check_batch(batch_size, num_ranks)
    found = forecast_of(model, run.machines, run.setting)
    planner = planner_of(model, run)
    most = longest(found.cost, run.max_degree or num_ranks)
    lengths = source.lengths[source.lengths <= most]
    if not lengths.size:
        raise ConfigError(
            f"Of {source.lengths.size:,} samples none fits: the shortest has {int(source.lengths.min()):,} tokens, and "
            f"{run.machines.name} hold {most:,}. Take more GPUs, or --lora-r 16, --fsdp or --offload."
        )
    context = min(source.longest_tokens, most)
    fitting = Source(source.name, lengths, context, is_drawn=source.is_drawn)
    size = batch_size or min(SAMPLES_A_RANK * num_ranks, int(lengths.size))
    batches = global_batches(fitting, size, max(1, min(steps, int(lengths.size) // size)), seed)
    return Advice(
        run=run,
        forecast=found,
        source=source,
        batch_size=size,
        num_fitting=int(lengths.size),
        context_tokens=context,
        num_tokens=ROUND_TOKENS if source.is_drawn else int(epochs * int(lengths.sum())),
        holds=longest_by_degree(found.cost, run.max_degree or num_ranks),
        outlook=outlook(batches, planner, context),
        levers=tuple(pulled(model, run, found.is_sharded, batches, context)),
    )


def machines_of(gpus: str) -> Machines:
    """Read GPUs as `machines_named`; of "16xH100", eight share a node, as nearly everywhere.

    Raises:
        ConfigError: as `machines_named`.
    """
    found = re.fullmatch(r"(\d{1,9})\s*x\s*([^\d\s].*)", gpus.strip(), re.IGNORECASE)
    if found is not None and int(found[1]) > MOST_PER_NODE and int(found[1]) % MOST_PER_NODE == 0:
        return machines_named(f"{int(found[1]) // MOST_PER_NODE}x{MOST_PER_NODE}x{found[2]}")
    return machines_named(gpus)


def num_drawn(machines: Machines, batch_size: int | None, steps: int = STEPS) -> int:
    """Return how many samples a mix is asked for."""
    return (batch_size or SAMPLES_A_RANK * machines.num_ranks) * steps


def _check_batch(batch_size: int | None, num_ranks: int) -> None:
    """Refuse a number of samples that ranks cannot take in equal parts."""
    if batch_size is None or (batch_size > 0 and batch_size % num_ranks == 0):
        return
    near = sorted({max(1, batch_size // num_ranks) * num_ranks, (max(0, batch_size) // num_ranks + 1) * num_ranks})
    raise ConfigError(
        f"--batch-size {batch_size}: {num_ranks} ranks take equal numbers of samples. "
        f"Take {' or '.join(map(str, near))}."
    )


def _is_another_task(lever: Lever) -> bool:
    """Tell whether a change trains something else, which speed alone must not decide."""
    return "lora_r" in lever.name
