"""A checkpoint is written by a thread, beside training: one at a time, and what becomes of it is known to all ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerState

from hf_hetero.errors import HeteroError
from hf_hetero.ranks.agreement import any_of, raise_together

logger = logging.getLogger(__name__)

WORD_AFTER_S = 10.0
"""Training that waits longer for a checkpoint says so."""


class Writing:
    """A `Writing` is a checkpoint on its way to the disk.

    Args:
        write: writes it.
        folder: of the checkpoint.
        state: of the trainer, when it was saved.
        is_pushed: it is to be pushed to the hub.
    """

    def __init__(self, write: Callable[[], None], folder: Path, state: TrainerState, is_pushed: bool) -> None:
        self._write, self.folder, self.state, self.is_pushed = write, folder, state, is_pushed
        self._error: Exception | None = None
        self._is_raised = False
        # it ends with the process: whoever ends training waits for it
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Wait until this rank has written, and say so once that takes long."""
        self._thread.join(WORD_AFTER_S)
        if self._thread.is_alive():
            logger.warning(
                "Training has waited %g s for %s, which is still being written, and waits on. If that is often so, "
                "save less often, or to a faster disk.",
                WORD_AFTER_S,
                self.folder,
            )
            self._thread.join()

    def is_whole(self, control: dist.ProcessGroup | None) -> bool:
        """Return whether the checkpoint is whole, the same on all ranks. A collective of all of them.

        Raises:
            HeteroError: what went wrong on any rank; the checkpoint is removed.
        """
        is_over = not self._thread.is_alive()
        # another error than the thread's: all ranks may know that one, but not at the same step
        error = HeteroError(str(self._error)) if is_over and self._error is not None else None
        if error is not None:
            error.__cause__, self._is_raised = self._error, True
        raise_together(error, control)
        return not any_of([not is_over], control)[0]

    def end(self) -> None:
        """Wait for it where training ends with an error; say what went wrong, if that is not what ends training."""
        self.wait()
        if self._error is not None and not self._is_raised:
            logger.warning("%s", self._error)
