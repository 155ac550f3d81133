"""This counts how evenly a mixture of experts uses its experts, over all tokens of a step.

Whatever the plan, the counts are those of the step's tokens, so they can be compared between plans and between runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_hetero.model.backward import in_backward


class ExpertLoad:
    """`ExpertLoad` counts the tokens that each expert gets: it watches the model's routers in a micro-batch.

    Args:
        model: a transformers model; it says itself which of its modules are routers (`_can_record_outputs`).
    """

    def __init__(self, model: Any) -> None:
        self._routers = list(_routers(model))
        self._counts: list[torch.Tensor | None] = [None] * len(self._routers)
        experts = getattr(model.config, "num_local_experts", None) or getattr(model.config, "num_experts", None)
        self._num_experts: int = experts or getattr(model.config, "n_routed_experts", None) or 0

    def __bool__(self) -> bool:
        """Return whether there is anything to count."""
        return bool(self._routers) and self._num_experts > 0

    def _counter(self, number: int) -> Any:
        """Make the hook of a router: it counts the experts that its output names in its first tensor of integers."""

        def count(module: torch.nn.Module, _: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            chosen = next((x for x in outputs if isinstance(x, torch.Tensor) and not x.is_floating_point()), None)
            if not module.training or chosen is None or in_backward():  # counted when it was first computed
                return
            # no bincount: it waits for the device
            counts = torch.zeros(self._num_experts, dtype=torch.int64, device=chosen.device)
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
        """Return the tokens of each expert of each layer since the last call: num_layers x num_experts, by layer."""
        empty = torch.zeros(self._num_experts, dtype=torch.int64)
        counts = [empty if layer is None else layer.cpu() for layer in self._counts]
        self._counts = [None] * len(self._routers)
        return torch.cat(counts).tolist()

    def of_all(self, ranks: list[list[int]]) -> tuple[float, ...]:
        """Return, for each layer, tokens of its busiest expert by those of a mean one, of what each rank has taken.

        1 is even; the number of experts, the worst.
        """
        layers = torch.tensor(ranks, dtype=torch.float64).sum(0).view(-1, self._num_experts)
        return tuple((layers.amax(1) / layers.mean(1).clamp(min=1e-12)).tolist())


def _routers(model: Any) -> Iterator[torch.nn.Module]:
    """Yield the modules of the class that a transformers model declares to give `router_logits`."""
    for part in model.modules():
        recorder = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", recorder)
        if isinstance(kind, type):
            yield from (module for module in model.modules() if isinstance(module, kind))
            return
