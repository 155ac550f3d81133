"""Behaviour by behaviour, on two ranks: what Trainer does there, or on one process where two ranks of it do otherwise.

All behaviours run one after the other in the same two processes, under plans that mix degrees and methods.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from behaviours import make, rows
from conformance import Behaviour, learned, outcome, same, subclass
from helpers import ScriptedTrainer, run_ranks, tiny_model, with_lora
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

pytestmark = pytest.mark.slow

ON_RANKS: list[Behaviour] = []
"""Two ranks of Trainer are right."""
ON_ONE: list[Behaviour] = []
"""One process of Trainer is right: two of it take rows twice, average ranks, wait for ever, or number rows anew."""
EVEN = rows(16, length=8)
RANKS = 2


def on_ranks(run: Any) -> Any:
    ON_RANKS.append(Behaviour(run, None))
    return run


def on_one(run: Any) -> Any:
    ON_ONE.append(Behaviour(run, None))
    return run


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def made(kind: Any, folder: str, *data: Any, **changes: Any) -> Any:
    """A trainer whose batches are of eight samples over all ranks."""
    sizes = {"per_device_train_batch_size": 8 // world(), "per_device_eval_batch_size": 8 // world()}
    return make(kind, folder, *data, **{**sizes, **changes})


def trained(kind: Any, folder: str, *data: Any, **changes: Any) -> Any:
    trainer = made(kind, folder, *data, **changes)
    trainer.train()
    return learned(trainer), [log["epoch"] for log in trainer.state.log_history]


# ------------------------------------------------------------------------------------------------------ steps


@on_ranks
def plain_run(kind: Any, folder: str) -> Any:
    return trained(kind, folder)


@on_ranks
def accumulation(kind: Any, folder: str) -> Any:
    return trained(kind, folder, rows(48), gradient_accumulation_steps=2, num_train_epochs=2)


@on_ranks
def accumulation_that_does_not_divide(kind: Any, folder: str) -> Any:
    return trained(kind, folder, rows(40), gradient_accumulation_steps=3, num_train_epochs=2)


@on_one
def rows_that_do_not_divide(kind: Any, folder: str) -> Any:
    return trained(kind, folder, rows(21), num_train_epochs=2)


@on_ranks
def drop_last(kind: Any, folder: str) -> Any:
    return trained(kind, folder, rows(30), gradient_accumulation_steps=2, dataloader_drop_last=True, num_train_epochs=2)


@on_ranks
def seed_of_the_data(kind: Any, folder: str) -> Any:
    return trained(kind, folder, data_seed=5, num_train_epochs=2)


@on_ranks
def seed_at_training(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder)
    torch.manual_seed(123)
    trainer.train()
    return learned(trainer)


@on_ranks
def most_steps(kind: Any, folder: str) -> Any:
    return trained(kind, folder, max_steps=5)


@on_ranks
def dataset_order(kind: Any, folder: str) -> Any:
    return trained(kind, folder, train_sampling_strategy="sequential")


@on_ranks
def own_sampler(kind: Any, folder: str) -> Any:
    own = subclass(kind, _get_train_sampler=lambda self, data=None: SequentialSampler(self.train_dataset))
    return trained(own, folder, num_train_epochs=2)


@on_ranks
def tokens_and_operations(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder, rows(24, length=8), include_num_input_tokens_seen="non_padding")
    trainer.train()
    return trainer.state.num_input_tokens_seen


@on_ranks
def workers(kind: Any, folder: str) -> Any:
    return trained(kind, folder, dataloader_num_workers=1, num_train_epochs=2)


@on_ranks
def trained_twice(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder)
    trainer.train()
    trainer.train()
    return learned(trainer)


@on_ranks
def schedule_and_clipping(kind: Any, folder: str) -> Any:
    changes = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_grad_norm": 0.1, "weight_decay": 0.1}
    return trained(kind, folder, gradient_accumulation_steps=2, num_train_epochs=3, **changes)


@on_ranks
def set_later(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder)
    trainer.args.gradient_accumulation_steps, trainer.args.learning_rate = 3, 5e-3
    trainer.train_dataset = rows(48, seed=2)
    trainer.train()
    return learned(trainer)


@on_ranks
def adapters(kind: Any, folder: str) -> Any:
    return trained(kind, folder, model=with_lora(tiny_model()), gradient_accumulation_steps=2)


@on_ranks
def model_made_anew(kind: Any, folder: str) -> Any:
    return trained(kind, folder, model_init=lambda: tiny_model("qwen3"))


@on_ranks
def recomputed(kind: Any, folder: str) -> Any:
    kwargs = {"use_reentrant": False}
    return trained(kind, folder, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)


@on_ranks
def own_optimizer(kind: Any, folder: str) -> Any:
    return trained(kind, folder, optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 1e-3}))


@on_ranks
def weighted_loss(kind: Any, folder: str) -> Any:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        return (each * (1 + labels[:, 1:].flatten() % 3)).sum() / num_items_in_batch

    return trained(kind, folder, rows(24, length=9), compute_loss_func=loss, gradient_accumulation_steps=2)


@on_ranks
def watched_loss(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        loss, outputs = kind.compute_loss(self, model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss

    return trained(subclass(kind, compute_loss=compute_loss), folder, gradient_accumulation_steps=2)


@on_ranks
def shared_weights(kind: Any, folder: str) -> Any:
    return trained(kind, folder, model=tiny_model(tie_word_embeddings=True), ddp_find_unused_parameters=False)


@on_ranks
def loss_of_shared_weights(kind: Any, folder: str) -> Any:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    return trained(kind, folder, model=tiny_model(tie_word_embeddings=True), compute_loss_func=loss)


@on_one  # two ranks of Trainer do not synchronise gradients after an evaluation
def evaluated_before_training(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder, eval_dataset=EVEN)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, learned(trainer)


@on_ranks
def frozen_in_part(kind: Any, folder: str) -> Any:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "mlp" in name
    return trained(kind, folder, model=model)


@on_ranks
def random_numbers(kind: Any, folder: str) -> Any:
    seen: list[float] = []

    class Draw(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(float(torch.rand(())))

    made(kind, folder, callbacks=[Draw()], num_train_epochs=2).train()
    return seen


@on_ranks
def in_bfloat16(kind: Any, folder: str) -> Any:
    [steps, losses, _], _ = trained(kind, folder, bf16=True)
    return steps, [round(loss, 1) for loss, _ in losses]


# ------------------------------------------------------------------------------------------------ callbacks


@on_ranks
def order_of_events(kind: Any, folder: str) -> Any:
    class Note(TrainerCallback):
        def __init__(self) -> None:
            self.events: list[str] = []

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                self.events.append(name)
            return super().__getattribute__(name)

    note = Note()
    made(
        kind, folder, callbacks=[note], gradient_accumulation_steps=2, eval_dataset=EVEN, eval_strategy="epoch"
    ).train()
    return [event for event in note.events if event != "on_step_report"]


@on_one
def stopped_by_one_rank(kind: Any, folder: str) -> Any:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2 and rank() == world() - 1

    return trained(kind, folder, callbacks=[Stop()])[0]


@on_one
def evaluated_and_saved_by_one_rank(kind: Any, folder: str) -> Any:
    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank() == world() - 1:
                control.should_evaluate, control.should_save = state.global_step == 1, state.global_step == 2

    trainer = made(kind, folder, callbacks=[Ask()], eval_dataset=EVEN)
    trainer.train()
    evaluated = [(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
    return evaluated, sorted(path.name for path in Path(folder).glob("checkpoint-*"))


@on_ranks
def early_stopping(kind: Any, folder: str) -> Any:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "greater_is_better": True, "save_total_limit": 1, "num_train_epochs": 4}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = made(kind, folder, eval_dataset=EVEN, callbacks=[stop], **changes, **best)
    trainer.train()
    return learned(trainer), trainer.state.best_metric, trainer.state.best_global_step


@on_ranks
def loaders_that_are_read(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder, eval_dataset=rows(16))
    found = [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]
    return found, [batch["labels"].tolist() for batch in trainer.get_eval_dataloader()]


# ----------------------------------------------------------------------------------------------- evaluation


@on_ranks
def evaluation(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder, eval_dataset=EVEN, eval_strategy="steps", eval_steps=2)
    trainer.train()
    inside = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return inside, trainer.evaluate()["eval_loss"], learned(trainer)


@on_one
def evaluation_by_tokens(kind: Any, folder: str) -> Any:
    trainer = made(kind, folder, eval_dataset=rows(7), per_device_eval_batch_size=8 // world())
    return trainer.evaluate()["eval_loss"], trainer.predict(rows(7)).label_ids.tolist()


@on_one
def predictions_in_order(kind: Any, folder: str) -> Any:
    found = made(kind, folder).predict(rows(21, length=9))
    return found.predictions.shape, float(np.abs(found.predictions).sum()), found.label_ids.tolist()


@on_one
def metrics(kind: Any, folder: str) -> Any:
    def compute(found: Any) -> dict[str, float]:
        hits = found.predictions[:, :-1] == found.label_ids[:, 1:]
        return {"right": float(hits.mean()), "rows": float(len(hits)), "inputs": float(found.inputs.sum())}

    trainer = made(
        kind,
        folder,
        eval_dataset=rows(13, length=9),
        compute_metrics=compute,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        include_for_metrics=["inputs"],
    )
    found = trainer.evaluate()
    return found["eval_right"], found["eval_rows"], found["eval_inputs"]


@on_one
def metrics_batch_by_batch(kind: Any, folder: str) -> Any:
    seen: list[Any] = []

    def compute(found: Any, compute_result: bool = False) -> dict[str, float]:
        seen.append(tuple(found.predictions.shape))
        return {"batches": float(len(seen))} if compute_result else {}

    trainer = made(kind, folder, eval_dataset=EVEN, compute_metrics=compute, batch_eval_metrics=True)
    return trainer.evaluate()["eval_batches"], seen


@on_one
def several_datasets(kind: Any, folder: str) -> Any:
    found = made(kind, folder, eval_dataset={"a": EVEN, "b": rows(8, length=5)}).evaluate()
    return found["eval_a_loss"], found["eval_b_loss"]


# -------------------------------------------------------------------------------------------------- streams


class Streamed(IterableDataset[Any]):
    """A stream of a few rows, the same each time."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Any:
        return iter(rows(self.num))


@on_one
def stream(kind: Any, folder: str) -> Any:
    return trained(kind, folder, Streamed(24), max_steps=5)


@on_one
def stream_beside_accumulation(kind: Any, folder: str) -> Any:
    return trained(kind, folder, Streamed(48), max_steps=4, gradient_accumulation_steps=2)


@on_one
def evaluation_of_a_stream(kind: Any, folder: str) -> Any:
    return made(kind, folder, eval_dataset=Streamed(16), per_device_eval_batch_size=16 // world()).evaluate()[
        "eval_loss"
    ]


# --------------------------------------------------------------------------------------------- checkpoints


@on_ranks
def resumed(kind: Any, folder: str) -> Any:
    made(kind, folder, rows(48), save_strategy="steps", save_steps=2, max_steps=4).train()
    trainer = made(kind, folder, rows(48), num_train_epochs=2)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return learned(trainer)


@on_ranks
def resumed_with_accumulation(kind: Any, folder: str) -> Any:
    made(kind, folder, rows(48), save_strategy="epoch", gradient_accumulation_steps=2).train()
    trainer = made(kind, folder, rows(48), num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=True)
    return learned(trainer)


@on_one
def stream_resumed(kind: Any, folder: str) -> Any:
    made(kind, folder, Streamed(40), save_strategy="steps", save_steps=2, max_steps=3).train()
    trainer = made(kind, folder, Streamed(40), max_steps=7)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return learned(trainer)


@on_ranks
def few_checkpoints(kind: Any, folder: str) -> Any:
    made(kind, folder, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    names = (str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
    return sorted(name for name in names if "hetero" not in name) if rank() == 0 else []


# ---------------------------------------------------------------------------------------------------- tests


def everything(kind: Any, table: list[str], folder: str) -> dict[str, Any]:
    """The outcome of each of these behaviours, or the error that it ends in."""
    found: dict[str, Any] = {}
    for one in (*ON_RANKS, *ON_ONE):
        if one.name in table:
            try:
                found[one.name] = outcome(one, kind, Path(folder, f"{one.name}-{rank() if world() == 1 else 'all'}"))
            except Exception:
                found[one.name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Right ones, and this package's, of both ranks."""
    on_two, on_one = [one.name for one in ON_RANKS], [one.name for one in ON_ONE]
    stock = run_ranks(everything, RANKS, Trainer, on_two, str(tmp_path_factory.mktemp("stock")))
    alone = everything(Trainer, on_one, str(tmp_path_factory.mktemp("alone")))
    ours = run_ranks(everything, RANKS, ScriptedTrainer, on_two + on_one, str(tmp_path_factory.mktemp("ours")))
    return [{**found, **alone} for found in stock], ours


@pytest.mark.parametrize("name", [one.name for one in (*ON_RANKS, *ON_ONE)])
def test_as_trainer(name: str, outcomes: Any) -> None:
    """Both ranks learn, count, stop and save as Trainer does."""
    stock, ours = outcomes
    for right, found in zip(stock, ours, strict=True):
        assert not isinstance(right[name], str), right[name]
        assert same(right[name], found[name]), f"Trainer: {right[name]}\nHeteroTrainer: {found[name]}"
