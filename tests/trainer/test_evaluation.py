"""Evaluation under plans finds what one process finds: the loss by tokens, and each token's outputs in their place."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import (
    IGNORE,
    LENGTHS,
    ScriptedPlanner,
    ScriptedTrainer,
    arguments,
    reference_steps,
    run_ranks,
    samples,
    scripted,
    shard_on_cpu,
    tiny_model,
    trainer_order,
)
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer
from hf_hetero.errors import CollectiveFailed
from hf_hetero.trainer.evaluation.predictions import Piece, assemble, pad_rows

DATA = samples(LENGTHS, seed=3)


class ScriptedEvaluation(ScriptedTrainer):
    """Evaluation by plans of mixed degrees and methods, with empty groups."""

    def _planners(self) -> Any:
        return SimpleNamespace(for_evaluation=lambda: scripted(ScriptedPlanner(self.args.world_size)))


def reference(model: Any = None) -> tuple[float, list[np.ndarray]]:
    """Each sample alone: the loss of all targets, and the logits of each sample."""
    model = (model or tiny_model(dtype=torch.float64)).eval()
    loss, count, logits = 0.0, 0, []
    with torch.no_grad():
        for sample in DATA:
            ids, labels = (torch.tensor(sample[key]) for key in ("input_ids", "labels"))
            found = model(input_ids=ids[None], use_cache=False).logits[0]
            loss += float(F.cross_entropy(found[:-1], labels[1:], ignore_index=IGNORE, reduction="sum"))
            count += int((labels[1:] != IGNORE).sum())
            logits.append(found.numpy())
    return loss / count, logits


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def trainer_of(folder: str, trainer_class: Any = ScriptedEvaluation, hetero: Any = None, **options: Any) -> Any:
    names = ("compute_metrics", "preprocess_logits_for_metrics", "callbacks", "eval_dataset", "data_collator")
    hooks = {name: options.pop(name) for name in names if name in options}
    args = arguments(folder, world_size(), per_device_eval_batch_size=options.pop("eval_batch", 3), **options)
    model = tiny_model(dtype=torch.float64)
    data = {"eval_dataset": DATA, **hooks}
    return trainer_class(model, args, train_dataset=samples(LENGTHS), hetero=hetero, **data)


def evaluate(options: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return trainer_of(folder, **options).evaluate()


def predict(options: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        found = trainer_of(folder, **options).predict(DATA)
    return found.predictions, found.label_ids, found.metrics


def no_metrics(_: Any) -> dict[str, float]:
    return {}


def fails_on_rank_1(logits: Any, labels: Any) -> Any:
    if world_size() > 1 and torch.distributed.get_rank() == 1:
        raise ValueError("no such metric")
    return logits


@pytest.mark.parametrize("act", [evaluate, predict])
def test_a_rank_that_ends_in_an_evaluation(act: Any) -> None:
    """Outside of training, too, it leaves word of why, which the others say."""
    options = {"preprocess_logits_for_metrics": fails_on_rank_1, "compute_metrics": no_metrics}
    error = run_ranks(act, 2, options, expect_errors=True)[0]
    assert isinstance(error, CollectiveFailed)
    assert "Rank 1 had ended with ValueError: no such metric" in str(error)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_is_that_of_one_process(num_ranks: int) -> None:
    """The loss is weighted by tokens, whatever the plans, and the same on all ranks."""
    found = run_ranks(evaluate, num_ranks, {}) if num_ranks > 1 else [evaluate({})]
    for rank in found:
        assert rank["eval_loss"] == pytest.approx(reference()[0], rel=1e-12)


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_outputs_in_the_datasets_order(num_ranks: int) -> None:
    """Logits and labels of every token, in the rows of the dataset, filled up with -100."""
    found = run_ranks(predict, num_ranks, {}) if num_ranks > 1 else [predict({})]
    _, expected = reference()
    for predictions, labels, metrics in found:
        assert predictions.shape == (len(DATA), max(LENGTHS), 97)
        for row, sample in enumerate(DATA):
            length = len(sample["input_ids"])
            np.testing.assert_allclose(predictions[row, :length], expected[row], atol=1e-12)
            assert labels[row, :length].tolist() == sample["labels"]
            assert (predictions[row, length:] == -100).all()
            assert (labels[row, length:] == -100).all()
        assert metrics["test_loss"] == pytest.approx(reference()[0], rel=1e-12)


def accuracy(prediction: Any) -> dict[str, Any]:
    ids, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    real = labels != IGNORE
    extra = {"inputs": int((prediction.inputs != -100).sum())} if prediction.inputs is not None else {}
    return {"hits": int((ids == labels)[real].sum()), "of": int(real.sum()), **extra}


def best_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    assert logits.shape[:2] == labels.shape
    return logits.argmax(-1)


def test_metrics_of_tokens() -> None:
    """compute_metrics sees one output per token, made where the token lies, and the inputs if it wants them."""
    hooks = {
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": best_token,
        "include_for_metrics": ["inputs"],
    }
    found = run_ranks(evaluate, 4, hooks)
    _, logits = reference()
    labels = [np.array(sample["labels"]) for sample in DATA]
    hits = sum(
        int(((x[:-1].argmax(-1) == y[1:]) & (y[1:] != IGNORE)).sum()) for x, y in zip(logits, labels, strict=True)
    )
    for rank in found:
        assert rank["eval_hits"] == hits
        assert rank["eval_of"] == sum(int((y[1:] != IGNORE).sum()) for y in labels)
        assert rank["eval_inputs"] == sum(LENGTHS)


class RunningAccuracy:
    """compute_metrics that is called batch by batch."""

    def __init__(self) -> None:
        self.hits = self.of = 0

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, int]:
        found = accuracy(prediction)
        self.hits, self.of = self.hits + found["hits"], self.of + found["of"]
        return {"hits": self.hits, "of": self.of} if compute_result else {}


def test_metrics_batch_by_batch() -> None:
    """With batch_eval_metrics outputs are not kept, and the last batch gives the result."""
    hooks = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best_token}
    whole = evaluate(hooks)
    hooks |= {"compute_metrics": RunningAccuracy(), "batch_eval_metrics": True}
    running = evaluate(hooks)
    assert (running["eval_hits"], running["eval_of"]) == (whole["eval_hits"], whole["eval_of"])


def test_batches_are_not_joined_on_request() -> None:
    """With eval_do_concat_batches=False there is an array a batch."""
    predictions, labels, _ = predict({"eval_do_concat_batches": False, "eval_batch": 10})
    assert [len(batch) for batch in predictions] == [len(batch) for batch in labels] == [10, 10, 4]


def shifted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].argmax(-1)


def refused_shift(_: None) -> str:
    with pytest.raises(HeteroError) as caught:
        evaluate({"compute_metrics": accuracy, "preprocess_logits_for_metrics": shifted})
    return str(caught.value)


def test_a_preprocessing_that_shifts_is_refused() -> None:
    """What does not keep one output per token cannot be put back into samples, and is told so with the remedy."""
    message = refused_shift(None)
    assert "one output per token" in message
    assert "plan_evaluation=False" in message


def too_long(room: int) -> Any:
    return evaluate({"trainer_class": HeteroTrainer, "hetero": HeteroConfig(max_tokens_per_rank=room)})


def test_samples_too_long_for_a_rank() -> None:
    """The planner's own plans: 64 tokens where a rank holds 24."""
    for rank in run_ranks(too_long, 4, 24):
        assert rank["eval_loss"] == pytest.approx(reference()[0], rel=1e-12)


class EvaluatesWithin(TrainerCallback):
    """Keeps the losses of evaluations during training."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.losses.append(metrics["eval_loss"])


def train_with_evaluation(sharded: bool) -> Any:
    extra: dict[str, Any] = {}
    if sharded:
        shard_on_cpu()
        extra = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    kept = EvaluatesWithin()
    with tempfile.TemporaryDirectory() as folder:
        options = {"eval_strategy": "steps", "eval_steps": 2, "activation_checkpointing": True, **extra}
        trainer = trainer_of(folder, callbacks=[kept], **options)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return kept.losses, losses, type(trainer.model_wrapped).__name__


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_evaluation_during_training(sharded: bool) -> None:
    """Evaluating between steps changes none of them, and sees the weights of its moment."""
    found = run_ranks(train_with_evaluation, 4, sharded)
    steps, model = trainer_order(len(LENGTHS), 12, 7, 4), tiny_model(dtype=torch.float64)
    first = reference_steps(model, samples(LENGTHS), steps[:2])
    after_two = reference(model)[0]
    second = reference_steps(model, samples(LENGTHS), steps[2:])
    after_four = reference(model)[0]
    for evaluated, losses, wrapper in found:
        assert wrapper.startswith("FSDP") == sharded
        assert losses == pytest.approx(first["losses"] + second["losses"], rel=1e-6)
        assert evaluated == pytest.approx([after_two, after_four], rel=1e-10)
    assert after_two != pytest.approx(after_four, rel=1e-7)


def test_what_cannot_be_planned_is_stock(tmp_path: Path) -> None:
    """Switched off, evaluation is transformers' own."""
    one_batch = {"eval_batch": len(DATA)}
    stock = trainer_of(str(tmp_path), hetero=HeteroConfig(plan_evaluation=False), **one_batch).evaluate()
    assert stock["eval_loss"] == pytest.approx(reference()[0], rel=1e-6)


def packs() -> list[dict[str, Any]]:
    """The samples, three documents a row."""
    found = []
    for first in range(0, len(DATA), 3):
        documents = DATA[first : first + 3]
        row = {name: [x for one in documents for x in one[name]] for name in ("input_ids", "labels")}
        found.append({**row, "seq_lengths": [len(one["input_ids"]) for one in documents]})
    return found


class Lazy(IterableDataset[Any]):
    """Rows that can be read as often as one likes, or once."""

    def __init__(self, rows: list[Any], once: bool = False) -> None:
        self.rows: Any = iter(rows) if once else rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def streams(kind: str) -> Any:
    table = datasets.Dataset.from_list(DATA)
    return {
        "table": table.to_iterable_dataset(num_shards=2),
        "mapped": table.to_iterable_dataset().map(lambda row: row),  # columns are not known before it is read
        "torch": Lazy(DATA),
        "once": Lazy(DATA, once=True) if not torch.distributed.is_initialized() else Lazy(DATA),
        "packed": datasets.Dataset.from_list(packs()).to_iterable_dataset(),
    }[kind]


def evaluate_stream(kind: str, options: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, eval_dataset=streams(kind), remove_unused_columns=True, **options)
        found = trainer.predict(streams(kind))
        return found.predictions, found.label_ids, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("kind", "num_ranks", "options"),
    [
        ("table", 2, {}),
        ("mapped", 1, {"dataloader_num_workers": 2}),
        ("torch", 1, {"batch_eval_metrics": True}),
        ("once", 1, {}),
        ("packed", 1, {}),
        ("packed", 2, {}),
    ],
)
def test_streams_are_planned(kind: str, num_ranks: int, options: dict[str, Any]) -> None:
    """A stream is evaluated as a table of the same rows: each token once, in order, documents of a row apart."""
    found = run_ranks(evaluate_stream, num_ranks, kind, options) if num_ranks > 1 else [evaluate_stream(kind, options)]
    loss, logits = reference()
    rows = [logits[n : n + 3] for n in range(0, len(DATA), 3)] if kind == "packed" else [[one] for one in logits]
    for predictions, labels, found_loss in found:
        assert found_loss == pytest.approx(loss, rel=1e-12)
        if "batch_eval_metrics" in options:
            continue
        assert len(predictions) == len(labels) == len(rows)
        for predicted, documents in zip(predictions, rows, strict=True):
            expected = np.concatenate(documents)
            np.testing.assert_allclose(predicted[: len(expected)], expected, atol=1e-12)


def test_streams_batch_by_batch() -> None:
    """The last batch of a stream is told as such."""
    hooks = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best_token}
    whole = evaluate(hooks)
    hooks |= {"compute_metrics": RunningAccuracy(), "batch_eval_metrics": True}
    running = evaluate({**hooks, "eval_dataset": Lazy(DATA)})
    assert (running["eval_hits"], running["eval_of"]) == (whole["eval_hits"], whole["eval_of"])


@pytest.mark.parametrize("kind", ["rows", "table", "stream", "mapped", "torch"])
@pytest.mark.parametrize("why", ["unplanned", "generates"])
def test_packed_rows_need_plans(tmp_path: Path, kind: str, why: str) -> None:
    """Without plans their documents would see each other, so they are refused; Trainer would drop the column first."""
    table = datasets.Dataset.from_list(packs())
    data = {
        "rows": packs(),
        "table": table,
        "stream": table.to_iterable_dataset(),
        "mapped": table.to_iterable_dataset().map(lambda row: row),
        "torch": Lazy(packs()),
    }[kind]
    hetero = HeteroConfig(plan_evaluation=why != "unplanned")
    trainer = trainer_of(str(tmp_path), remove_unused_columns=True, hetero=hetero)
    trainer.args.predict_with_generate = why == "generates"
    for act in (trainer.evaluate, trainer.predict):
        with pytest.raises(HeteroError, match="packed"):
            act(data)


@pytest.mark.parametrize("streamed", [False, True])
def test_truncated_packed_rows(streamed: bool) -> None:
    """Documents cut at 16 tokens: a row's outputs are those of what was kept of each, one after the other."""
    hetero = HeteroConfig(max_sample_tokens=16, longer_samples="truncate")
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(folder, hetero=hetero)
        found = trainer.predict(Lazy(packs()) if streamed else packs())
    model = tiny_model(dtype=torch.float64).eval()
    for row, first in enumerate(range(0, len(DATA), 3)):
        kept = [{name: values[:16] for name, values in one.items()} for one in DATA[first : first + 3]]
        with torch.no_grad():
            logits = [model(torch.tensor([one["input_ids"]]), use_cache=False).logits[0].numpy() for one in kept]
        expected = np.concatenate(logits)
        np.testing.assert_allclose(found.predictions[row, : len(expected)], expected, atol=1e-12)
        assert (found.predictions[row, len(expected) :] == -100).all()
        assert found.label_ids[row, : len(expected)].tolist() == [x for one in kept for x in one["labels"]]


def test_what_gives_no_tokens_is_stock(tmp_path: Path) -> None:
    """A stream whose rows only the collator makes tokens of is transformers' own to evaluate."""
    rows = [{"text": " ".join(map(str, row["input_ids"]))} for row in DATA]

    def collate(examples: Any) -> Any:
        [ids] = [[int(word) for word in example["text"].split()] for example in examples]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}

    trainer = trainer_of(str(tmp_path), eval_batch=1, data_collator=collate)
    for stream in (Lazy(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        assert type(trainer.get_eval_dataloader(stream)).__name__ != "EvaluationLoader"
        assert 0 < trainer.evaluate(stream)["eval_loss"] < 100


def test_several_datasets(tmp_path: Path) -> None:
    """A dictionary of datasets is evaluated one by one, each under its name."""
    found = trainer_of(str(tmp_path), eval_dataset={"all": DATA, "some": DATA[:5]}).evaluate()
    assert found["eval_all_loss"] == pytest.approx(reference()[0], rel=1e-12)
    assert found["eval_some_loss"] != found["eval_all_loss"]


class Rows(torch.utils.data.Dataset[Any]):
    """DATA, and how many of its rows were read."""

    def __init__(self) -> None:
        self.num_read = 0

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, row: int) -> Any:
        self.num_read += 1
        return DATA[row]


def test_an_evaluation_again_counts_nothing(tmp_path: Path) -> None:
    """The same dataset, in any of its roles, is counted once by a trainer; the numbers stay the same."""
    rows, read = Rows(), list[int]()
    trainer = trainer_of(str(tmp_path), eval_dataset=rows)
    for act in (trainer.evaluate, trainer.evaluate, lambda: trainer.predict(rows).metrics):
        before = rows.num_read
        assert next(value for name, value in act().items() if name.endswith("loss")) == pytest.approx(reference()[0])
        read.append(rows.num_read - before)
    assert read[1] < read[0]
    assert read[2] == read[1]


def test_nothing_is_kept_for_a_backward_pass_that_does_not_come(tmp_path: Path) -> None:
    """Where layers are recomputed, attention keeps what it exchanged in training, and not in an evaluation."""
    trainer = trainer_of(str(tmp_path), activation_checkpointing=True, max_steps=1)
    keeps: dict[bool, set[bool]] = {True: set(), False: set()}

    def note(model: Any, args: Any, inputs: dict[str, Any]) -> None:
        keeps[model.training].add(inputs["hetero"].keeps)

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    assert keeps == {True: {True}, False: {False}}


def test_lost_and_doubled_tokens_are_noticed() -> None:
    """Outputs that do not cover each token of a sample once are an error, not an array with holes."""
    piece = Piece(7, 0, 4, {"labels": np.arange(4)})
    assert assemble([piece], {7: 4})["labels"][0].tolist() == [0, 1, 2, 3]
    for pieces in ([piece], [piece, piece], [Piece(7, 1, 4, piece.values)]):
        with pytest.raises(HeteroError, match="Row 7 of 6 tokens"):
            assemble(pieces, {7: 6})


def test_rows_of_several_outputs() -> None:
    """A tuple of outputs is padded leaf by leaf."""
    rows = [(np.ones((2, 3)), np.ones(2)), (np.ones((1, 3)), np.ones(1))]
    first, second = pad_rows(rows)
    assert first.shape == (2, 2, 3)
    assert second.tolist() == [[1, 1], [1, -100]]


def test_rows_without_labels_are_evaluated_as_they_are_learned(tmp_path: Path) -> None:
    """All tokens of such rows are learned, so their loss is that of all tokens; a prediction has none, as in stock."""
    unlabelled = [{"input_ids": row["input_ids"]} for row in DATA]
    labelled = [{**row, "labels": row["input_ids"]} for row in unlabelled]
    losses: list[float] = []
    for rows in (unlabelled, labelled, DATA):
        trainer = HeteroTrainer(tiny_model(), arguments(str(tmp_path), 1), train_dataset=rows, eval_dataset=rows)
        losses.append(trainer.evaluate()["eval_loss"])
        metrics = trainer.predict(rows).metrics or {}
        assert ("test_loss" in metrics) == (rows is not unlabelled)
    assert losses[0] == losses[1] != losses[2]
