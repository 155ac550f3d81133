"""Behaviour by behaviour, part three: datasets, streams, collators, evaluation and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from behaviours import check, make, pad, rows, trained
from conformance import Behaviour, Table, learned, subclass
from helpers import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

pytestmark = pytest.mark.slow

behaviour = Table()

EVEN = rows(8, length=8)
"""Of one length, so that a mean of batches is a mean of tokens."""


def tokenizer(**changes: Any) -> Any:
    words = {str(number): number for number in range(97)}
    made = Tokenizer(WordLevel(words, unk_token="1"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2", unk_token="1", **changes)


def unlabelled(num: int = 24) -> list[Any]:
    return [{"input_ids": row["input_ids"]} for row in rows(num)]


def table(num: int = 24, **kwargs: Any) -> Any:
    return datasets.Dataset.from_list(rows(num, **kwargs))


# ------------------------------------------------------------------------------------------------------- collators


@behaviour()
def collator_of_language_modeling(kind: Any, folder: str) -> Any:
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    return trained(kind, folder, unlabelled(), data_collator=collator, gradient_accumulation_steps=2)


@behaviour()
def collator_of_sequences(kind: Any, folder: str) -> Any:
    collator = DataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=8)
    return trained(kind, folder, table(), data_collator=collator)


@behaviour()
def tokenizer_without_a_collator(kind: Any, folder: str) -> Any:
    data = rows(24, length=8)
    trainer = make(kind, folder, data, data_collator=None, processing_class=tokenizer(), save_strategy="epoch")
    trainer.train()
    return learned(trainer), sorted(path.name for path in Path(folder, "checkpoint-6").glob("token*"))


@behaviour()
def collator_that_pads(kind: Any, folder: str) -> Any:
    collator = DataCollatorWithPadding(tokenizer())
    return trained(kind, folder, rows(24, length=8), data_collator=collator)


@behaviour()
def collator_that_flattens(kind: Any, folder: str) -> Any:
    return trained(kind, folder, data_collator=DataCollatorWithFlattening(return_position_ids=True))


@behaviour("pads on the left")
def tokenizer_that_pads_on_the_left(kind: Any, folder: str) -> Any:
    collator = DataCollatorForLanguageModeling(tokenizer(padding_side="left"), mlm=False)
    return trained(kind, folder, unlabelled(), data_collator=collator)


@behaviour()
def masked_words(kind: Any, folder: str) -> Any:
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows()]
    return trained(kind, folder, masked)


@behaviour()
def prompts_not_learnt(kind: Any, folder: str) -> Any:
    data = [{**row, "labels": [-100] * 3 + row["labels"][3:]} for row in rows()]
    return trained(kind, folder, data, gradient_accumulation_steps=3, num_train_epochs=2)


@behaviour()
def end_that_is_the_padding(kind: Any, folder: str) -> Any:
    data = [{"input_ids": [*row["input_ids"], 0]} for row in rows()]
    return trained(kind, folder, data, data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False))


@behaviour("could not be tried: KeyError: 'weights'")
def weights_of_samples(kind: Any, folder: str) -> Any:
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = 1
    ) -> Any:
        weights = inputs.pop("weights")
        outputs = model(**inputs)
        return (outputs.loss * weights.mean(), outputs) if return_outputs else outputs.loss * weights.mean()

    def collate(examples: list[Any]) -> Any:
        return {**pad(examples), "weights": torch.tensor([float(e["input_ids"][0]) for e in examples])}

    return trained(subclass(kind, compute_loss=compute_loss), folder, data_collator=collate)


# ---------------------------------------------------------------------------------------------- rows with padding


def padded(row: Any, to: int, learns: bool, left: bool = False) -> Any:
    ids, more = row["input_ids"], to - len(row["input_ids"])
    filling, labels, mask = [0] * more, [0 if learns else -100] * more, [0] * more
    joined = (lambda a, b: b + a) if left else (lambda a, b: a + b)
    return {
        "input_ids": joined(ids, filling),
        "labels": joined(ids, labels),
        "attention_mask": joined([1] * len(ids), mask),
    }


@behaviour()
def padding_in_the_rows(kind: Any, folder: str) -> Any:
    data = [padded(row, 24, learns=False) for row in rows()]
    return trained(kind, folder, data, data_collator=None, eval_dataset=data[:8], eval_strategy="epoch")


@behaviour("Give padding the label -100")
def padding_that_is_learnt(kind: Any, folder: str) -> Any:
    return trained(kind, folder, [padded(row, 24, learns=True) for row in rows()], data_collator=None)


@behaviour()
def padding_on_the_left_of_the_rows(kind: Any, folder: str) -> Any:
    data = [padded(row, 24, learns=False, left=True) for row in rows()]
    data = [
        {**row, "labels": [-100 if n <= row["attention_mask"].index(1) else i for n, i in enumerate(row["labels"])]}
        for row in data
    ]
    return trained(kind, folder, data, data_collator=None)


@behaviour()
def padding_without_a_mask(kind: Any, folder: str) -> Any:
    data = [{k: v for k, v in padded(row, 24, learns=False).items() if k != "attention_mask"} for row in rows()]
    return trained(kind, folder, data, data_collator=None)


@behaviour()
def evaluation_of_rows_with_padding(kind: Any, folder: str) -> Any:
    data = [padded(row, 12, learns=False) for row in rows(8, length=9)]
    found = make(kind, folder, data_collator=None).predict(data)
    tokens = found.label_ids != -100
    return found.predictions[tokens].shape, found.label_ids[tokens].tolist(), found.metrics["test_loss"]


# -------------------------------------------------------------------------------------------------------- datasets


@behaviour()
def parts_of_datasets(kind: Any, folder: str) -> Any:
    data = ConcatDataset([Subset(rows(20), range(3, 15)), rows(5, seed=4)])  # type: ignore[arg-type]
    return trained(kind, folder, data)


@behaviour()
def table_of_tensors(kind: Any, folder: str) -> Any:
    return trained(kind, folder, table().with_format("torch"))


@behaviour()
def table_shuffled_and_selected(kind: Any, folder: str) -> Any:
    return trained(kind, folder, table().shuffle(seed=1).select(range(18)), train_sampling_strategy="sequential")


@behaviour()
def columns_kept(kind: Any, folder: str) -> Any:
    data = datasets.Dataset.from_list([{**row, "note": "x"} for row in rows()])
    return trained(kind, folder, data, remove_unused_columns=False)


@behaviour()
def fewer_rows_than_a_batch(kind: Any, folder: str) -> Any:
    return trained(kind, folder, rows(3), num_train_epochs=3), trained(kind, folder, rows(3), max_steps=2)


@behaviour()
def fewer_rows_than_a_step(kind: Any, folder: str) -> Any:
    return trained(kind, folder, rows(6), num_train_epochs=2, gradient_accumulation_steps=4)


@behaviour()
def stream_with_a_length(kind: Any, folder: str) -> Any:
    class Sized(IterableDataset[Any]):
        def __len__(self) -> int:
            return 22

        def __iter__(self) -> Any:
            return iter(rows(22))

    trainer = make(kind, folder, Sized(), num_train_epochs=2, gradient_accumulation_steps=2)
    trainer.train()
    return learned(trainer), [log["epoch"] for log in trainer.state.log_history]


@behaviour()
def stream_of_a_table(kind: Any, folder: str) -> Any:
    data = table(20).to_iterable_dataset(num_shards=2).shuffle(seed=4, buffer_size=8)
    return trained(kind, folder, data, max_steps=8)


@behaviour()
def stream_that_is_mapped(kind: Any, folder: str) -> Any:
    data = datasets.Dataset.from_list([{**row, "note": "x"} for row in rows(20)]).to_iterable_dataset()
    data = data.map(lambda row: {"labels": [-100, *row["labels"][1:]]}).filter(lambda row: len(row["input_ids"]) > 6)
    return trained(kind, folder, data, max_steps=4, gradient_accumulation_steps=2)


@behaviour()
def stream_resumed(kind: Any, folder: str) -> Any:
    data = table(20).to_iterable_dataset()
    make(kind, folder, data, max_steps=4, save_strategy="steps", save_steps=3).train()
    trainer = make(kind, folder, data, max_steps=8)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    return learned(trainer)


@behaviour()
def stream_without_labels_and_collator(kind: Any, folder: str) -> Any:
    data = datasets.Dataset.from_list(unlabelled()).to_iterable_dataset()
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    return trained(kind, folder, data, data_collator=collator, max_steps=5)


class Rows(torch.utils.data.Dataset[Any]):
    """Rows made by a function each time."""

    def __init__(self, make_row: Any, num: int = 16) -> None:
        self.make_row, self.num = make_row, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, row: int) -> Any:
        return self.make_row(rows(self.num, length=9)[row])


@behaviour()
def rows_of_tensors(kind: Any, folder: str) -> Any:
    data = Rows(lambda row: {name: torch.tensor(values) for name, values in row.items()})
    return trained(kind, folder, data, data_collator=None)


@behaviour()
def rows_of_arrays(kind: Any, folder: str) -> Any:
    data = Rows(lambda row: {name: np.asarray(values) for name, values in row.items()})
    return trained(kind, folder, data, data_collator=None)


@behaviour()
def rows_of_a_tokenizer(kind: Any, folder: str) -> Any:
    data = Rows(lambda row: BatchEncoding({**row, "attention_mask": [1] * len(row["input_ids"])}))
    return trained(kind, folder, data, data_collator=None)


@behaviour()
def lengths_in_a_column(kind: Any, folder: str) -> Any:
    data = datasets.Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows()])
    return trained(kind, folder, data)


@behaviour()
def table_split_and_joined(kind: Any, folder: str) -> Any:
    parts = table(30).train_test_split(0.4, seed=1)
    data = datasets.concatenate_datasets([parts["train"], parts["test"].select(range(4))])
    return trained(kind, folder, data, eval_dataset=parts["test"], eval_strategy="epoch")


@behaviour()
def streams_joined(kind: Any, folder: str) -> Any:
    streams = [table(12, seed=n).to_iterable_dataset() for n in range(2)]
    return trained(kind, folder, datasets.interleave_datasets(streams, seed=3, probabilities=[0.5, 0.5]), max_steps=6)


@behaviour()
def stream_taken_in_part(kind: Any, folder: str) -> Any:
    return trained(kind, folder, table(20).to_iterable_dataset().skip(2).take(14), max_steps=6)


@behaviour()
def stream_read_by_workers(kind: Any, folder: str) -> Any:
    return trained(kind, folder, table(20).to_iterable_dataset(), max_steps=4, dataloader_num_workers=1)


# ------------------------------------------------------------------------------------------------------ evaluation


def outputs(found: Any) -> Any:
    """Predictions as numbers to compare."""
    tokens = found.label_ids != -100  # what stands in the place of others is padding, of one kind or another
    return found.predictions.shape, float(np.abs(found.predictions[tokens]).sum()), found.label_ids.tolist()


@behaviour()
def several_datasets(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset={"a": EVEN, "b": rows(4, length=5)}, eval_strategy="epoch")
    trainer.train()
    losses = [sorted(key for key in log if key.endswith("loss")) for log in trainer.state.log_history]
    found = trainer.evaluate()
    named = trainer.evaluate(trainer.eval_dataset["b"], metric_key_prefix="mine")
    return losses, found["eval_a_loss"], found["eval_b_loss"], named["mine_loss"]


@behaviour()
def best_of_several_datasets(kind: Any, folder: str) -> Any:
    changes = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_a_loss"}
    data = {"a": EVEN, "b": rows(4, length=5)}
    trainer = make(kind, folder, eval_dataset=data, eval_strategy="epoch", num_train_epochs=2, **changes)
    trainer.train()
    return trainer.state.best_metric, learned(trainer)


@behaviour()
def evaluated_again_and_again(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    found = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    trainer.train()
    found += [trainer.evaluate()["eval_loss"], trainer.evaluate(rows(4, length=6))["eval_loss"]]
    trainer.train()
    return found, trainer.evaluate()["eval_loss"], learned(trainer)


@behaviour()
def keys_of_an_evaluation(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    found = trainer.evaluate(), trainer.predict(EVEN).metrics, trainer.predict(EVEN, metric_key_prefix="x").metrics
    trainer.train()
    return [sorted(metrics) for metrics in (*found, trainer.evaluate())]


@behaviour()
def metrics_with_inputs_and_losses(kind: Any, folder: str) -> Any:
    seen: list[Any] = []

    def compute(found: Any) -> dict[str, Any]:
        seen.append((found.inputs.tolist(), found.losses.shape, float(found.losses.mean())))
        return {"n": np.float32(3.5), "eval_m": 2}

    changes = {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1}
    trainer = make(kind, folder, eval_dataset=EVEN, compute_metrics=compute, **changes)
    found = trainer.evaluate()
    return seen, found["eval_n"], found["eval_m"], type(found["eval_n"]).__name__


@behaviour()
def logits_before_metrics(kind: Any, folder: str) -> Any:
    def best(logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def compute(found: Any) -> dict[str, float]:
        hits = found.predictions[:, :-1] == found.label_ids[:, 1:]
        return {
            "right": float(hits[found.label_ids[:, 1:] != -100].mean()),
            "kind": float(found.predictions.dtype.kind == "i"),
        }

    trainer = make(kind, folder, eval_dataset=rows(9), compute_metrics=compute, preprocess_logits_for_metrics=best)
    found = trainer.evaluate()
    return found["eval_right"], found["eval_kind"], outputs(trainer.predict(rows(9)))


@behaviour()
def batches_kept_apart(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_do_concat_batches=False)
    found = trainer.predict(rows(8, length=8))
    return [part.shape for part in found.predictions], [part.tolist() for part in found.label_ids]


@behaviour()
def outputs_ignored(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, model=tiny_model(output_hidden_states=True))
    return outputs(trainer.predict(EVEN, ignore_keys=["hidden_states", "past_key_values"]))


@behaviour()
def caches_among_outputs(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, model=tiny_model(output_hidden_states=True))
    found = trainer.predict(EVEN, ignore_keys=["logits", "past_key_values"])
    return [layer.shape for layer in found.predictions]


@behaviour()
def only_losses(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, prediction_loss_only=True)
    found = trainer.predict(EVEN)
    return found.predictions is None, found.label_ids is None, found.metrics["test_loss"]


@behaviour()
def evaluated_in_half_precision(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN, bf16_full_eval=True)
    loss = trainer.evaluate()["eval_loss"]
    return round(loss, 1), str(trainer.model.dtype), str(trainer.predict(EVEN).predictions.dtype)


@behaviour()
def half_precision_after_training(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN, bf16_full_eval=True, eval_strategy="epoch")
    trainer.train()
    inside = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    return inside, round(trainer.evaluate()["eval_loss"], 1), learned(trainer)[1]


@behaviour()
def evaluation_under_autocast(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN, bf16=True)
    found = trainer.predict(EVEN)
    return round(found.metrics["test_loss"], 1), str(found.predictions.dtype)


@behaviour()
def evaluation_with_workers(kind: Any, folder: str) -> Any:
    changes = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make(kind, folder, eval_dataset=EVEN, **changes)
    return trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]


@behaviour()
def evaluation_of_a_table(kind: Any, folder: str) -> Any:
    data = datasets.Dataset.from_list([{**row, "note": "x"} for row in EVEN])
    return make(kind, folder, eval_dataset=data).evaluate()["eval_loss"], outputs(make(kind, folder).predict(data))


@behaviour()
def evaluation_of_a_streamed_table(kind: Any, folder: str) -> Any:
    data = datasets.Dataset.from_list(EVEN).to_iterable_dataset()
    trainer = make(kind, folder, eval_dataset=data, eval_strategy="epoch")
    trainer.train()
    return trainer.evaluate()["eval_loss"], outputs(trainer.predict(data))


@behaviour()
def evaluation_with_own_labels(kind: Any, folder: str) -> Any:
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    data = [{"input_ids": row["input_ids"]} for row in EVEN]
    trainer = make(kind, folder, data, eval_dataset=data, data_collator=collator)
    return trainer.evaluate()["eval_loss"], outputs(trainer.predict(data))


@behaviour()
def evaluation_of_nothing(kind: Any, folder: str) -> Any:
    try:
        return make(kind, folder).evaluate()
    except ValueError as error:
        return "eval_dataset" in str(error)


@behaviour()
def evaluation_step_by_step(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    found = []
    for batch in trainer.get_eval_dataloader():
        loss, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
        found.append((float(loss), logits.shape, labels.tolist()))
    return found


@behaviour()
def loop_called_by_a_script(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN)
    loader = trainer.get_eval_dataloader()
    found = trainer.evaluation_loop(loader, "mine", prediction_loss_only=False, metric_key_prefix="m")
    other = torch.utils.data.DataLoader(rows(4, length=6), batch_size=4, collate_fn=pad)  # type: ignore[arg-type]
    more = trainer.evaluation_loop(other, "mine", prediction_loss_only=True)
    return found.predictions.shape, found.metrics["m_loss"], found.num_samples, more.metrics["eval_loss"]


@behaviour()
def evaluation_within_training_leaves_it_alone(kind: Any, folder: str) -> Any:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2}
    return trained(kind, folder, eval_dataset=EVEN, num_train_epochs=2, **changes)


@behaviour()
def evaluation_with_own_loss(kind: Any, folder: str) -> Any:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return (
            2 * torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        )

    trainer = make(kind, folder, eval_dataset=EVEN, compute_loss_func=loss)
    return trainer.evaluate()["eval_loss"], outputs(trainer.predict(EVEN))


@behaviour()
def evaluation_by_a_callback(kind: Any, folder: str) -> Any:
    found: list[float] = []

    class Evaluate(TrainerCallback):
        trainer: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                found.append(self.trainer.evaluate()["eval_loss"])

    callback = Evaluate()
    trainer = make(kind, folder, eval_dataset=EVEN, callbacks=[callback])
    callback.trainer = trainer
    trainer.train()
    return found, learned(trainer)


@behaviour()
def trainer_without_training_data(kind: Any, folder: str) -> Any:
    from behaviours import options

    trainer = kind(model=tiny_model(), args=options(folder), data_collator=pad, eval_dataset=EVEN)
    return trainer.evaluate()["eval_loss"], outputs(trainer.predict(EVEN))


@behaviour()
def metrics_of_batches_with_inputs(kind: Any, folder: str) -> Any:
    seen: list[Any] = []

    def compute(found: Any, compute_result: bool = False) -> dict[str, float]:
        seen.append((found.inputs["input_ids"].tolist(), found.losses.shape, found.predictions.shape))
        return {}

    changes = {"include_for_metrics": ["inputs", "loss"], "batch_eval_metrics": True}
    make(kind, folder, eval_dataset=EVEN, compute_metrics=compute, **changes).evaluate()
    return seen


@behaviour()
def evaluation_without_label_names(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, eval_dataset=EVEN, label_names=[])
    return sorted(k for k in trainer.evaluate() if k.endswith("loss")), trainer.predict(EVEN).label_ids is None


@behaviour()
def attentions_among_outputs(kind: Any, folder: str) -> Any:
    trainer = make(kind, folder, model=tiny_model(attention="eager", output_attentions=True), eval_dataset=EVEN)
    trainer.train()
    return learned(trainer), [part.shape for part in trainer.predict(EVEN).predictions[1]]


@behaviour("evaluate after training")
def attentions_while_training(kind: Any, folder: str) -> Any:
    model = tiny_model(attention="eager", output_attentions=True)
    changes = {"eval_strategy": "epoch", "compute_metrics": lambda found: {}}
    return trained(kind, folder, model=model, eval_dataset=EVEN, **changes)


# -------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("one", behaviour.all, ids=lambda one: one.name)
def test_as_trainer_or_refused(one: Behaviour, tmp_path: Path) -> None:
    """The outcome is Trainer's, or a refusal that names what it is about."""
    check(one, tmp_path)
