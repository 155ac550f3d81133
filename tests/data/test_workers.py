"""A rank that is killed takes the processes that read for it with it: the others see at once that it has gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import LENGTHS, often, run_ranks, samples, tiny_model, trained
from torch.utils.data import DataLoader, get_worker_info

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer
from hf_hetero.data.workers import end_with_this_process, named_loss
from hf_hetero.errors import CollectiveFailed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end them")

BUSY_S, LIMIT_S = 120, 12


class Busy:
    """Rows of which one is never there: whoever reads it leaves a file behind, and waits.

    Args:
        rows: of the dataset.
        sign: the file.
        first: of the rows that are read on rank 0, the one that is not there.
    """

    def __init__(self, rows: list[Any], sign: Path, first: int) -> None:
        self.rows, self.sign, self.first, self.num_read = rows, sign, first, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        if get_worker_info() is not None and dist.get_rank() == 0:
            self.num_read += 1
            if self.num_read > self.first:
                self.sign.touch()
                time.sleep(BUSY_S)
        return self.rows[row]


def die_at(sign: Path) -> None:
    while not sign.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_reading(folder: str, what: str) -> None:
    sign, rows = Path(folder) / "sign", samples(LENGTHS)
    if dist.get_rank() == 0:
        threading.Thread(target=die_at, args=(sign,), daemon=True).start()
    busy = Busy(rows, sign, 3)

    class Evaluated(HeteroTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, eval_dataset=busy)  # type: ignore[arg-type]

    hetero = HeteroConfig(group_timeout_s=LIMIT_S, plan_evaluation=what != "evaluation without plans")
    options = {"eval_strategy": "steps", "eval_steps": 1} if what != "training" else {}
    trained(
        tiny_model(),
        busy if what == "training" else rows,
        HeteroTrainer if what == "training" else Evaluated,
        hetero,
        output_dir=folder,
        dataloader_num_workers=1,
        per_device_eval_batch_size=2,
        ddp_timeout=LIMIT_S,
        **options,
    )


@pytest.mark.parametrize("what", often(["training", "evaluation", "evaluation without plans"], "training"))
def test_killed_while_its_reader_is_busy(tmp_path: Path, what: str) -> None:
    """The other rank says that it has gone, instead of waiting to its limit for who is only late."""
    killed, error = run_ranks(killed_while_reading, 2, str(tmp_path), what, expect_errors=True, timeout_s=60)
    assert killed is None
    assert isinstance(error, CollectiveFailed)
    assert "A rank has gone" in str(error)


def seeded(worker: int) -> None:
    raise RuntimeError(f"asked of worker {worker}")


@pytest.mark.parametrize("context", often(["fork", "spawn", "forkserver"], "fork"))
def test_workers_do_what_they_were_asked_to(context: str) -> None:
    """Once, however often a loader is told, and however its workers are started."""
    loader = DataLoader([1, 2, 3], num_workers=1, multiprocessing_context=context, collate_fn=list)  # type: ignore[arg-type]
    end_with_this_process(loader)
    end_with_this_process(loader)
    assert list(loader) == [[1], [2], [3]]
    failing = DataLoader([1], num_workers=1, multiprocessing_context=context, worker_init_fn=seeded)  # type: ignore[arg-type]
    end_with_this_process(failing)
    with pytest.raises(RuntimeError, match="asked of worker 0"):
        list(failing)


def broken(_: int) -> None:
    raise ConnectionResetError(104, "the dataset's own")


def raised_by_a_loader(kind: str) -> Exception:
    """As torch raises it in the process that reads from the worker."""
    if kind == "own":
        loader = DataLoader([1], num_workers=1, worker_init_fn=broken)  # type: ignore[arg-type]
        with pytest.raises(ConnectionResetError) as caught:
            list(loader)
        return caught.value
    return ConnectionResetError(104, "Connection reset by peer") if kind == "lost" else ValueError("row 7")


@pytest.mark.parametrize(("kind", "is_lost"), [("lost", True), ("own", False), ("value", False)])
def test_a_reader_that_took_a_tensor_with_it(kind: str, is_lost: bool) -> None:
    """It is named, as torch names one that was killed while it read; what the dataset raises stays as it is."""
    error = raised_by_a_loader(kind)
    named = named_loss(error)
    assert (named is not error) == is_lost
    if is_lost:
        assert isinstance(named, HeteroError)
        assert "A DataLoader worker has gone with what it had read (ConnectionResetError: " in str(named)
