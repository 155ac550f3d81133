"""Two thousand steps of all that may go wrong: nothing leaks, nothing hangs, nothing is lost.

Plans are late, missing, or differ between ranks; checkpoints are written beside training, and evaluations come between;
a rank is killed, then all of them, and the run starts again from what is whole.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ScriptedPlanner, ScriptedSource, arguments, run_ranks, samples, tiny_model
from transformers import TrainerCallback

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.errors import PlanMismatch
from hf_hetero.step import Step
from hf_hetero.trainer.checkpoints.checkpoint import newest_whole

NUM_STEPS, SAVE_STEPS, EVAL_STEPS = 2000, 40, 200
BAD_DIGESTS = (401, 803, 1502)  # steps at which a rank once holds another plan
KILLS = ((653, (1,)), (1257, (0, 1, 2, 3)))  # step and ranks, one of each start of the ranks
WARM_UP = 150  # steps of a start until caches are filled


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class FaultyTrainer(HeteroTrainer):
    """Plans come late, or not at all, or improved ones break; at random, but the same in each run."""

    def _plan_source(self) -> PlanSource:
        planner, chance = ScriptedPlanner(self.args.world_size), random.Random(5)

        def plan(lengths: Any) -> Any:
            luck = chance.random()
            if luck < 0.02:
                time.sleep(0.1)
            if luck > 0.98:
                raise ZeroDivisionError("a solver's trouble")
            return planner.plan(lengths)

        def improve(plan: Any, lengths: Any) -> Any:
            if chance.random() < 0.05:
                raise MemoryError("an improver's trouble")
            return plan

        return ScriptedSource(plan, planner.plan, improve)


class Watch(TrainerCallback):
    """Memory on the way, and the steps that were trained, which outlive this process; and its end.

    Args:
        file: for the steps.
        kill_at: the step at whose end this rank is killed; None: it is not.
    """

    def __init__(self, file: Path, kill_at: int | None) -> None:
        self.resident: list[int] = []
        self.file, self.kill_at = file, kill_at
        self.num_steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            with self.file.open("a") as file:
                file.write(f"{state.global_step}\n")
        self.num_steps += 1
        if self.num_steps % 25 == 0 and self.num_steps > WARM_UP:
            gc.collect()
            self.resident.append(resident_bytes())
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def soak(folder: str, start: int) -> dict[str, Any]:
    logging.getLogger("hf_hetero").setLevel(logging.ERROR)  # each fault is logged, and there are many
    rank, digest = dist.get_rank(), Step.digest
    kill_at, killed = KILLS[start] if start < len(KILLS) else (0, ())
    watch = Watch(Path(folder) / f"steps-{start}.txt", kill_at if rank in killed else None)
    bad = set(BAD_DIGESTS if rank == 2 else ())
    now = {"step": 0}

    def tampered(self: Step) -> int:
        step = 1 + now["step"]
        if step in bad:
            bad.remove(step)
            return digest(self) ^ 1
        return digest(self)

    Step.digest = tampered  # type: ignore[method-assign]
    chance = random.Random(3)
    data = samples([1 + int(60 * chance.random() ** 3) for _ in range(500)])

    class Count(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now["step"] = state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now["step"] = state.global_step

    mismatches, resume = 0, start > 0
    for _ in range(len(BAD_DIGESTS) + 1):
        args = arguments(folder, 4, 8, max_steps=NUM_STEPS, save_strategy="steps", save_steps=SAVE_STEPS)
        args.logging_strategy, args.eval_strategy, args.eval_steps = "no", "steps", EVAL_STEPS
        args.save_total_limit = 2
        more: dict[str, Any] = {"eval_dataset": data[:20], "hetero": HeteroConfig(save_in_background=True)}
        trainer = FaultyTrainer(tiny_model(), args, train_dataset=data, callbacks=[watch, Count()], **more)
        try:
            trainer.train(resume_from_checkpoint=resume)
            break
        except PlanMismatch:
            mismatches, resume = mismatches + 1, True
    evaluated = sum("eval_loss" in entry for entry in trainer.state.log_history)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {
        "mismatches": mismatches,
        "step": trainer.state.global_step,
        "evaluated": evaluated,
        "resident": watch.resident,
        "weights": weights,
    }


@pytest.mark.slow
@pytest.mark.timeout(1260)
def test_soak(tmp_path: Path) -> None:
    """All steps are trained, ranks agree to the last bit, whatever ends a run is resumed, memory stays flat."""
    for start, (kill_at, killed) in enumerate(KILLS):
        ended = run_ranks(soak, 4, str(tmp_path), start, timeout_s=600, expect_errors=True)
        assert all(ended[rank] is None for rank in killed)
        newest, _ = newest_whole(tmp_path)
        assert newest is not None
        # the one before the last is whole at least: it was waited for
        assert kill_at - 2 * SAVE_STEPS < int(newest.name.partition("-")[2]) <= kill_at
    ranks = run_ranks(soak, 4, str(tmp_path), len(KILLS), timeout_s=600)
    trained = [list(map(int, path.read_text().split())) for path in sorted(tmp_path.glob("steps-*.txt"))]
    assert len(trained) == len(KILLS) + 1
    assert set().union(*trained) == set(range(1, NUM_STEPS + 1))
    for rank in ranks:
        assert rank["mismatches"] == 1  # the last of them; the others were before the kills
        assert rank["step"] == NUM_STEPS
        assert rank["evaluated"] == NUM_STEPS // EVAL_STEPS
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert torch.isfinite(rank["weights"]).all()
        quarter = len(rank["resident"]) // 4
        early, late = (sorted(part)[quarter // 2] for part in (rank["resident"][:quarter], rank["resident"][-quarter:]))
        assert late <= 1.05 * early, rank["resident"]
