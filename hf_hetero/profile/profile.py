"""`profile` measures the cost model of a model on the machine it runs on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

import hf_hetero
from hf_hetero.costs import CostModel
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.estimate.subject import subject_of
from hf_hetero.model.by_layer import fewest
from hf_hetero.profile.fitting import Fitted, Measured, fitted
from hf_hetero.profile.fitting_memory import with_measured_memory
from hf_hetero.profile.models import Subject
from hf_hetero.profile.timing import ScriptedTrainer, temporary_folder, timed, trainer_for
from hf_hetero.profile.trials import Trial, in_steps, trials
from hf_hetero.progress import shows_bars
from hf_hetero.trainer.machine import Ground

MOST_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Tokens of the longest sample that is timed, by kind of device, unless the user says otherwise."""
GLANCE = ((256,), (1024,))
"""Samples that a first glance at the machine is taken with."""
ROUNDS = 3
"""Rounds that the time allowed must suffice for; where it would not, groups are smaller."""
OTHER_METHODS = {"gather", "ring", "token_ring"}
"""Methods that are timed beside the exchange of heads; "ulysses_ring" is made of what is known of two of them."""
LEAST_ROOM = 256
"""Tokens of a rank below which groups are not made smaller."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A `Profile` is what was measured.

    Args:
        cost_model: of the whole model; its `source` says what was measured, where and when.
        measured: the groups, with their seconds.
        errors: |predicted / measured - 1| of each group, by the cost model.
        is_first: this is the first rank, which speaks for all.
    """

    cost_model: CostModel
    measured: tuple[Measured, ...]
    errors: tuple[float, ...]
    is_first: bool


@dataclass(frozen=True, slots=True)
class _Glance:
    """A `_Glance` is what a short look at the machine tells.

    Args:
        ground: what an estimate of the model that was looked at stands on.
        cost_model: that estimate, under the user's limits, with its seconds corrected.
        num_ranks: of the run.
        device: of this rank.
        dtype: in which the model computes.
        is_first: this is the first rank.
    """

    ground: Ground
    cost_model: CostModel
    num_ranks: int
    device: torch.device
    dtype: torch.dtype
    is_first: bool


def profile(
    subject: Subject, seconds: float = 75.0, num_ranks: int = 8, command: str = "hf-hetero profile", shows: bool = True
) -> Profile:
    """Measure the cost model of a model on this machine. A collective of all ranks.

    Groups of many lengths and of every degree are timed as training computes them, and the cost model's formula is
    fitted to their medians. So is memory to the most bytes they held (`fitting_memory`). A deep model is timed and
    weighed with few layers, at two depths. On a single rank the exchanges are estimated, and `source` says so.

    Args:
        subject: what is trained.
        seconds: to time for, after first rounds that warm up.
        num_ranks: of the run to come, where this process is the only rank.
        command: to be named in `source`.
        shows: a progress bar, on the first rank.

    Raises:
        HeteroError: the model is refused, or a setting; or timing was cut short.
    """
    depths = subject.depths()
    with temporary_folder() as folder, _bar(seconds, shows) as tick:
        options = {**subject.arguments, "output_dir": folder}
        parts = [_timed(subject, options, depth, seconds / len(depths), tick) for depth in depths]
    measured, glance = [one for found, _ in parts for one in found], parts[-1][1]
    states = {depth: part.ground.state_bytes for depth, (_, part) in zip(depths, parts, strict=True)}
    shape, topology = _whole_shape(subject, glance.ground.shape), glance.ground.topology
    if glance.num_ranks == 1 and num_ranks > 1:  # of a run to come, whose ranks share this host if they are CPUs
        share = num_ranks if glance.device.type == "cpu" else 1
        topology = replace(topology, num_ranks=num_ranks, memory_bytes=(topology.memory_bytes or 0) // share)
    ground = replace(glance.ground, shape=shape, topology=topology)
    estimate = ground.estimated()
    found = fitted(measured, estimate, subject.num_layers)
    cost = with_measured_memory(found.cost_model, measured, states, ground.state_bytes, subject.num_layers)
    if ground.states is not None and glance.num_ranks == 1:  # what such layers keep of other ranks was not weighed
        token_bytes = max(cost.activation_bytes_per_token, estimate.activation_bytes_per_token)
        cost = replace(cost, activation_bytes_per_token=token_bytes)
    if most := ground.hetero.max_tokens_per_rank:
        cost = cost.with_capacity(most)
    cost = replace(
        cost,
        name="profile",
        source=_source(command, found, measured, glance),
        model=subject_of(shape, subject.config.get_text_config(decoder=True).model_type, glance.dtype),
    )
    return Profile(cost, tuple(measured), tuple(found.errors.tolist()), glance.is_first)


# ----------------------------------------------------------------------------------------------------- what is prepared


def _timed(
    subject: Subject, options: dict[str, Any], depth: int, seconds: float, tick: Callable[[float], None]
) -> tuple[list[Measured], _Glance]:
    """Time a model of so many layers."""
    glance = _glance(subject, options, depth)
    trainer = _trainer(subject, options, depth, _chosen(subject, glance, seconds), glance.num_ranks)
    return timed(trainer, depth, seconds, tick), glance


def _trainer(
    subject: Subject, options: dict[str, Any], depth: int, chosen: Sequence[Trial], num_ranks: int
) -> ScriptedTrainer:
    # a new model for each trainer: sharded weights cannot be given back
    model, vocab = subject.build(depth), subject.config.get_text_config(decoder=True).vocab_size
    return trainer_for(model, options, dict(subject.hetero), in_steps(chosen, num_ranks), vocab)


def _glance(subject: Subject, options: dict[str, Any], depth: int) -> _Glance:
    """Look at the machine for a moment: what it is, and how far its estimate is off."""
    longest = _longest(subject, "cpu")
    chosen = [Trial(1, (min(length, longest),)) for (length,) in GLANCE]
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = _trainer(subject, options, depth, chosen, num_ranks)
    found = timed(trainer, depth, 0.0, lambda _: None)
    machine = trainer._between_runs.machine  # pyright: ignore[reportPrivateUsage]
    assert machine is not None
    slower = float(np.median([one.seconds / machine.cost_model.seconds(one.trial.lengths, 1) for one in found]))
    cost = machine.cost_model
    faster = replace(
        cost,
        attention_s_per_token2=cost.attention_s_per_token2 * slower,
        linear_s_per_token=cost.linear_s_per_token * slower,
        micro_batch_s=cost.micro_batch_s * slower,
        activation_policies={},
    )
    dtype = trainer._compute_dtype()  # pyright: ignore[reportPrivateUsage]
    return _Glance(machine.ground, faster, num_ranks, trainer.args.device, dtype, trainer.args.process_index == 0)


def _longest(subject: Subject, device: str) -> int:
    """Return the tokens of the longest sample that is timed."""
    positions = getattr(subject.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(subject.max_length or MOST_TOKENS[device], positions or MOST_TOKENS[device])


def _chosen(subject: Subject, glance: _Glance, seconds: float) -> list[Trial]:
    """Choose groups that fit the memory, and of which the time allowed suffices for several rounds."""
    cost, text = glance.cost_model, subject.config.get_text_config(decoder=True)
    longest = _longest(subject, glance.device.type)
    most_heads = fewest(text, "num_attention_heads", 1)
    degrees = [degree for degree in cost.degrees(glance.num_ranks) if degree <= most_heads]
    room = min(cost.capacity_tokens, longest)
    others = [] if cost.kv_bytes_per_token is None else OTHER_METHODS & set(glance.ground.hetero.methods)
    while True:
        chosen = trials(degrees, room, longest, glance.ground.policies, sorted(others))
        round_s = sum(cost.seconds(trial.lengths, trial.degree) for trial in chosen)
        if round_s * ROUNDS <= seconds or room <= LEAST_ROOM:
            return chosen
        room = max(LEAST_ROOM, round(0.8 * room))


def _whole_shape(subject: Subject, part: ModelShape) -> ModelShape:
    """Return the shape of the whole model, trained as the part of it was."""
    whole = subject.build(subject.num_layers, "meta")
    text = subject.config.get_text_config(decoder=True)
    params = list(whole.parameters())
    num_params = sum(p.numel() for p in params)
    inactive = (part.num_params - part.active_params) * subject.num_layers // part.num_layers
    return replace(
        part,
        num_layers=text.num_hidden_layers,
        num_params=num_params,
        active_params=max(1, num_params - inactive),
        trainable_params=sum(p.numel() for p in params if p.requires_grad),
        param_bytes=sum(p.numel() * p.element_size() for p in params),
    )


# --------------------------------------------------------------------------------------------------------- what is said


@contextmanager
def _bar(seconds: float, shows: bool) -> Iterator[Callable[[float], None]]:
    """Show how much of the time is over."""
    is_hidden = not shows or os.environ.get("RANK", "0") != "0" or not shows_bars()
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=seconds, desc="Timing groups", bar_format=form, disable=is_hidden, leave=False) as bar:

        def tick(passed_s: float) -> None:
            bar.update(min(passed_s, max(0.0, seconds - bar.n)))

        yield tick


def _source(command: str, found: Fitted, measured: Sequence[Measured], glance: _Glance) -> str:
    """Say what was measured, with what, where and when, and how well the formula follows it."""
    degrees = sorted({one.trial.degree for one in measured})
    depths = sorted({one.num_layers for one in measured})
    longest = max(max(one.trial.lengths) for one in measured)
    versions = {"hf-hetero": hf_hetero.__version__, **{name: version(name) for name in ("torch", "transformers")}}
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    exchanges = "exchanges estimated" if degrees == [1] else f"degrees {', '.join(map(str, degrees))}"
    return (
        f"measured: `{command}` on {_machine(glance.device)}, {glance.num_ranks} ranks, {packages}, "
        f"{datetime.date.today().isoformat()}; {len(measured)} groups with samples of up to {longest} tokens, "
        f"{exchanges}, at {' and '.join(map(str, depths))} layers; the formula is within {np.median(found.errors):.1%} "
        f"of half of them, and within {np.quantile(found.errors, 0.9):.1%} of nine in ten; memory of up to "
        f"{max(one.peak_bytes for one in measured) / 2**30:.3g} GiB was weighed"
    )


def _machine(device: torch.device) -> str:
    """Name the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{platform.processor() or platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
