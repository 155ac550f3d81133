"""A lever is one change of a run, estimated and planned anew; no rule of thumb says what it is worth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hf_hetero.advice.outlook import longest, planned_speed
from hf_hetero.errors import HeteroError
from hf_hetero.estimate.devices import KNOWN_DEVICES, Device
from hf_hetero.estimate.shares import ATTENTION
from hf_hetero.forecast.forecast import Model, forecast_of
from hf_hetero.forecast.machines import MOST_GPUS, MOST_PER_NODE, Machines, doubled
from hf_hetero.forecast.setting import Setting
from hf_hetero.planner import Planner


@dataclass(frozen=True, slots=True)
class Run:
    """A `Run` is what is predicted: which GPUs, trained how, with how many ranks a sample at most."""

    machines: Machines
    setting: Setting
    max_degree: int | None = None


@dataclass(frozen=True, slots=True)
class Lever:
    """A `Lever` is one change, and what would come of it.

    Args:
        name: what to do, in words.
        num_gpus: of the run with it.
        longest_tokens: of the longest sample that would fit; None: not even the model would.
        tokens_per_s: of all GPUs in the same steps, planned; None: they would not fit.
    """

    name: str
    num_gpus: int
    longest_tokens: int | None
    tokens_per_s: float | None


def planner_of(model: Model, run: Run) -> Planner:
    """Make the planner of a run.

    Raises:
        ConfigError: not a token fits.
    """
    cost = forecast_of(model, run.machines, run.setting).cost
    return Planner(cost, run.machines.num_ranks, max_degree=run.max_degree, solver="fast")


def pulled(
    model: Model, run: Run, is_sharded: bool, batches: Sequence[Sequence[int]], context_tokens: int
) -> list[Lever]:
    """Estimate every change of a run that it leaves open, on the same steps.

    Args:
        model, run: that the changes are of.
        is_sharded: the run's weights are in parts over all ranks.
        batches: lengths of the samples of each step.
        context_tokens: the longest sample of the run.
    """
    known: list[tuple[Planner, float]] = []

    def speed(planner: Planner) -> float:
        # two kernels may be said to be equally fast: the same plans are made once
        for other, tokens_per_s in known:
            if other == planner:
                return tokens_per_s
        known.append((planner, planned_speed(batches, planner, context_tokens)))
        return known[-1][1]

    return [_pulled(name, model, changed, speed, context_tokens) for name, changed in changes(run, is_sharded)]


def changes(run: Run, is_sharded: bool) -> Iterator[tuple[str, Run]]:
    """List what could be changed of a run, in words, and the run that it would be; first what needs no other GPUs."""
    setting, machines = run.setting, run.machines
    if not setting.offload:
        yield "offload activations to the host (activation_policies: [recompute, offload])", _with(run, offload=True)
    if not setting.checkpointing:
        yield "recompute every layer (activation_checkpointing)", _with(run, checkpointing=True)
    for kernel, generations in ATTENTION.items():
        if kernel > setting.kernel and machines.card.generation in generations:
            yield f"FlashAttention {kernel[-1]}", _with(run, kernel=kernel)
    if machines.num_ranks > 1 and not is_sharded:
        yield "weights sharded over the ranks (FSDP2)", _with(run, sharded=True)
    if setting.shards is not None:
        yield "weights sharded over all ranks, not those of a replica (FSDP2)", _with(run, sharded=True, shards=None)
    elif is_sharded and machines.num_nodes > 1 and machines.ranks_per_node > 1:
        yield "weights sharded over the ranks of a node (HSDP)", _with(run, shards=machines.ranks_per_node)
    if machines.num_ranks > 1 and is_sharded:
        yield "all weights on each rank (DDP)", _with(run, sharded=False, shards=None)
    if setting.lora_r is None:
        yield "adapters instead of all weights (lora_r: 16)", _with(run, lora_r=16)
    if machines.num_nodes > 1:
        per_node = machines.ranks_per_node
        yield f"no sharing across nodes (max_degree: {per_node})", replace(run, max_degree=per_node)
    yield from _other_gpus(run)


def _other_gpus(run: Run) -> Iterator[tuple[str, Run]]:
    """List other GPUs: one more, or a node more; twice as many; the card of the same generation with more memory."""
    machines = run.machines
    more = replace(machines, num_nodes=machines.num_nodes + 1)
    if machines.num_nodes == 1 and machines.ranks_per_node < MOST_PER_NODE:
        more = replace(machines, ranks_per_node=machines.ranks_per_node + 1)
    twice = doubled(machines)
    ways = [("one card more" if more.num_nodes == machines.num_nodes else "one node more", more)]
    ways += [("twice as many", twice)] if twice != more else []
    yield from ((f"{what}: {m.name}", replace(run, machines=m)) for what, m in ways if m.num_ranks <= MOST_GPUS)
    larger = [card for card in KNOWN_DEVICES if _is_larger(card, machines.card)]
    if larger:
        card = min(larger, key=lambda card: card.card_bytes or 0.0)
        other = replace(machines, card=card)
        yield f"cards with more memory: {other.name}", replace(run, machines=other)


def _is_larger(card: Device, than: Device) -> bool:
    """Tell whether a card has more memory, and is otherwise as good: H200 for H100, and not a superchip or PCIe."""
    line, other_line = (re.sub("[^A-Z].*", "", device.name) for device in (card, than))
    return (
        (card.generation, line) == (than.generation, other_line)
        and (card.card_bytes or 0.0) > 1.1 * (than.card_bytes or 0.0)
        and card.link_bytes_per_s >= than.link_bytes_per_s
        and card.flops >= than.flops
    )


def _pulled(name: str, model: Model, run: Run, speed: Callable[[Planner], float], context_tokens: int) -> Lever:
    """Estimate one change."""
    try:
        planner = planner_of(model, run)
    except HeteroError:
        return Lever(name, run.machines.num_ranks, None, None)
    most = longest(planner.cost_model, run.max_degree or run.machines.num_ranks)
    return Lever(name, run.machines.num_ranks, most, speed(planner) if most >= context_tokens else None)


def _with(run: Run, **changes: object) -> Run:
    return replace(run, setting=replace(run.setting, **changes))  # pyright: ignore[reportArgumentType]
