"""What a run opens it closes: the user's model, and the process, are after it what they were before."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import LENGTHS, ScriptedTrainer, arguments, run_ranks, samples, tiny_model
from transformers import TrainerCallback

from hf_hetero import HeteroError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Breaks(list[Any]):
    """Rows that can be read until they are broken."""

    is_broken = False

    def __getitem__(self, row: Any) -> Any:
        if self.is_broken:
            raise OSError("the disk has gone")
        return super().__getitem__(row)


class Watcher(TrainerCallback):
    """Looks at the model after the first step, and may break the data then."""

    def __init__(self, data: Breaks, breaks: bool) -> None:
        self.data, self.breaks = data, breaks
        self.seen: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1:
            self.seen = of_model(model)
            self.data.is_broken = self.breaks


def of_model(model: Any) -> dict[str, Any]:
    """What runs set on a model and take off again."""
    hooks = [name for name, module in model.named_modules() for kind in HOOKS if getattr(module, kind)]
    return {
        "attention": model.config._attn_implementation,
        "loss": f"{model.loss_function.__module__}.{model.loss_function.__qualname__}",
        "classes": [type(module).__name__ for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks of modules": hooks,
        "hooks of weights": [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks],
    }


def num_open() -> dict[str, int]:
    """What this process holds open."""
    gc.collect()
    return {
        "groups": len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }


def num_open_at_last(most: dict[str, int]) -> dict[str, int]:
    """The same, once it is no more than this; a thread that was told to end takes its time, and so does a peer."""
    if dist.is_initialized():
        dist.barrier()
    until = time.monotonic() + 60
    while any((held := num_open())[name] > most[name] for name in most) and time.monotonic() < until:
        time.sleep(0.05)
    return held


def one_after_the_other() -> dict[str, Any]:
    """Three trainers on one model, of which the second fails midway; the first then evaluates."""
    model = tiny_model("qwen3-moe")
    trainers: list[ScriptedTrainer] = []  # kept: nothing may depend on their going
    models, held, within = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            data = Breaks(samples(LENGTHS, seed=number))
            watcher = Watcher(data, breaks=number == 1)
            args = arguments(f"{folder}/{number}", dist.get_world_size() if dist.is_initialized() else 1, max_steps=3)
            trainers.append(ScriptedTrainer(model, args, train_dataset=data, callbacks=[watcher]))
            if not models:
                models.append(of_model(model))
            if watcher.breaks:
                with pytest.raises(HeteroError if dist.is_initialized() else OSError, match="the disk has gone"):
                    trainers[-1].train()
            else:
                trainers[-1].train()
            within.append(watcher.seen)
            models.append(of_model(model))
            held.append(num_open_at_last(held[0]) if held else num_open())
        steps = [trainer.state.global_step for trainer in trainers]
        trainers[0].evaluate(samples(LENGTHS[:6]))
        models.append(of_model(model))
        held.append(num_open_at_last(held[0]))
    return {"models": models, "held": held, "within": within, "steps": steps}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_leaves_nothing_behind(num_ranks: int) -> None:
    """The model is as before the first trainer came, and no group, file or thread is left, after an error either."""
    for rank in run_ranks(one_after_the_other, num_ranks):
        assert rank["steps"] == [3, 1, 3]
        before = rank["models"][0]
        assert before["attention"] == "sdpa"
        assert not before["hooks of modules"]
        for model in rank["models"][1:]:
            assert {name: model[name] for name in model if name != "attributes"} == {
                name: before[name] for name in before if name != "attributes"
            }
            assert model["attributes"] == rank["models"][1]["attributes"]
        for held in rank["held"][1:]:
            assert all(held[name] <= rank["held"][0][name] for name in held), rank["held"]


def test_a_run_sets_the_model_up_again() -> None:
    """A negative control: while each of them trains, the model is not as it was."""
    found = run_ranks(one_after_the_other, 1)[0]
    for seen in found["within"]:
        changed = {name for name in seen if seen[name] != found["models"][0][name]}
        assert changed >= {"attention", "loss", "classes", "hooks of weights"}
        assert seen["attention"] == "hf_hetero"
