"""A model that does not fit is refused with what would do: more GPUs, or another setting, each of them tried."""

from __future__ import annotations

from collections.abc import Callable

from hf_hetero.costs import CostModel
from hf_hetero.errors import ConfigError
from hf_hetero.estimate.devices import GIB
from hf_hetero.estimate.memory import Shards, model_state_bytes
from hf_hetero.estimate.model_shape import ModelShape
from hf_hetero.forecast.machines import MOST_GPUS, Machines, doubled


def what_would_fit(
    model: str,
    shape: ModelShape,
    machines: Machines,
    shards: Shards | None,
    estimated: Callable[[ModelShape, Machines, Shards | None], CostModel],
    adapted: ModelShape | None,
) -> str:
    """Say that a model does not fit, and what would: more GPUs, or another setting.

    Args:
        model: its name.
        shape, machines, shards: what is trained, and where.
        estimated: estimates a run's cost model.
        adapted: the model with adapters instead of all weights; None: it has them already.
    """

    def fits(machines: Machines, shards: Shards | None, shape: ModelShape = shape) -> bool:
        try:
            estimated(shape, machines, shards)
        except ConfigError:
            return False
        return True

    ways: list[str] = []
    if shards is None and machines.num_ranks > 1 and fits(machines, Shards()):
        ways.append("weights sharded over the ranks (--fsdp)")
    if shards is not None and shards.replicas > 1 and fits(machines, Shards()):
        ways.append("weights sharded over all ranks instead of those of a replica (--fsdp)")
    more = doubled(machines)
    while more.num_ranks <= MOST_GPUS and not fits(more, Shards()):
        more = doubled(more)
    if more.num_ranks <= MOST_GPUS:
        ways.append(f"{more.num_ranks} GPUs ({more.name}), with weights sharded over them")
    if adapted is not None and fits(machines, Shards(), adapted):
        ways.append("adapters instead of all weights (--lora-r 16)")
    if fits(machines, Shards(offloaded=True)):
        ways.append("FSDP that keeps weights in the host's memory (fsdp_offload_params of accelerate)")
    ways.append("a smaller model")
    assert machines.topology.memory_bytes is not None
    return (
        f"{model} does not fit on {machines.name}: weights, gradients and optimizer are "
        f"{model_state_bytes(shape) / GIB:,.1f} GiB {_over(machines, shards)}, and a rank has "
        f"{machines.topology.memory_bytes / GIB:.1f} GiB for its part and its tokens. What would do: {'; '.join(ways)}."
    )


def _over(machines: Machines, shards: Shards | None) -> str:
    if shards is None:
        return "on each rank"
    return "over all ranks" if shards.replicas == 1 else f"over {machines.num_ranks // shards.replicas} ranks"
