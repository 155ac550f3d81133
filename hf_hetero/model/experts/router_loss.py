"""The auxiliary loss of routers is one of a whole step here; its micro-batches add the parts of it.

    loss = E * sum_e f_e * P_e        f_e: choices of expert e, P_e: sum of the routers' probabilities of e, each
                                      divided by the tokens of the step times the layers with routers

as transformers' `load_balancing_loss_func` computes it of one batch, after Switch Transformers (arXiv:2101.03961,
equations 4 to 6). f has no gradient. P is a sum over tokens, so that, once f is known, a micro-batch adds its own.

f is known after one look at all tokens: the first micro-batch, as it is trained on, and all others run forward before
it. Or it is taken for what it was in the step before, which is an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hf_hetero.errors import UnsupportedModel
from hf_hetero.model.activations import set_until

COEFFICIENT = "router_aux_loss_coef"
"""What models, and configs of text, call the factor of this loss in the whole."""
Total = Callable[[torch.Tensor], torch.Tensor]
"""A tensor of each rank -> their sum. A collective of all ranks."""


@dataclass(frozen=True, slots=True)
class RoutedStep:
    """A `RoutedStep` is what the loss has to know of a step.

    Args:
        num_tokens: of all samples.
        num_micro_batches, num_ranks: that compute it.
        total: of all ranks.
    """

    num_tokens: int
    num_micro_batches: int
    num_ranks: int
    total: Total


@dataclass(frozen=True, slots=True)
class Balance:
    """A `Balance` is what is known of all tokens of a step.

    Args:
        fractions: f of each expert, shape (num_experts,).
        loss: a scalar, without its coefficient.
    """

    fractions: torch.Tensor
    loss: torch.Tensor


def choices_of(layers: Sequence[torch.Tensor], num_tokens: int, num_used: int) -> torch.Tensor:
    """Return choices, and sums of probabilities, of each expert, over all layers: shape (2, num_experts), in fp64.

    Args:
        layers: logits of the routers of each layer, shape (..., num_experts).
        num_tokens: that count, from the first.
        num_used: experts that a token is sent to.
    """
    num_experts, device = layers[0].shape[-1], layers[0].device
    choices = torch.zeros(num_experts, dtype=torch.float64, device=device)
    probabilities = torch.zeros(num_experts, dtype=torch.float64, device=device)
    for layer in layers:
        logits = layer.reshape(-1, num_experts)[:num_tokens].to(device)
        of_tokens = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        chosen = of_tokens.topk(num_used, dim=-1).indices.flatten()
        # no bincount: it waits for the device
        choices.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float64))
        probabilities = probabilities + of_tokens.sum(0).double()
    return torch.stack([choices, probabilities])


def balance_of(sums: torch.Tensor, num_used: int) -> Balance:
    """Return what follows from `choices_of` all tokens, each of which is sent to `num_used` experts."""
    rows = sums[0].sum() / num_used
    fractions = sums[0] / rows
    return Balance(fractions, sums.shape[1] * (fractions * sums[1]).sum() / rows)


def num_experts_of(model: Any) -> tuple[int, int]:
    """Return how many experts a model's routers choose from, and how many for each token; 0 where that is not known."""
    text = model.config.get_text_config(decoder=True)
    # those that the models themselves hand to `load_balancing_loss_func`
    found = [getattr(model, name, None) or getattr(text, name, 0) for name in ("num_experts", "num_experts_per_tok")]
    return found[0], found[1]


class RouterLoss:
    """`RouterLoss` is the loss of a model's routers, step after step.

    Args:
        model: a transformers model, whose routers give all their logits.
        coefficient: of this loss in the whole; 0: there is no such loss.
        last_step: take f for that of the step before, instead of looking at all tokens first.
    """

    def __init__(self, model: Any, coefficient: float = 0.0, last_step: bool = False) -> None:
        self._model, self.coefficient, self._last_step = model, coefficient, last_step
        self._num_experts, self._num_used = num_experts_of(model) if coefficient else (0, 0)
        self._step: RoutedStep | None = None
        self._known: Balance | None = None
        self._last: Balance | None = None
        self._sums: torch.Tensor | None = None
        self._looks = True

    def __bool__(self) -> bool:
        return bool(self.coefficient)

    def begin(self, step: RoutedStep) -> bool:
        """Begin a step, or begin it anew; return whether micro-batches after the first must be looked at before."""
        self._step, self._sums = step, None
        self._known = self._last if self._last_step else None
        self._looks = self._known is None
        return self._looks

    def end(self) -> None:
        """End a step, after its last micro-batch. All ranks do so together."""
        self._last = self._known if self._looks else self._known_of_all()

    @property
    def value(self) -> float | None:
        """Return the last step's loss, without its coefficient; None before there was one. Waits for the device."""
        return None if self._last is None else float(self._last.loss)

    @contextmanager
    def looked_at(self, num_tokens: int) -> Iterator[None]:
        """Count what is routed inside, where a micro-batch is run forward and not trained on.

        Args:
            num_tokens: this rank's, without one that stands in for none.
        """
        with self._watched() as layers:
            yield
            self._add(self._choices(layers, num_tokens))

    @contextmanager
    def adding(self, wrapped: torch.nn.Module, num_tokens: int) -> Iterator[None]:
        """Have a micro-batch's loss contain its part of this one, instead of one of its own.

        Args:
            wrapped: what is called: the model, in its wrapper.
            num_tokens: this rank's, without one that stands in for none.

        The output's `aux_loss` has the value of the whole step's, and a gradient whose mean over ranks and
        micro-batches is that of the whole step's: TRL's trainers take that mean, and log the value.
        """
        step = self._step
        assert step is not None

        def add(_: torch.nn.Module, __: Any, output: Any) -> Any:
            sums = self._choices(layers, num_tokens)
            if self._known is None or not self._looks:
                self._add(sums)
            self._known = known = self._known or self._known_of_all()
            rows = step.num_tokens * len(layers)
            part = self._num_experts * (known.fractions * sums[1]).sum() / rows
            if output.get("loss") is not None:
                _check_gradient(part, output["loss"])
                output["loss"] = output["loss"] + (self.coefficient * part).to(output["loss"].dtype)
            whole = part * step.num_ranks * step.num_micro_batches
            output["aux_loss"] = whole + (known.loss - whole).detach()
            return output

        with self._watched() as layers, self._left_to(wrapped, add):
            yield

    @contextmanager
    def left_out(self, wrapped: torch.nn.Module, num_tokens: int) -> Iterator[None]:
        """Count what is routed inside, where a micro-batch is evaluated, and leave this loss out of its own.

        Args:
            wrapped, num_tokens: as for `adding`.
        """

        def leave_out(_: torch.nn.Module, __: Any, output: Any) -> Any:
            self._add(self._choices(layers, num_tokens))
            if output.get("aux_loss") is not None:
                output["aux_loss"] = torch.zeros_like(output["aux_loss"])
            return output

        with self._watched() as layers, self._left_to(wrapped, leave_out):
            yield

    def take(self, total: Total) -> float:
        """Return the loss of what was evaluated since the last call, without its coefficient. All ranks call it."""
        sums, self._sums = self._sums, None
        return 0.0 if sums is None else float(balance_of(total(sums), self._num_used).loss)

    def _known_of_all(self) -> Balance:
        assert self._step is not None
        assert self._sums is not None
        return balance_of(self._step.total(self._sums), self._num_used)

    def _add(self, sums: torch.Tensor) -> None:
        self._sums = sums.detach() if self._sums is None else self._sums + sums.detach()

    def _choices(self, layers: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
        if not layers or any(layer.shape[-1] != self._num_experts for layer in layers):
            raise UnsupportedModel(
                f"config.output_router_logits=True, and the model gives no logits of {self._num_experts} experts for "
                "each token, so the loss of its routers cannot be known. Set it to False."
            )
        return choices_of(layers, num_tokens, self._num_used)

    @contextmanager
    def _watched(self) -> Iterator[list[torch.Tensor]]:
        """Watch the model below its head, which gives the logits of all routers; give them, layer by layer."""
        layers: list[torch.Tensor] = []

        def note(_: torch.nn.Module, __: Any, output: Any) -> None:
            layers[:] = getattr(output, "router_logits", None) or ()

        hook = self._model.base_model.register_forward_hook(note)
        try:
            yield layers
        finally:
            hook.remove()

    @contextmanager
    def _left_to(self, wrapped: torch.nn.Module, change: Callable[..., Any]) -> Iterator[None]:
        """Have the model add no loss of its routers, which would be one of a micro-batch; change what it gives."""
        with ExitStack() as undone:
            for place in (self._model, self._model.config.get_text_config(decoder=True)):
                if hasattr(place, COEFFICIENT):
                    set_until(undone, place, COEFFICIENT, 0.0)
            undone.callback(wrapped.register_forward_hook(change).remove)
            yield


def _check_gradient(part: torch.Tensor, loss: torch.Tensor) -> None:
    """Refuse to learn without this loss, where something has cut its gradient off.

    Raises:
        UnsupportedModel: with the usual cause.
    """
    if loss.requires_grad and not part.requires_grad:
        raise UnsupportedModel(
            "No gradient of the routers' loss reaches the routers, as with reentrant checkpoints: use "
            'activation_checkpointing_kwargs={"use_reentrant": False}, or set config.output_router_logits = False.'
        )
