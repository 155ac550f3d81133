"""Behaviour by behaviour, part two: schedules, optimizers, callbacks, checkpoints, and methods of a user's own."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from behaviours import check, make, options, pad, rows, trained
from conformance import Behaviour, Table, learned, subclass
from helpers import tiny_model, with_lora
from transformers import EarlyStoppingCallback, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

pytestmark = pytest.mark.slow

behaviour = Table()

EVEN = rows(8, length=8)
"""Of one length, so that a mean of batches is a mean of tokens."""


def history(trainer: Any) -> list[Any]:
    """All that was logged, but for times and this package's own numbers."""
    left_out = ("hetero/", "train_runtime", "eval_runtime", "eval_model_preparation_time", "total_flos")
    logs = trainer.state.log_history
    return [
        sorted((k, v) for k, v in log.items() if not k.startswith(left_out) and not k.endswith("_per_second"))
        for log in logs
    ]


def files(folder: str) -> list[str]:
    names = (str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
    return sorted(name for name in names if "hetero" not in name)


def watch(**methods: Any) -> TrainerCallback:
    """A callback of these methods."""
    return type("Watch", (TrainerCallback,), methods)()


# ----------------------------------------------------------------------------------------------- when what happens


@behaviour()
def everything_logged(kind: Any, folder: str) -> Any:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, "logging_first_step": True}
    trainer = make(kind, folder, eval_dataset=EVEN, gradient_accumulation_steps=2, num_train_epochs=2, **changes)
    found = trainer.train()
    return history(trainer), found.global_step, found.training_loss, sorted(found.metrics)


@behaviour()
def logged_by_epoch(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, rows(22), logging_strategy="epoch", num_train_epochs=3, gradient_accumulation_steps=4)
    trainer.train()
    return history(trainer)


@behaviour()
def evaluated_later(kind: Any, folder: str) -> Any:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "eval_on_start": True}
    trainer = make(kind, folder, eval_dataset=EVEN, **changes)
    trainer.train()
    return history(trainer)


@behaviour()
def steps_as_shares(kind: Any, folder: str) -> Any:
    changes = {"logging_steps": 0.34, "eval_steps": 0.5, "save_steps": 0.5, "eval_strategy": "steps"}
    trainer = make(kind, folder, eval_dataset=EVEN, save_strategy="steps", **changes)
    trainer.train()
    return history(trainer), files(folder)


@behaviour()
def part_of_an_epoch(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, num_train_epochs=1.5, gradient_accumulation_steps=2)
    trainer.train()
    return history(trainer), trainer.state.max_steps, trainer.state.epoch


@behaviour()
def early_stopping(kind: Any, folder: str) -> Any:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = make(kind, folder, eval_dataset=EVEN, callbacks=[stop], num_train_epochs=3, **changes, **best)
    trainer.train()
    return history(trainer), trainer.state.best_metric, trainer.state.best_global_step, learned(trainer)[2]


@behaviour()
def best_by_own_metric(kind: Any, folder: str) -> Any:
    def compute(found: Any) -> Any:
        return {"right": float((found.predictions.argmax(-1)[:, :-1] == found.label_ids[:, 1:]).sum())}

    changes = {"metric_for_best_model": "right", "greater_is_better": True, "save_strategy": "best"}
    trainer = make(
        kind, folder, eval_dataset=EVEN, compute_metrics=compute, eval_strategy="steps", eval_steps=2, **changes
    )
    trainer.train()
    return history(trainer), trainer.state.best_metric, files(folder)


@behaviour()
def few_checkpoints(kind: Any, folder: str) -> Any:
    changes = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_only_model": True}
    trainer = make(kind, folder, **changes)
    trainer.train()
    return files(folder)


@behaviour()
def one_checkpoint_and_the_best(kind: Any, folder: str) -> Any:
    changes = {
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }
    trainer = make(kind, folder, eval_dataset=EVEN, eval_strategy="epoch", num_train_epochs=3, **changes)
    trainer.train()
    return files(folder), Path(trainer.state.best_model_checkpoint).name, learned(trainer)


@behaviour()
def state_in_a_checkpoint(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
    trainer.train()
    state = json.loads(Path(folder, "checkpoint-3", "trainer_state.json").read_text())
    told = {key: value for key, value in state.items() if key not in ("log_history", "total_flos")}
    return sorted((k, v) for k, v in told.items() if k != "stateful_callbacks"), sorted(state["stateful_callbacks"])


@behaviour()
def results_in_files(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    found = trainer.train()
    trainer.save_metrics("train", found.metrics)
    trainer.save_state()
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    return files(folder)


@behaviour()
def progress_bars(kind: Any, folder: str) -> Any:
    seen: list[Any] = []

    def on_prediction_step(
        self: Any, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
    ) -> None:
        seen.append((len(eval_dataloader), len(eval_dataloader.dataset)))

    class Bars(ProgressCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, **kwargs)
            seen.append((self.training_bar.n, self.training_bar.total))

    callbacks = [Bars(), watch(on_prediction_step=on_prediction_step)]
    make(kind, folder, eval_dataset=EVEN, eval_strategy="epoch", callbacks=callbacks).train()
    return seen


# --------------------------------------------------------------------------------------------- optimizers, schedules


@behaviour()
def schedule_with_warmup(kind: Any, folder: str) -> Any:
    changes = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "num_train_epochs": 2}
    trainer = make(kind, folder, **changes)
    trainer.train()
    return learned(trainer), [log.get("learning_rate") for log in trainer.state.log_history]


@behaviour()
def schedule_by_evaluation(kind: Any, folder: str) -> Any:
    changes = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.1}}
    more = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    trainer = make(kind, folder, eval_dataset=EVEN, **changes, **more)
    trainer.train()
    return learned(trainer), [log.get("learning_rate") for log in trainer.state.log_history]


@behaviour()
def schedules_that_take_their_own_arguments(kind: Any, folder: str) -> Any:
    kwargs = {"num_decay_steps": 3}
    return trained(kind, folder, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs, warmup_steps=1)


@behaviour()
def gradients_not_clipped(kind: Any, folder: str) -> Any:
    return trained(kind, folder, max_grad_norm=0.0), trained(kind, folder, max_grad_norm=0.1)


@behaviour()
def optimizer_brought_along(kind: Any, folder: str) -> Any:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return trained(kind, folder, model=model, optimizers=(optimizer, schedule), gradient_accumulation_steps=2)


@behaviour()
def optimizer_by_class(kind: Any, folder: str) -> Any:
    return trained(kind, folder, optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 1e-3}))


@behaviour()
def optimizers_by_name(kind: Any, folder: str) -> Any:
    return [trained(kind, folder, optim=name) for name in ("adafactor", "sgd")]


@behaviour()
def own_optimizer_and_schedule(kind: Any, folder: str) -> Any:
    def create_optimizer(self: Any, *args: Any) -> Any:
        groups = [{"params": [p], "lr": 1e-3 / (n + 1)} for n, p in enumerate(self.model.parameters())]
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        assert num_training_steps == 6
        self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer or self.optimizer, 0.5)
        return self.lr_scheduler

    own = subclass(kind, create_optimizer=create_optimizer, create_scheduler=create_scheduler)
    return trained(own, folder)


@behaviour()
def own_groups_of_parameters(kind: Any, folder: str) -> Any:
    def names(self: Any, model: Any) -> list[str]:
        return [name for name, _ in model.named_parameters() if "mlp" in name]

    return trained(subclass(kind, get_decay_parameter_names=names), folder, weight_decay=0.5)


@behaviour()
def optimizer_looked_at(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.create_optimizer()
    before = trainer.get_num_trainable_parameters() if hasattr(trainer, "get_num_trainable_parameters") else 0
    rates = trainer.get_learning_rates() if hasattr(trainer, "get_learning_rates") else 0
    trainer.train()
    return before, rates, learned(trainer)


# -------------------------------------------------------------------------------------------------- other arguments


@behaviour()
def in_bfloat16(kind: Any, folder: str) -> Any:
    found = trained(kind, folder, bf16=True)
    return found[0], [round(loss, 1) for loss, _ in found[1]]


@behaviour()
def recomputed(kind: Any, folder: str) -> Any:
    kinds: list[Any] = [None, {"use_reentrant": True}, {"use_reentrant": False}]
    return [
        trained(kind, folder, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs, max_steps=2)
        for kwargs in kinds
    ]


@behaviour()
def recomputed_by_the_model(kind: Any, folder: str) -> Any:
    model = tiny_model()
    model.activation_checkpointing_enable()
    found = trained(kind, folder, model=model)
    return found, model.is_activation_checkpointing


@behaviour()
def full_determinism(kind: Any, folder: str) -> Any:
    found = trained(kind, folder, full_determinism=True, seed=3)
    torch.use_deterministic_algorithms(False)
    return found


@behaviour()
def caches_emptied(kind: Any, folder: str) -> Any:
    return trained(kind, folder, torch_empty_cache_steps=2, skip_memory_metrics=True)


@behaviour()
def tokens_counted(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, rows(24, length=8), include_num_input_tokens_seen="all", gradient_accumulation_steps=2)
    trainer.train()
    return trainer.state.num_input_tokens_seen, history(trainer)


@behaviour()
def operations_counted(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, rows(24, length=8), gradient_accumulation_steps=2)
    trainer.train()
    return trainer.state.total_flos


@behaviour()
def own_operations(kind: Any, folder: str) -> Any:
    def floating_point_ops(self: Any, inputs: Any) -> int:
        return int(inputs["input_ids"].numel())

    trainer = make(subclass(kind, floating_point_ops=floating_point_ops), folder, rows(24, length=8))
    trainer.train()
    return trainer.state.total_flos


@behaviour()
def labels_by_name(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN, label_names=["labels"])
    trainer.train()
    return learned(trainer), trainer.evaluate()["eval_loss"]


@behaviour()
def losses_that_are_not_finite(kind: Any, folder: str) -> Any:
    model = tiny_model()
    model.lm_head.weight.data[0] = float("inf")
    return [trained(kind, folder, model=model, logging_nan_inf_filter=keeps, max_steps=2)[1] for keeps in (True, False)]


@behaviour()
def workers_that_stay(kind: Any, folder: str) -> Any:
    return trained(
        kind,
        folder,
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=1,
        num_train_epochs=2,
    )


# ------------------------------------------------------------------------------------------------- set after __init__


@behaviour()
def data_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=rows(12, length=6))
    trainer.train_dataset, trainer.eval_dataset = rows(10, seed=3), EVEN
    trainer.train()
    return learned(trainer), trainer.evaluate()["eval_loss"]


@behaviour()
def arguments_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.args.learning_rate, trainer.args.num_train_epochs, trainer.args.max_grad_norm = 5e-3, 2, 0.3
    trainer.args.seed, trainer.args.weight_decay, trainer.args.lr_scheduler_type = 7, 0.1, "constant"
    trainer.train()
    return learned(trainer)


@behaviour()
def batch_size_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.args.per_device_train_batch_size = 2
    trainer.train()
    return learned(trainer), trainer.state.train_batch_size


@behaviour()
def metrics_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    trainer.compute_metrics = lambda found: {"n": float(found.label_ids.shape[0])}
    return trainer.evaluate()["eval_n"]


@behaviour()
def optimizer_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.train()
    return learned(trainer)


@behaviour()
def methods_put_on_the_instance(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    stock = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: 3 * stock(*args, **kwargs)
    trainer.train()
    return learned(trainer)


@behaviour()
def model_frozen_in_part(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = "mlp" in name
    trainer.train()
    return learned(trainer)


# ------------------------------------------------------------------------------------------------------- callbacks


@behaviour()
def callback_that_evaluates(kind: Any, folder: str) -> Any:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_evaluate = state.global_step in (2, 3)
        control.should_save = state.global_step == 4
        control.should_log = state.global_step in (1, 5)
        return control

    watching = watch(on_step_end=on_step_end)
    trainer = make(kind, folder, eval_dataset=EVEN, callbacks=[watching], logging_strategy="no")
    trainer.train()
    return history(trainer), files(folder)


@behaviour()
def callback_that_stops_within_a_step(kind: Any, folder: str) -> Any:
    def on_substep_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2

    watching = watch(on_substep_end=on_substep_end)
    return trained(kind, folder, callbacks=[watching], gradient_accumulation_steps=2)[0]


@behaviour()
def callback_that_changes_the_rate(kind: Any, folder: str) -> Any:
    def on_step_begin(self: Any, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if state.global_step % 2 else 1e-3

    return trained(kind, folder, callbacks=[watch(on_step_begin=on_step_begin)])


@behaviour()
def callback_that_reads_gradients(kind: Any, folder: str) -> Any:
    seen: list[float] = []

    def on_pre_optimizer_step(self: Any, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        seen.append(float(sum(p.grad.norm() for p in model.parameters())))

    callbacks = [watch(on_pre_optimizer_step=on_pre_optimizer_step)]
    trained(kind, folder, callbacks=callbacks, gradient_accumulation_steps=3)
    return seen


@behaviour()
def callback_that_uses_the_model(kind: Any, folder: str) -> Any:
    seen: list[Any] = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.eval()
        with torch.no_grad():
            ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
            mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
            found = model(input_ids=ids, attention_mask=mask, labels=ids)
            seen.append((float(found.loss), found.logits.sum(-1).tolist()[0]))
            seen.append(model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0).tolist())
        model.train()

    return trained(kind, folder, callbacks=[watch(on_step_end=on_step_end)], max_steps=2), seen


@behaviour()
def callback_added_and_removed(kind: Any, folder: str) -> Any:
    seen: list[int] = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen.append(state.global_step)

    trainer, watching = make(kind, folder), watch(on_step_end=on_step_end)
    trainer.add_callback(watching)
    trainer.train()
    trainer.remove_callback(watching)
    trainer.train()
    return seen


@behaviour()
def what_callbacks_are_given(kind: Any, folder: str) -> Any:
    seen: list[Any] = []

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        seen.append((sorted(kwargs), sorted(k for k in logs if not k.startswith("hetero/"))))

    make(kind, folder, callbacks=[watch(on_log=on_log)], max_steps=2).train()
    return seen


# ------------------------------------------------------------------------------------------------ methods of one's own


@behaviour()
def own_log(kind: Any, folder: str) -> Any:
    def log(self: Any, logs: Any, *args: Any, **kwargs: Any) -> None:
        kind.log(self, {**logs, "twice": 2 * logs.get("loss", 0.0)}, *args, **kwargs)

    trainer = make(subclass(kind, log=log), folder)
    trainer.train()
    return history(trainer)


@behaviour()
def own_evaluate(kind: Any, folder: str) -> Any:
    def evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = kind.evaluate(self, *args, **kwargs)
        return {**found, "eval_double": 2 * found["eval_loss"]}

    best = {"metric_for_best_model": "double", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make(subclass(kind, evaluate=evaluate), folder, eval_dataset=EVEN, eval_strategy="epoch", **best)
    trainer.train()
    return trainer.state.best_metric


@behaviour()
def own_saving(kind: Any, folder: str) -> Any:
    def save_model(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
        kind.save_model(self, output_dir, _internal_call)
        Path(output_dir or self.args.output_dir, "mine.txt").write_text("x")

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        kind._save_checkpoint(self, model, trial)
        Path(self.args.output_dir, f"saved-{self.state.global_step}").write_text("x")

    own = subclass(kind, save_model=save_model, _save_checkpoint=_save_checkpoint)
    make(own, folder, save_strategy="steps", save_steps=3).train()
    trainer = make(own, folder)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return files(folder), learned(trainer)


@behaviour()
def own_prepare_input(kind: Any, folder: str) -> Any:
    def prepare(self: Any, data: Any) -> Any:
        data = kind._prepare_input(self, data)
        return data.clamp(max=50) if isinstance(data, torch.Tensor) else data

    return trained(subclass(kind, _prepare_input=prepare), folder)


@behaviour()
def own_number_of_examples(kind: Any, folder: str) -> Any:
    trainer = make(subclass(kind, num_examples=lambda self, loader: 5), folder)
    trainer.train()
    return learned(trainer), trainer.state.max_steps


@behaviour()
def own_signature_columns(kind: Any, folder: str) -> Any:
    def columns(self: Any) -> None:
        self._signature_columns = ["input_ids", "labels", "weights"]

    seen: list[bool] = []

    def collate(examples: list[Any]) -> Any:
        seen.append("weights" in examples[0])
        return pad(examples)

    own = subclass(kind, _set_signature_columns_if_needed=columns)
    found = trained(own, folder, [{**row, "weights": 1.0} for row in rows()], data_collator=collate)
    return found, all(seen)


@behaviour()
def own_train(kind: Any, folder: str) -> Any:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.args.learning_rate = 5e-3
        return kind.train(self, *args, **kwargs)

    return trained(subclass(kind, train=train), folder)


@behaviour()
def own_context_of_the_loss(kind: Any, folder: str) -> Any:
    seen: list[int] = []

    def context(self: Any) -> Any:
        seen.append(1)
        return kind.compute_loss_context_manager(self)

    found = trained(subclass(kind, compute_loss_context_manager=context), folder)
    return found, bool(seen)


@behaviour()
def own_clipping(kind: Any, folder: str) -> Any:
    def clip(self: Any, model: Any) -> Any:
        return torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)

    return trained(subclass(kind, _clip_grad_norm=clip), folder)


# ------------------------------------------------------------------------------------------------------- going on


@behaviour()
def resumed_from_the_newest(kind: Any, folder: str) -> Any:
    make(kind, folder, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2).train()
    trainer = make(kind, folder, gradient_accumulation_steps=2, num_train_epochs=3)
    trainer.train(resume_from_checkpoint=True)
    return learned(trainer), history(trainer)


@behaviour()
def resumed_at_the_end_of_an_epoch(kind: Any, folder: str) -> Any:
    make(kind, folder, rows(20), save_strategy="epoch", num_train_epochs=2, gradient_accumulation_steps=2).train()
    trainer = make(kind, folder, rows(20), num_train_epochs=3, gradient_accumulation_steps=2)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    return learned(trainer), history(trainer)


@behaviour()
def resumed_with_data_skipped(kind: Any, folder: str) -> Any:
    make(kind, folder, save_strategy="steps", save_steps=4).train()
    trainer = make(kind, folder, ignore_data_skip=True, num_train_epochs=2)
    trainer.train(resume_from_checkpoint=True)
    return learned(trainer)


@behaviour()
def resumed_by_the_arguments(kind: Any, folder: str) -> Any:
    make(kind, folder, save_strategy="steps", save_steps=4).train()
    changes = {"resume_from_checkpoint": f"{folder}/checkpoint-4"}
    trainer = make(kind, folder, **changes)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    return learned(trainer)


@behaviour()
def callbacks_that_go_on(kind: Any, folder: str) -> Any:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "greater_is_better": True, "restore_callback_states_from_checkpoint": True}

    def one(steps: int) -> Any:
        stop = EarlyStoppingCallback(early_stopping_patience=5)
        return make(kind, folder, eval_dataset=EVEN, callbacks=[stop], max_steps=steps, **changes, **best)

    one(3).train()
    trainer = one(6)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    return history(trainer), [
        c.early_stopping_patience_counter
        for c in trainer.callback_handler.callbacks
        if isinstance(c, EarlyStoppingCallback)
    ]


@behaviour()
def resumed_with_the_best_model(kind: Any, folder: str) -> Any:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    one = {"eval_dataset": EVEN, "load_best_model_at_end": True, **changes}
    make(kind, folder, max_steps=4, **one).train()
    trainer = make(kind, folder, max_steps=6, **one)
    trainer.train(resume_from_checkpoint=True)
    return learned(trainer), trainer.state.best_metric, Path(trainer.state.best_model_checkpoint).name


# -------------------------------------------------------------------------------------------------------- models


@behaviour()
def best_adapter(kind: Any, folder: str) -> Any:
    changes = {"save_strategy": "epoch", "load_best_model_at_end": True, "greater_is_better": True}
    model = with_lora(tiny_model())
    trainer = make(kind, folder, model=model, eval_dataset=EVEN, eval_strategy="epoch", num_train_epochs=2, **changes)
    trainer.train()
    return learned(trainer), trainer.state.best_metric, trainer.evaluate()["eval_loss"]


@behaviour()
def adapter_with_a_trained_head(kind: Any, folder: str) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    return trained(kind, folder, model=get_peft_model(tiny_model(), config), gradient_accumulation_steps=2)


@behaviour()
def adapter_merged_after_training(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, model=with_lora(tiny_model()))
    trainer.train()
    merged = trainer.model.merge_and_unload()
    with torch.no_grad():
        return merged(torch.tensor([[5, 6, 7]])).logits.sum(-1).tolist(), merged.config._attn_implementation


@behaviour()
def tied_weights(kind: Any, folder: str) -> Any:
    model = tiny_model(tie_word_embeddings=True)
    found = trained(kind, folder, model=model)
    return found, model.lm_head.weight is model.model.embed_tokens.weight


@behaviour()
def adapters(kind: Any, folder: str) -> Any:
    make(kind, folder, model=with_lora(tiny_model()), save_strategy="steps", save_steps=3).train()
    trainer = make(kind, folder, model=with_lora(tiny_model()), eval_dataset=EVEN)
    trainer.train(resume_from_checkpoint=True)
    return learned(trainer), trainer.evaluate()["eval_loss"], files(folder)


@behaviour()
def adapters_of_transformers(kind: Any, folder: str) -> Any:
    from peft import LoraConfig

    model = tiny_model()
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return trained(kind, folder, model=model, gradient_accumulation_steps=2)


@behaviour()
def model_in_bfloat16(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, model=tiny_model(dtype=torch.bfloat16), eval_dataset=EVEN)
    trainer.train()
    return str(trainer.model.dtype), [round(loss, 1) for loss, _ in learned(trainer)[1]]


@behaviour()
def model_resized(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.model.resize_token_embeddings(120, mean_resizing=False)
    trainer.train()
    return learned(trainer)


@behaviour()
def attention_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.model.set_attn_implementation("eager")
    trainer.train()
    return learned(trainer), trainer.model.config._attn_implementation


@behaviour()
def wrapped_by_a_script(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    loader = trainer.accelerator.prepare(torch.utils.data.DataLoader(rows(8), batch_size=4, collate_fn=pad))
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    with torch.no_grad():
        return [float(model(**batch).loss) for batch in loader], model is trainer.model


@behaviour()
def model_of_learnt_positions(kind: Any, folder: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0)
    config.attn_pdrop = 0.0
    data = [
        {
            "input_ids": [0] * 4 + row["input_ids"],
            "labels": [-100] * 5 + row["labels"][1:],
            "attention_mask": [0] * 4 + [1] * len(row["input_ids"]),
        }
        for row in rows(24, length=8)
    ]
    return trained(kind, folder, data, model=GPT2LMHeadModel(config), data_collator=None)


class OwnMean(LlamaForCausalLM):
    """Someone's model, whose loss is its own."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        found = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is not None:
            logits = found.logits[:, :-1].flatten(0, 1)
            found.loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return found


@behaviour("loss")
def model_with_own_loss(kind: Any, folder: str) -> Any:
    torch.manual_seed(0)
    return trained(kind, folder, model=OwnMean(tiny_model().config), gradient_accumulation_steps=2)


@behaviour()
def loss_that_masks_by_itself(kind: Any, folder: str) -> Any:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        targets = labels[:, 1:]
        log_probs = outputs.logits[:, :-1].float().log_softmax(-1)
        each = -log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return each.where(targets != -100, 0.0).sum() / num_items_in_batch

    return trained(kind, folder, compute_loss_func=loss, gradient_accumulation_steps=2)


@behaviour()
def loss_with_a_penalty_of_logits(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        targets = inputs["labels"][:, 1:] != -100
        squares = outputs.logits[:, :-1].logsumexp(-1) ** 2
        loss = outputs.loss + 1e-2 * squares[targets].sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    return trained(subclass(kind, compute_loss=compute_loss), folder, rows(24, length=9))


@behaviour("Own.compute_loss could not be tried")
def loss_that_reads_the_mask(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        inputs.pop("labels")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        outputs = model(**inputs)
        each = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (each * mask[:, 1:].flatten()).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    return trained(subclass(kind, compute_loss=compute_loss), folder)


@behaviour()
def metrics_beside_the_loss(kind: Any, folder: str) -> Any:
    seen: list[int] = []

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        loss, outputs = kind.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.is_in_train and model is self.model_wrapped:
            right = outputs.logits.argmax(-1)[:, :-1] == inputs["labels"][:, 1:]
            seen.append(int(right[inputs["labels"][:, 1:] != -100].sum()))
        return (loss, outputs) if return_outputs else loss

    return trained(subclass(kind, compute_loss=compute_loss), folder), sum(seen)


@behaviour()
def two_trainers_of_one_model(kind: Any, folder: str) -> Any:
    model = tiny_model()
    first, second = (
        make(kind, folder, model=model),
        make(kind, folder, rows(12, seed=5), model=model, eval_dataset=EVEN),
    )
    first.train()
    second.train()
    found = second.evaluate()["eval_loss"]
    first.train()
    return found, learned(first), learned(second)


@behaviour()
def run_that_failed_before(kind: Any, folder: str) -> Any:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("on purpose")

    failing = watch(on_step_end=on_step_end)
    trainer = make(kind, folder, callbacks=[failing], save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    attention = trainer.model.config._attn_implementation
    trainer.remove_callback(failing)
    trainer.train(resume_from_checkpoint=True)
    return attention, learned(trainer)


@behaviour()
def random_numbers_of_a_callback(kind: Any, folder: str) -> Any:
    import random

    seen: list[Any] = []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen.append((float(torch.rand(())), random.random(), float(np.random.rand())))

    changes = {"eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2}
    make(kind, folder, eval_dataset=EVEN, callbacks=[watch(on_step_end=on_step_end)], **changes).train()
    return seen


@behaviour()
def no_epoch_at_all(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, num_train_epochs=0)
    trainer.train()
    return learned(trainer)


@behaviour()
def arguments_by_position(kind: Any, folder: str) -> Any:
    trainer = kind(tiny_model(), options(folder), pad, rows(12), EVEN)
    trainer.train()
    return learned(trainer), trainer.evaluate()["eval_loss"], trainer.args.output_dir == folder


@behaviour()
def arguments_are_the_ones_given(kind: Any, folder: str) -> Any:
    args = options(folder)
    trainer = kind(model=tiny_model(), args=args, train_dataset=rows(12), data_collator=pad)
    return trainer.args is args, trainer.data_collator is pad


@behaviour()
def step_that_reads_the_accelerator(kind: Any, folder: str) -> Any:
    seen: list[Any] = []

    def training_step(self: Any, model: Any, *others: Any, **kwargs: Any) -> Any:
        state = self.accelerator.gradient_state
        seen.append((state.sync_gradients, self.current_gradient_accumulation_steps, model.training))
        return kind.training_step(self, model, *others, **kwargs)

    trained(subclass(kind, training_step=training_step), folder, rows(20), gradient_accumulation_steps=2)
    return seen


@behaviour()
def resumed_with_another_split_of_a_step(kind: Any, folder: str) -> Any:
    make(kind, folder, rows(48), save_strategy="steps", save_steps=2, gradient_accumulation_steps=2).train()
    trainer = make(kind, folder, rows(48), per_device_train_batch_size=8)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return learned(trainer)


@behaviour()
def resumed_from_a_checkpoint_of_trainer(kind: Any, folder: str) -> Any:
    make(Trainer, folder, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2).train()
    trainer = make(kind, folder, gradient_accumulation_steps=2, num_train_epochs=2)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return learned(trainer)


@behaviour()
def resumed_by_trainer(kind: Any, folder: str) -> Any:
    make(kind, folder, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2).train()
    trainer = make(Trainer, folder, gradient_accumulation_steps=2, num_train_epochs=2)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return learned(trainer)


@behaviour()
def batches_uneven_for_accelerate(kind: Any, folder: str) -> Any:
    config = {"even_batches": False, "non_blocking": True}
    return trained(kind, folder, rows(22), accelerator_config=config, num_train_epochs=2)


@behaviour()
def modes_of_the_model(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    found = [trainer.model.training]
    trainer.evaluate()
    found.append(trainer.model.training)
    trainer.train()
    return [*found, trainer.model.training, trainer.is_in_train, type(trainer.model_wrapped).__name__]


@behaviour()
def trainer_in_a_pickle(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.train()
    state = copy.deepcopy(trainer.state)
    return state.global_step, type(pickle.loads(pickle.dumps(trainer.args))).__name__


# -------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("one", behaviour.all, ids=lambda one: one.name)
def test_as_trainer_or_refused(one: Behaviour, tmp_path: Path) -> None:
    """The outcome is Trainer's, or a refusal that names what it is about."""
    check(one, tmp_path)
