"""Two thousand steps of everything that may go wrong with plans: nothing leaks, nothing hangs, nothing is lost."""

from __future__ import annotations

import gc
import logging
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ScriptedPlanner, ScriptedSource, arguments, run_ranks, samples, tiny_model
from transformers import TrainerCallback

from hf_hetero import HeteroTrainer
from hf_hetero.data.plan_ahead import PlanSource
from hf_hetero.errors import PlanMismatch
from hf_hetero.step import Step

NUM_STEPS, SAVE_STEPS = 2000, 250
BAD_DIGESTS = (401, 803, 1502)  # steps at which a rank once holds another plan
WARM_UP = 300  # steps until caches are filled


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
    """Memory on the way, and the tokens that were trained."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        if state.global_step % 50 == 0 and state.global_step > WARM_UP:
            gc.collect()
            self.resident.append(resident_bytes())


def soak(folder: str) -> dict[str, Any]:
    logging.getLogger("hf_hetero").setLevel(logging.ERROR)  # each fault is logged, and there are many
    rank, digest, watch = dist.get_rank(), Step.digest, Watch()
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
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now["step"] = state.global_step

    mismatches, resume = 0, False
    for _ in range(len(BAD_DIGESTS) + 1):
        args = arguments(folder, 4, 8, max_steps=NUM_STEPS, save_strategy="steps", save_steps=SAVE_STEPS)
        args.logging_strategy = "no"
        args.save_total_limit = 2
        trainer = FaultyTrainer(tiny_model(), args, train_dataset=data, callbacks=[watch, Count()])
        if resume:
            now["step"] = SAVE_STEPS * (now["step"] // SAVE_STEPS)
        try:
            trainer.train(resume_from_checkpoint=resume)
            break
        except PlanMismatch:
            mismatches, resume = mismatches + 1, True
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return {
        "mismatches": mismatches,
        "step": trainer.state.global_step,
        "resident": watch.resident,
        "steps": watch.steps,
        "weights": weights,
    }


@pytest.mark.slow
@pytest.mark.timeout(1260)
def test_soak(tmp_path: Path) -> None:
    """All steps are trained, ranks agree to the last bit, each mismatch ends in a resumed run, memory stays flat."""
    ranks = run_ranks(soak, 4, str(tmp_path), timeout_s=1200)
    for rank in ranks:
        assert rank["mismatches"] == len(BAD_DIGESTS)
        assert rank["step"] == NUM_STEPS
        assert set(rank["steps"]) == set(range(1, NUM_STEPS + 1))
        assert torch.equal(rank["weights"], ranks[0]["weights"])
        assert torch.isfinite(rank["weights"]).all()
        quarter = len(rank["resident"]) // 4
        early, late = (sorted(part)[quarter // 2] for part in (rank["resident"][:quarter], rank["resident"][-quarter:]))
        assert late <= 1.05 * early, rank["resident"]
