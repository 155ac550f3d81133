"""A checkpoint is whole, or known not to be: it is marked first, `hetero_run.json` comes last, then the mark goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import TrainingArguments

from hf_hetero.errors import HeteroError
from hf_hetero.ranks.agreement import raise_together
from hf_hetero.ranks.groups import limit_of
from hf_hetero.ranks.naming import named
from hf_hetero.trainer.checkpoints.checkpoint import Run
from hf_hetero.trainer.checkpoints.removing import (
    INCOMPLETE_FILE,
    RUN_FILE,
    STATE_FILE,
    WRITTEN,
    aside,
    clear,
    discard,
    drop_older,
    mark,
    put_back,
    set_aside,
)
from hf_hetero.trainer.checkpoints.safekeeping import seals_of, settle
from hf_hetero.trainer.checkpoints.taken import Taken


@dataclass(frozen=True, slots=True)
class Saving:
    """A `Saving` says how a run writes its checkpoints.

    Args:
        args: who writes, and how many are kept.
        control: group of all ranks; None for a single process.
        may_wait: whether ranks wait for each other while they save, as for sharded weights. What goes wrong is then
            raised on its rank alone, which ends the job: the others could not be told.
        taken: what is to be written beside training; None: all is written at once.
    """

    args: TrainingArguments
    control: dist.ProcessGroup | None
    may_wait: bool
    taken: Taken | None = None

    def write(self, save: Callable[[], None], folder: Path, run: Run, best: Callable[[], str | None]) -> None:
        """Save on all ranks; delete older checkpoints only once this one is whole.

        Args:
            save: writes the files of this rank.
            folder: the checkpoint's.
            run: where the run is.
            best: the checkpoint that must stay.

        Raises:
            HeteroError: what went wrong on any rank; the half-written checkpoint is removed.
        """
        limit = self.args.save_total_limit
        with self._removing(folder), self._keeping_older():
            # each step ends on all ranks before the next begins: none writes before the folder is marked, and the
            # checksums are of what all have written
            self.together(lambda: _begin(folder) if self.args.should_save else None, folder)
            self.together(save, folder)
            self.together(lambda: _finish(folder, run) if self.args.should_save else None, folder)
        self._drop_older(folder, limit, best())

    def begin(
        self,
        save: Callable[[], None],
        folder: Path,
        run: Run,
        best: Callable[[], str | None],
        group: dist.ProcessGroup | None,
    ) -> Callable[[], None]:
        """Save on all ranks what is small, and take the rest; return what writes it, from a thread.

        Args:
            save: writes files of this rank, and has `taken` take the others.
            folder, run, best: as for `write`.
            group: of all ranks, if they write together; nobody else talks in it.

        Raises:
            HeteroError: what went wrong on any rank, here and in what is returned, there in the ranks that wrote; the
                half-written checkpoint is removed.
        """
        limit = self.args.save_total_limit
        with self._removing(folder), self._keeping_older():
            self.together(lambda: _begin(folder) if self.args.should_save else None, folder)
            self.together(save, folder)
        kept, beside = best(), Saving(self.args, group, may_wait=False)

        def write() -> None:
            assert self.taken is not None
            with self._removing(folder):
                for act in self.taken.writes:
                    beside.together(act, folder)
                beside.together(lambda: _finish(folder, run) if self.args.should_save else None, folder)
            self._drop_older(folder, limit, kept)

        return write

    def together(self, act: Callable[[], object], folder: Path) -> None:
        """Act on all ranks, then wait for all.

        Raises:
            HeteroError: what went wrong on any rank.
        """
        error: Exception | None = None
        try:
            # a rank that misses another does not leave word as if it were the first to end
            with named("Saving", str(folder), limit=limit_of):
                act()
        except HeteroError as raised:  # in its own words, and maybe on all ranks already
            if raised.is_known_to_all or self.may_wait:
                raise
            error = raised
        except Exception as raised:
            error = HeteroError(f"Saving {folder} failed: {type(raised).__name__}: {raised}. Older checkpoints stay.")
            error.__cause__ = raised
            if self.may_wait:
                raise error from raised
        raise_together(error, self.control)

    @contextmanager
    def _keeping_older(self) -> Iterator[None]:
        """Return a context in which Trainer deletes no checkpoint: it would, before this one is whole."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    @contextmanager
    def _removing(self, folder: Path) -> Iterator[None]:
        """Return a context that removes a checkpoint whose writing fails; one of its step that was whole comes back."""
        try:
            yield
        except Exception:
            if self.args.should_save:
                # ranks that were not told yet may still write into it
                discard(folder, stays_marked=self.may_wait)
                put_back(folder)
            raise

    def _drop_older(self, folder: Path, limit: int | None, best: str | None) -> None:
        if not self.args.should_save:
            return
        discard(aside(folder))
        if limit and limit > 0:
            drop_older(folder, limit, [best] if best is not None else [])


def _begin(folder: Path) -> None:
    """Mark a checkpoint as being written, without what an earlier one of this step has left, maybe on other ranks."""
    is_left = (folder / INCOMPLETE_FILE).exists()
    if not is_left and any((folder / name).exists() for name in (RUN_FILE, STATE_FILE)):
        set_aside(folder)
        is_left = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, WRITTEN)
    if is_left:
        clear(folder)


def _finish(folder: Path, run: Run) -> None:
    """Write down what a checkpoint holds, and that it is whole, when all ranks have written their files."""
    paths = _files(folder)
    seals = seals_of(dict.fromkeys(paths, False), "Counting checksums")
    files = {str(path.relative_to(folder)): seal for path, seal in zip(paths, seals, strict=True)}
    data = {**run.to_dict(), "files": files}
    (folder / RUN_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    # all is on the disk before the mark goes, so a power cut leaves the mark, or a checkpoint that is whole
    settle([*paths, folder / RUN_FILE, *{path.parent for path in paths}, folder, folder.parent])
    (folder / INCOMPLETE_FILE).unlink(missing_ok=True)
    settle([folder])


def _files(folder: Path) -> list[Path]:
    own = {RUN_FILE, INCOMPLETE_FILE}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in own)
