"""Behaviour by behaviour: what Trainer does, HeteroTrainer does, or refuses in words that name it.

Each behaviour is a function of the trainer's class. It runs with both on one tiny model; what it gives is compared, or
the refusal's words are. A report of another outcome becomes a line here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from behaviours import Here, check, make, pad, rows, trained
from conformance import Behaviour, Table, learned, outcome, same, subclass
from helpers import tiny_model
from torch.nn import functional as F
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback

behaviour = Table()


# ------------------------------------------------------------------------------------------------ steps and arguments


@behaviour()
def plain_run(kind: Any, folder: str) -> Any:
    return trained(kind, folder)


@behaviour()
def accumulation(kind: Any, folder: str) -> Any:
    return trained(kind, folder, gradient_accumulation_steps=3, num_train_epochs=2)


@behaviour()
def accumulation_as_asked(kind: Any, folder: str) -> Any:
    class Look(TrainerCallback):
        seen = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen = args.gradient_accumulation_steps

    look = Look()
    trainer = make(kind, folder, gradient_accumulation_steps=2, save_strategy="epoch", callbacks=[look])
    trainer.train()
    saved = torch.load(Path(folder, "checkpoint-3", "training_args.bin"), weights_only=False)
    trainer.create_model_card(model_name="x")
    card = [line for line in Path(folder, "README.md").read_text().splitlines() if "batch_size" in line]
    return trainer.args.gradient_accumulation_steps, look.seen, saved.gradient_accumulation_steps, card


@behaviour()
def accumulation_set_later(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.args.gradient_accumulation_steps = 2
    trainer.train()
    return learned(trainer)


@behaviour()
def numbers_of_epochs(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, rows(30), gradient_accumulation_steps=3, num_train_epochs=2)
    trainer.train()
    return [log["epoch"] for log in trainer.state.log_history]


@behaviour()
def order_of_events(kind: Any, folder: str) -> Any:
    class Note(TrainerCallback):
        events: list[str]

        def __init__(self) -> None:
            self.events = []

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                self.events.append(name)
            return super().__getattribute__(name)

    note = Note()
    make(kind, folder, callbacks=[note], gradient_accumulation_steps=2).train()
    return [event for event in note.events if event != "on_step_report"]


@behaviour()
def drop_last_beside_accumulation(kind: Any, folder: str) -> Any:
    return trained(kind, folder, rows(30), gradient_accumulation_steps=2, dataloader_drop_last=True)


@behaviour()
def samples_of_a_step(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, gradient_accumulation_steps=3)
    loader = trainer.get_train_dataloader()
    return trainer.get_total_train_batch_size(trainer.args), len(loader), trainer.num_examples(loader)


@behaviour()
def most_steps_over_epochs(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, rows(18), max_steps=8)
    trainer.train()
    return learned(trainer), trainer.state.epoch, trainer.state.num_train_epochs


@behaviour()
def synchronised_each_batch(kind: Any, folder: str) -> Any:
    config = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    return trained(kind, folder, gradient_accumulation_steps=2, accelerator_config=config)


@behaviour()
def seed_at_training(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    torch.manual_seed(123)
    trainer.train()
    return learned(trainer)


@behaviour()
def seed_of_the_data(kind: Any, folder: str) -> Any:
    return trained(kind, folder, data_seed=5, num_train_epochs=2)


@behaviour()
def sampler_without_seed(kind: Any, folder: str) -> Any:
    return trained(kind, folder, accelerator_config={"use_seedable_sampler": False}, num_train_epochs=2)


@behaviour()
def dataset_order(kind: Any, folder: str) -> Any:
    return trained(kind, folder, train_sampling_strategy="sequential")


@behaviour()
def loss_said_to_be_a_mean(kind: Any, folder: str) -> Any:
    return trained(subclass(kind, loss_is_scaled_for_ga=False), folder, gradient_accumulation_steps=2)


@behaviour()
def tokens_seen(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, include_num_input_tokens_seen="non_padding", gradient_accumulation_steps=2)
    trainer.train()
    return trainer.state.num_input_tokens_seen


@behaviour()
def trained_twice(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.train()
    trainer.train()
    return learned(trainer)


@behaviour()
def model_made_anew(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, model_init=lambda: tiny_model())
    trainer.train()
    first = learned(trainer)
    trainer.train()
    return first, learned(trainer)


@behaviour()
def model_replaced(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    trainer.model = trainer.model_wrapped = tiny_model("qwen3")
    trainer.train()
    return learned(trainer)


@behaviour("steps inside backward")
def optimizer_that_steps_in_backward(kind: Any, folder: str) -> Any:
    return trained(kind, folder, optim="lomo")


@behaviour()
def resumed(kind: Any, folder: str) -> Any:
    make(kind, folder, save_strategy="steps", save_steps=4, gradient_accumulation_steps=1).train()
    trainer = make(kind, folder)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    return learned(trainer)


@behaviour()
def stopped_by_a_callback(kind: Any, folder: str) -> Any:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    return trained(kind, folder, callbacks=[Stop()])[0]


@behaviour()
def epoch_left_by_a_callback(kind: Any, folder: str) -> Any:
    class Leave(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step == 3

    return trained(kind, folder, callbacks=[Leave()], num_train_epochs=2)


# ------------------------------------------------------------------------------------------------------------- loaders


@behaviour()
def callback_reads_the_train_dataloader(kind: Any, folder: str) -> Any:
    class Look(TrainerCallback):
        seen: Any = None

        def on_train_begin(self, *args: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
            self.seen = {name: tuple(x.shape) for name, x in next(iter(train_dataloader)).items()}

    look = Look()
    make(kind, folder, callbacks=[look]).train()
    return sorted(look.seen.items())


@behaviour()
def callback_reads_the_eval_dataloader(kind: Any, folder: str) -> Any:
    class Look(TrainerCallback):
        seen: Any = None

        def on_evaluate(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
            self.seen = [tuple(batch["input_ids"].shape) for batch in eval_dataloader]

    look = Look()
    make(kind, folder, callbacks=[look], eval_dataset=rows(9), eval_strategy="epoch").train()
    return look.seen


@behaviour()
def script_reads_its_loaders(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=rows(9))
    loader = trainer.get_eval_dataloader()
    twice = [[batch["input_ids"].tolist() for batch in loader] for _ in range(2)]
    other = [batch["labels"].tolist() for batch in trainer.get_test_dataloader(rows(5))]
    torch.manual_seed(3)
    return twice, other, [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]


@behaviour()
def script_computes_a_loss(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=rows(9))
    trainer.model.eval()
    return [trainer.compute_loss(trainer.model, batch).item() for batch in trainer.get_eval_dataloader()]


@behaviour()
def two_loaders_at_a_time(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    first, second = trainer.get_train_dataloader(), trainer.get_train_dataloader()
    pairs = zip(first, second, strict=True)
    return [(tuple(a["input_ids"].shape), tuple(b["input_ids"].shape)) for a, b in pairs]


@behaviour("get_train_dataloader is its own")
def own_train_dataloader(kind: Any, folder: str) -> Any:
    own = subclass(kind, get_train_dataloader=lambda self: torch.utils.data.DataLoader(rows(), 4, collate_fn=pad))
    return trained(own, folder)


@behaviour()
def own_eval_dataloader(kind: Any, folder: str) -> Any:
    own = subclass(
        kind, get_eval_dataloader=lambda self, data=None: torch.utils.data.DataLoader(rows(4), 4, collate_fn=pad)
    )
    return make(own, folder, eval_dataset=rows(9)).evaluate()["eval_loss"]


@behaviour()
def own_train_sampler(kind: Any, folder: str) -> Any:
    own = subclass(kind, _get_train_sampler=lambda self, data=None: SequentialSampler(self.train_dataset))
    return trained(own, folder, num_train_epochs=2)


@behaviour()
def own_eval_sampler(kind: Any, folder: str) -> Any:
    own = subclass(kind, _get_eval_sampler=lambda self, data: range(4))
    return make(own, folder, eval_dataset=rows(9, length=8)).evaluate()["eval_loss"]


@behaviour()
def collator_set_later(kind: Any, folder: str) -> Any:
    def halved(examples: list[Any]) -> Any:
        batch = pad(examples)
        return {**batch, "labels": batch["labels"].where(batch["labels"] % 2 == 0, -100)}

    trainer = make(kind, folder)
    trainer.data_collator = halved
    trainer.train()
    return learned(trainer)


@behaviour()
def collator_that_adds_a_token(kind: Any, folder: str) -> Any:
    def ended(examples: list[Any]) -> Any:
        return pad([{name: [*values, 2] for name, values in example.items()} for example in examples])

    return trained(kind, folder, data_collator=ended)


@behaviour()
def collator_that_truncates(kind: Any, folder: str) -> Any:
    def cut(examples: list[Any]) -> Any:
        return pad([{name: values[:9] for name, values in example.items()} for example in examples])

    return trained(kind, folder, data_collator=cut)


@behaviour("pads on the left")
def collator_that_pads_on_the_left(kind: Any, folder: str) -> Any:
    def pad_left(examples: list[Any]) -> Any:
        batch = pad([{name: values[::-1] for name, values in example.items()} for example in examples])
        return {name: values.flip(1) for name, values in batch.items()}

    return trained(kind, folder, data_collator=pad_left)


@behaviour()
def keys_that_no_model_takes(kind: Any, folder: str) -> Any:
    return trained(kind, folder, [{**row, "note": "x" * n} for n, row in enumerate(rows())])


@behaviour()
def columns_that_no_model_takes(kind: Any, folder: str) -> Any:
    return trained(kind, folder, datasets.Dataset.from_list([{**row, "note": "x"} for row in rows()]))


@behaviour()
def tokenised_as_it_is_read(kind: Any, folder: str) -> Any:
    texts = datasets.Dataset.from_dict({"text": [" ".join(map(str, row["input_ids"])) for row in rows()]})

    def tokenise(batch: Any) -> Any:
        ids = [list(map(int, text.split())) for text in batch["text"]]
        return {"input_ids": ids, "labels": ids}

    return trained(kind, folder, texts.with_transform(tokenise), remove_unused_columns=False)


@behaviour()
def shortened_as_it_is_read(kind: Any, folder: str) -> Any:
    table = datasets.Dataset.from_list(rows())

    def cut(batch: Any) -> Any:
        return {name: [values[:7] for values in batch[name]] for name in ("input_ids", "labels")}

    return trained(kind, folder, table.with_transform(cut), remove_unused_columns=False)


@behaviour()
def columns_of_numpy(kind: Any, folder: str) -> Any:
    return trained(kind, folder, datasets.Dataset.from_list(rows()).with_format("numpy"))


class Epochs(torch.utils.data.Dataset[Any]):
    """Rows that differ from epoch to epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> Any:
        return rows(12, seed=self.epoch)[row]


@behaviour()
def rows_of_an_epoch(kind: Any, folder: str) -> Any:
    return trained(kind, folder, Epochs(), num_train_epochs=3)


@behaviour()
def rows_read_by_workers(kind: Any, folder: str) -> Any:
    return trained(kind, folder, dataloader_num_workers=1)


# -------------------------------------------------------------------------------------------------------------- losses


def shifted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / num_items_in_batch


@behaviour()
def loss_that_is_watched(kind: Any, folder: str) -> Any:
    seen: list[float] = []

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        loss, outputs = kind.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.is_in_train and model is self.model_wrapped:
            seen.append(float(loss.detach()))
        return (loss, outputs) if return_outputs else loss

    return trained(subclass(kind, compute_loss=compute_loss), folder), seen


@behaviour()
def loss_that_shifts_labels(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = shifted_loss(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    return trained(subclass(kind, compute_loss=compute_loss), folder, gradient_accumulation_steps=2)


@behaviour()
def loss_times_ten(kind: Any, folder: str) -> Any:
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 10 * kind.compute_loss(self, *args, **kwargs)

    return trained(subclass(kind, compute_loss=compute_loss), folder)


@behaviour("Own.compute_loss gives")
def loss_that_is_a_mean(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    return trained(subclass(kind, compute_loss=compute_loss), folder)


@behaviour("does not hand all its inputs to the model")
def loss_that_drops_inputs(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = shifted_loss(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    return trained(subclass(kind, compute_loss=compute_loss), folder)


@behaviour()
def loss_of_weighted_tokens(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        labels, weights = inputs.pop("labels"), inputs.pop("weights", None)
        outputs = model(**inputs)
        kept = {"ignore_index": -100, "reduction": "none"}
        each = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **kept)
        loss = (each * (1.0 if weights is None else weights[:, 1:].flatten())).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def weighted(examples: list[Any]) -> Any:
        batch = pad(examples)
        return {**batch, "weights": (batch["input_ids"] % 5).float()}

    return trained(subclass(kind, compute_loss=compute_loss), folder, data_collator=weighted)


@behaviour()
def loss_function(kind: Any, folder: str) -> Any:
    return trained(kind, folder, compute_loss_func=shifted_loss, gradient_accumulation_steps=2)


@behaviour("compute_loss_func gives")
def loss_function_that_is_a_mean(kind: Any, folder: str) -> Any:
    def mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return shifted_loss(outputs, labels, (labels[:, 1:] != -100).sum())

    return trained(kind, folder, compute_loss_func=mean)


@behaviour()
def inputs_that_are_changed(kind: Any, folder: str) -> Any:
    def prepare(self: Any, inputs: Any) -> Any:
        inputs = kind._prepare_inputs(self, inputs)
        inputs["labels"] = inputs["labels"].where(inputs["labels"] % 2 == 0, -100)
        return inputs

    return trained(subclass(kind, _prepare_inputs=prepare), folder)


@behaviour()
def training_step_that_is_watched(kind: Any, folder: str) -> Any:
    seen = []

    def training_step(self: Any, model: Any, inputs: Any, *others: Any) -> Any:
        seen.append(int((inputs["labels"] != -100).sum()))
        return kind.training_step(self, model, inputs, *others)

    found = trained(subclass(kind, training_step=training_step), folder)
    return found, sum(seen)


@behaviour("does not call super")
def own_training_step(kind: Any, folder: str) -> Any:
    def training_step(self: Any, model: Any, inputs: Any, *others: Any) -> Any:
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()

    return trained(subclass(kind, **{"training_step": training_step}), folder)


@behaviour()
def targets_in_few_batches(kind: Any, folder: str) -> Any:
    data = rows(24, length=8)
    for row in data[4:8]:
        row["labels"] = [-100] * 8
    return make(kind, folder, eval_dataset=data).evaluate()["eval_loss"]


@behaviour("no target token")
def no_target_at_all(kind: Any, folder: str) -> Any:
    return trained(kind, folder, [{**row, "labels": [-100] * len(row["labels"])} for row in rows()])


# ---------------------------------------------------------------------------------------------------------------- rows


@behaviour()
def positions_with_gaps(kind: Any, folder: str) -> Any:
    data = [{**row, "position_ids": [3 * n for n in range(len(row["input_ids"]))]} for row in rows()]

    def with_positions(examples: list[Any]) -> Any:
        most = max(len(e["input_ids"]) for e in examples)
        positions = [e["position_ids"] + [0] * (most - len(e["position_ids"])) for e in examples]
        return {**pad(examples), "position_ids": torch.tensor(positions)}

    return trained(kind, folder, data, data_collator=with_positions)


@behaviour("its position_ids skip some")
def positions_with_gaps_and_no_mask(kind: Any, folder: str) -> Any:
    data = [{**row, "position_ids": [n + 60 * (n > 3) for n in range(len(row["input_ids"]))]} for row in rows()]
    return trained(kind, folder, data, data_collator=None)


@behaviour("holes in its attention_mask")
def masks_with_holes(kind: Any, folder: str) -> Any:
    data = [{**row, "attention_mask": [1, 0, *[1] * (len(row["input_ids"]) - 2)]} for row in rows(24, length=9)]
    return trained(kind, folder, data, data_collator=None)


@behaviour("numbers its documents")
def masks_that_number_documents(kind: Any, folder: str) -> Any:
    data = [{**row, "attention_mask": [1, 1, 1, *[2] * (len(row["input_ids"]) - 3)]} for row in rows(24, length=9)]
    return trained(kind, folder, data, data_collator=None)


@behaviour("has no labels")
def rows_without_labels(kind: Any, folder: str) -> Any:
    return trained(kind, folder, [{"input_ids": row["input_ids"]} for row in rows()])


# ---------------------------------------------------------------------------------------------------------- evaluation


@behaviour()
def evaluation_of_one_batch(kind: Any, folder: str) -> Any:
    return make(kind, folder, eval_dataset=rows(9), per_device_eval_batch_size=9).evaluate()["eval_loss"]


@behaviour()
def evaluation_that_drops_the_last(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=rows(10, length=8), dataloader_drop_last=True)
    return trainer.predict(rows(10, length=8)).predictions.shape, trainer.evaluate()["eval_loss"]


@behaviour()
def evaluation_without_labels(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder)
    found = trainer.predict([{"input_ids": row["input_ids"]} for row in rows(6, length=8)])
    return found.predictions.shape, found.label_ids is None, "test_loss" in found.metrics


@behaviour()
def predictions(kind: Any, folder: str) -> Any:
    found = make(kind, folder, per_device_eval_batch_size=6).predict(rows(6))
    tokens = found.label_ids != -100  # what stands in the place of others is padding, of one kind or another
    return found.predictions.shape, float(found.predictions[tokens].sum()), found.label_ids.tolist()


@behaviour()
def hidden_states(kind: Any, folder: str) -> Any:
    found = make(kind, folder, model=tiny_model(output_hidden_states=True)).predict(rows(8, length=8))
    logits, states = found.predictions
    return logits.shape, [layer.shape for layer in states], [float(layer.sum()) for layer in states]


@behaviour()
def metrics_batch_by_batch(kind: Any, folder: str) -> Any:
    seen = []

    def compute(found: Any, compute_result: bool = False) -> dict[str, float]:
        seen.append((tuple(found.predictions.shape), tuple(found.label_ids.shape)))
        return {"batches": float(len(seen))} if compute_result else {}

    trainer = make(kind, folder, compute_metrics=compute, batch_eval_metrics=True)
    found = trainer.predict(rows(8, length=8))
    return seen, found.metrics["test_batches"], found.predictions.shape


@behaviour()
def own_prediction_step(kind: Any, folder: str) -> Any:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = kind.prediction_step(self, *args, **kwargs)
        return loss * 10, logits, labels

    return make(subclass(kind, prediction_step=step), folder, eval_dataset=rows(8, length=8)).evaluate()["eval_loss"]


@behaviour()
def best_model(kind: Any, folder: str) -> Any:
    trainer = make(
        kind,
        folder,
        eval_dataset=rows(8, length=8),
        eval_strategy="epoch",
        save_strategy="epoch",
        num_train_epochs=3,
        load_best_model_at_end=True,
    )
    trainer.train()
    return learned(trainer), trainer.state.best_metric, Path(trainer.state.best_model_checkpoint).name


# ------------------------------------------------------------------------------------------------------ after training


@behaviour()
def model_after_training(kind: Any, folder: str) -> Any:
    model = tiny_model(attention="eager")
    make(kind, folder, model=model).train()
    kept = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    attentions = model.eval()(torch.tensor([[5, 6, 7]]), output_attentions=True).attentions
    return model.config._attn_implementation, type(model.lm_head).__name__, kept, len(attentions)


@behaviour()
def model_before_training(kind: Any, folder: str) -> Any:
    model = tiny_model(attention="eager")
    make(kind, folder, model=model)
    return model.config._attn_implementation, type(model.lm_head).__name__, "_loss_function" in vars(model)


@behaviour()
def model_after_evaluation(kind: Any, folder: str) -> Any:
    model = tiny_model(attention="eager")
    make(kind, folder, model=model, eval_dataset=rows(6)).evaluate()
    return model.config._attn_implementation, type(model.lm_head).__name__, "_loss_function" in vars(model)


# ------------------------------------------------------------------------------------------------------------- streams


class Streamed(IterableDataset[Any]):
    """A stream of a few rows, the same each time."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Any:
        return iter(rows(self.num))


@behaviour()
def epochs_of_a_stream(kind: Any, folder: str) -> Any:
    changes: dict[str, Any] = {"eval_dataset": rows(6), "eval_strategy": "epoch", "max_steps": 8}
    trainer = make(kind, folder, Streamed(12), **changes)
    trainer.train()
    evaluated = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    return learned(trainer), evaluated, [log["epoch"] for log in trainer.state.log_history]


@behaviour()
def stream_that_does_not_fill_a_step(kind: Any, folder: str) -> Any:
    return trained(kind, folder, Streamed(22), max_steps=6, gradient_accumulation_steps=2)


@behaviour()
def evaluation_of_a_stream(kind: Any, folder: str) -> Any:
    return make(kind, folder, eval_dataset=Streamed(8), per_device_eval_batch_size=8).evaluate()["eval_loss"]


# --------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("one", behaviour.all, ids=lambda one: one.name)
def test_as_trainer_or_refused(one: Behaviour, tmp_path: Path) -> None:
    """The outcome is Trainer's, or a refusal that names what it is about."""
    check(one, tmp_path)


def test_the_readme_counts_them() -> None:
    """All tables together: how many behaviours there are, how many of them are equal, and how many are refused."""
    here = Path(__file__).parent
    lines = [line for file in here.glob("test_*conformance*.py") for line in file.read_text().splitlines()]
    tried = [line for line in lines if line.startswith(("@behaviour(", "@on_ranks", "@on_one"))]
    refused = [line for line in tried if line.startswith("@behaviour(") and line != "@behaviour()"]
    said = " ".join((here.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(tried)} behaviours of `Trainer`" in said
    assert f"{len(tried) - len(refused)} are equal, {len(refused)} are refused by name" in said


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Another learning rate is another outcome."""
    one = Behaviour(lambda kind, folder: trained(kind, folder, learning_rate=1e-3 if kind is Trainer else 2e-3), None)
    assert not same(outcome(one, Trainer, tmp_path / "stock"), outcome(one, Here, tmp_path / "ours"))
