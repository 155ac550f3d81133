"""A run ends when it is told to, or a callback of one rank asks, on all ranks after the same step; or by an error."""

from __future__ import annotations

import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_hetero.errors import CollectiveFailed
from hf_hetero.ranks.agreement import any_of
from hf_hetero.ranks.groups import limit_of
from hf_hetero.ranks.last_words import forget_errors, tell
from hf_hetero.ranks.naming import all_ranks, named

logger = logging.getLogger(__name__)

FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
"""Words of torch's allocators."""
EVALUATION = "Within an evaluation"


class StopWhenAsked(TrainerCallback):
    """`StopWhenAsked` asks to save and to end training after the step in which SIGTERM came.

    It takes the place of transformers' callback for `enable_jit_checkpoint`.
    """

    def __init__(self) -> None:
        self.is_asked = False
        """SIGTERM came to this rank."""

    @contextmanager
    def listening(self, enabled: bool) -> Iterator[None]:
        """Handle SIGTERM meanwhile; signals can only be handled in the main thread."""
        self.is_asked = False
        if not enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _asked(self, *_: object) -> None:
        self.is_asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask to save and stop. The other ranks learn of it by `OneDecision`, whichever of them was signalled."""
        if self.is_asked:
            logger.warning(
                "SIGTERM on rank %d: saving a checkpoint after step %d, then training ends.",
                args.process_index,
                state.global_step,
            )
            control.should_save = control.should_training_stop = True


class OneDecision(TrainerCallback):
    """`OneDecision` has what a callback asks for on any rank happen on all of them, after the same step.

    A Trainer looks at its own rank's `TrainerControl` only, and ranks that save, evaluate or train on wait for one that
    does not. This callback must be the last one: it joins what the others have set.

    Args:
        group: of all ranks, while they train; None for a single process, or when they do not.
    """

    def __init__(self, group: Callable[[], dist.ProcessGroup | None]) -> None:
        self._group = group

    def join(self, control: TrainerControl) -> None:
        """Set what is set on any rank. A collective of all ranks, which Trainer's loop calls at the same places."""
        if (group := self._group()) is not None:
            for name, value in zip(FLAGS, any_of([getattr(control, name) for name in FLAGS], group), strict=True):
                setattr(control, name, value)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether to log, evaluate, save or stop now."""
        self.join(control)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide whether to stop within a step."""
        self.join(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide whether to log, evaluate, save or stop now."""
        self.join(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether its metrics are a reason to save or stop."""
        self.join(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide whether to stop."""
        self.join(control)


@contextmanager
def ending_in_words(step: Callable[[], int]) -> Iterator[None]:
    """Say of whatever error ends a run what it was, here and to the ranks that will miss this one.

    Args:
        step: the current one.

    Raises:
        CollectiveFailed: a rank that was waited for has gone, or is late; with why, where it left word.
    """
    forget_errors()
    try:
        # the wrapper's own collectives, and Trainer's
        with named("Training", lambda: f"step {step()}", limit=limit_of):
            yield
    except BaseException as error:
        if isinstance(error, CollectiveFailed) and f"step {step()}" not in str(error).lower():
            error.args = (f"At step {step()}: {error}",)
        # what was said where it was raised is not said again
        if is_out_of_memory(error) and EVALUATION not in str(error):
            _say_remedy(error, f"Step {step()}")
        tell(error)
        raise


@contextmanager
def evaluating_in_words() -> Iterator[None]:
    """Say what ended an evaluation, here and to the ranks that will miss this one; it is not repeated.

    Where memory ran out in it, with what can be done.

    Raises:
        CollectiveFailed: a rank that was waited for has gone, or is late.
    """
    forget_errors()
    try:
        # Trainer's own collectives, and those of metrics
        with named("Evaluation", all_ranks, limit=limit_of):
            yield
    except BaseException as error:
        if is_out_of_memory(error) and EVALUATION not in str(error):
            _say_remedy(error, EVALUATION)
        tell(error)
        raise


def _say_remedy(error: BaseException, where: str) -> None:
    """Put into an error of torch's, so that whoever catches it still does, where it was and what can be done."""
    is_of_optimizer = any(
        isinstance(frame.f_locals.get("self"), torch.optim.Optimizer)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    remedy = (
        "It was in the optimizer's step, where no tokens are held: weights, gradients and the optimizer's state are "
        "too much by themselves. Shard them (FSDP2), or take an optimizer that keeps less."
        if is_of_optimizer
        else "Let ranks hold fewer tokens at a time: lower HeteroConfig.max_tokens_per_rank, or give "
        "activation_policies=['recompute', 'offload'] to choose from."
    )
    error.args = (f"{where}: this rank ran out of memory. {remedy} {error}",)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the device or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in OUT_OF_MEMORY)
