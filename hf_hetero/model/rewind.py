"""What a forward or backward pass may change, as it was before: a step that came to no end can begin again."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_hetero.model.logged_means import COUNTED


@dataclass(frozen=True, slots=True)
class RandomNumbers:
    """`RandomNumbers` are those that come next.

    Args:
        device: where some of them are drawn.
        states: of Python's generator, numpy's, torch's, and the device's, if that is another.
    """

    device: torch.device
    states: tuple[Any, Any, torch.Tensor, torch.Tensor | None]

    @classmethod
    def now(cls, device: torch.device) -> RandomNumbers:
        """Note how things are now."""
        of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, (random.getstate(), np.random.get_state(), torch.get_rng_state(), of_device))

    def bring_again(self) -> None:
        """Have the same random numbers come again."""
        python, numpy, cpu, of_device = self.states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, self.device)


@dataclass(frozen=True, slots=True)
class Before:
    """A `Before` is what forward and backward may change, as it was before a step. Weights are not among it.

    Args:
        trainer: counts in what is called (`logged_means.COUNTED`).
        model: whose gradients, and buffers, these are.
        random_numbers: that came next.
        buffers: of the model: the module, the buffer's name, the buffer, a copy of it.
        counts: of the trainer.
        has_gradients: there were some already, which could not be told from those of the step.
    """

    trainer: Any
    model: torch.nn.Module
    random_numbers: RandomNumbers
    buffers: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]]
    counts: dict[str, Any]
    has_gradients: bool

    @classmethod
    def now(cls, trainer: Any, model: torch.nn.Module, device: torch.device) -> Before:
        """Note how things are now."""
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        return cls(
            trainer,
            model,
            RandomNumbers.now(device),
            buffers,
            {name: deepcopy(vars(trainer)[name]) for name in COUNTED if name in vars(trainer)},
            any(p.grad is not None for p in model.parameters()),
        )

    def restore(self) -> None:
        """Make things as they were; there are no gradients then."""
        self.model.zero_grad(set_to_none=True)
        for module, name, buffer, copy in self.buffers:
            setattr(module, name, buffer)
            with torch.no_grad():
                buffer.copy_(copy)
        vars(self.trainer).update(deepcopy(self.counts))
        self.restore_random_numbers()

    def restore_random_numbers(self) -> None:
        """Have the same random numbers come again."""
        self.random_numbers.bring_again()
