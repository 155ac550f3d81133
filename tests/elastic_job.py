"""A job for `torchrun` to start, lose ranks of, and start again: `python elastic_job.py SETTINGS.json`.

Each rank writes down what it has trained of a step, when the step is over: `seen/ATTEMPT/STEP.RANK.json`, where the
attempt's name begins with its number of ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from helpers import arguments, shard_on_cpu, tiny_model, whole
from transformers import TrainerCallback

from hf_hetero import HeteroConfig, HeteroTrainer

NUM_ROWS, BATCH = 22, 8


def tagged_rows() -> list[dict[str, list[int]]]:
    """Row i holds token 3 + i and nothing else, so a token tells which row it is of."""
    return [{"input_ids": [3 + i] * (2 + 5 * i % 37), "labels": [3 + i] * (2 + 5 * i % 37)} for i in range(NUM_ROWS)]


class WritesDown(TrainerCallback):
    """Writes down which tokens a step had on this rank; and takes its time, so that there is one to be killed in."""

    def __init__(self, folder: Path, model: torch.nn.Module, pause_s: float) -> None:
        attempt = f"{os.environ['WORLD_SIZE']}-{os.environ['MASTER_PORT']}"
        self.folder, self.pause_s, self.now = folder / "seen" / attempt, pause_s, Counter[int]()
        self.folder.mkdir(parents=True, exist_ok=True)
        model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, _: Any, args: Any, kwargs: Any) -> None:
        real = kwargs["attention_mask"].view(-1)
        self.now.update(kwargs["input_ids"].view(-1)[real].tolist())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = f"{state.global_step}.{args.process_index}.json"
        (self.folder / f"_{name}").write_text(json.dumps(self.now))
        (self.folder / f"_{name}").rename(self.folder / name)
        self.now = Counter()
        time.sleep(self.pause_s)


class WaitsToBeEnded(TrainerCallback):
    """So many ranks train no further than a step, until torchrun ends them because another node has come."""

    def __init__(self, num_ranks: int, step: int) -> None:
        self.num_ranks, self.step = num_ranks, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (args.world_size, state.global_step) != (self.num_ranks, self.step):
            return
        before: Any = signal.getsignal(signal.SIGTERM)
        if before is signal.SIG_DFL:
            time.sleep(1000)
        told = threading.Event()

        def end(number: int, frame: Any) -> None:
            told.set()
            before(number, frame)

        signal.signal(signal.SIGTERM, end)
        while not told.wait(0.05):
            pass
        signal.signal(signal.SIGTERM, before)


class IsLost(TrainerCallback):
    """Kills, once in the life of the job: at a step, half through the model, or in the writing of a checkpoint.

    Args:
        folder: of the job.
        what: "node" | "rank" | "rank while saving"; of the node that is named.
        node, step: where, and when.
    """

    def __init__(self, folder: Path, what: str, node: int, step: int) -> None:
        self.mark, self.what, self.node, self.step = folder / f"lost-{step}", what, node, step

    def is_now(self, step: int) -> bool:
        return os.environ["NODE"] == str(self.node) and step == self.step and not self.mark.exists()

    def kill(self) -> None:
        self.mark.touch()
        (os.killpg if self.what == "node" else os.kill)(os.getpgrp() if self.what == "node" else os.getpid(), 9)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.is_now(state.global_step + 1) and "saving" not in self.what:
            layers = [module for module in model.modules() if type(module).__name__.endswith("LlamaDecoderLayer")]
            layers[1].register_forward_pre_hook(lambda *_: self.kill())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_now(state.global_step) and "saving" in self.what:
            save = torch.save

            def killed(*args: Any, **kwargs: Any) -> None:
                save(*args, **kwargs)
                self.kill()

            torch.save = killed


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a rank that torchrun forks has torchrun's own way to take it
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text())
    folder, options = Path(settings["folder"]), settings["arguments"]
    if settings.get("sharded"):
        shard_on_cpu()
    model = tiny_model(dtype=torch.float64)
    callbacks = [WritesDown(folder, model, settings["pause_s"]), *(IsLost(folder, *lost) for lost in settings["lost"])]
    if settings["waits"] is not None:
        callbacks.append(WaitsToBeEnded(*settings["waits"]))
    trainer = HeteroTrainer(
        model,
        arguments(str(folder / "out"), 1, optim="adamw_torch", save_strategy="steps", **options),
        train_dataset=tagged_rows(),
        hetero=HeteroConfig(global_batch_size=BATCH, **settings["hetero"]),
        callbacks=callbacks,
    )
    trainer.train()
    weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
    if trainer.args.process_index == 0:
        torch.save(weights, folder / "weights.pt")


if __name__ == "__main__":
    main()
