"""This counts how evenly a mixture of experts uses its experts, over all tokens of a step.

Whatever the plan, the counts are those of the step's tokens, so they can be compared between plans and between runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_hetero.model.backward import in_backward

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the experts of a layer."""


class ExpertLoad:
    """`ExpertLoad` counts the tokens that each expert gets: it watches the model's routers in a micro-batch.

    Args:
        model: a transformers model; it says itself which of its modules are routers (`_can_record_outputs`).
    """

    def __init__(self, model: Any) -> None:
        self._routers = list(_routers(model))
        self._counts: list[torch.Tensor | None] = [None] * len(self._routers)
        self._num_experts = [_num_experts(router, model.config) for router in self._routers]

    def __bool__(self) -> bool:
        """Return whether there is anything to count."""
        return bool(self._routers) and all(self._num_experts)

    def _counter(self, number: int) -> Any:
        """Make the hook of a router: it counts the experts that its output names in its first tensor of integers."""

        def count(module: torch.nn.Module, _: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            chosen = next((x for x in outputs if isinstance(x, torch.Tensor) and not x.is_floating_point()), None)
            if not module.training or chosen is None or in_backward():  # counted when it was first computed
                return
            # no bincount: it waits for the device
            counts = torch.zeros(self._num_experts[number], dtype=torch.int64, device=chosen.device)
            counts.scatter_add_(0, chosen.flatten().long(), torch.ones_like(chosen.flatten(), dtype=torch.int64))
            before = self._counts[number]
            self._counts[number] = counts if before is None else before + counts

        return count

    @contextmanager
    def micro_batch(self, num_tokens: int) -> Iterator[None]:
        """Count what is routed inside; nothing where a rank has no tokens and runs one of no sample instead."""
        watched = enumerate(self._routers if num_tokens else ())
        hooks = [router.register_forward_hook(self._counter(number)) for number, router in watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> list[int]:
        """Return the tokens of each expert of each layer since the last call, layer after layer."""
        counts = [
            torch.zeros(number, dtype=torch.int64) if layer is None else layer.cpu()
            for layer, number in zip(self._counts, self._num_experts, strict=True)
        ]
        self._counts = [None] * len(self._routers)
        return torch.cat(counts).tolist()

    def of_all(self, ranks: list[list[int]]) -> tuple[float, ...]:
        """Return, for each layer, tokens of its busiest expert by those of a mean one, of what each rank has taken.

        1 is even; the number of experts, the worst.
        """
        layers = torch.tensor(ranks, dtype=torch.float64).sum(0).split(self._num_experts)
        return tuple(float(layer.amax() / layer.mean().clamp(min=1e-12)) for layer in layers)


def _routers(model: Any) -> Iterator[torch.nn.Module]:
    """Yield the modules of the class that a transformers model declares to give `router_logits`."""
    for part in model.modules():
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", recorder)
        if isinstance(kind, type):
            yield from (module for module in model.modules() if isinstance(module, kind))
            return


def _num_experts(router: torch.nn.Module, config: Any) -> int:
    """Return how many experts a router chooses from: as many as it has weights for, experts of no weights included."""
    text = config.get_text_config(decoder=True)
    named = next((number for name in NUM_EXPERTS if isinstance(number := getattr(text, name, None), int) and number), 0)
    rows = {p.shape[0] for p in [*router.parameters(), *router.buffers()] if p.ndim}
    return named if named in rows else min((number for number in rows if number >= named), default=named)
