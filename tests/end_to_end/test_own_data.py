"""Datasets, collators, samplers and loaders of the user's own: training is what plain Trainer makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from helpers import LENGTHS, ScriptedTrainer, arguments, largest_difference, run_ranks, samples, tiny_model, trained
from torch.utils.data import Dataset
from transformers import Trainer

from hf_hetero import HeteroError, HeteroTrainer

pytestmark = pytest.mark.slow


def pad(examples: list[Any]) -> dict[str, torch.Tensor]:
    def filled(name: str, value: int) -> torch.Tensor:
        rows = [torch.as_tensor(example[name]) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples]
    padded = torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": padded}


def changed(change: Callable[[list[int]], list[int]]) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    def collate(examples: list[Any]) -> dict[str, torch.Tensor]:
        return pad([{name: change(list(values)) for name, values in example.items()} for example in examples])

    return collate


def strict(examples: list[Any]) -> dict[str, torch.Tensor]:
    assert all(set(example) == {"input_ids", "labels"} for example in examples)
    return pad(examples)


class Told(Dataset[Any]):
    """Rows differ in tokens and length from epoch to epoch."""

    def __init__(self) -> None:
        self.rows, self.epoch = samples(LENGTHS), 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: [*values, *values[: self.epoch]] for name, values in self.rows[row].items()}


class Sampled:
    """A Trainer with a sampler of its own: some rows, anew in each epoch, by torch's generator."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SubsetRandomSampler(range(3, 21))


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # rows, collator, arguments
    "a collator that appends": (samples(LENGTHS), changed(lambda ids: [*ids, 2]), {}),
    "a collator that truncates": (samples(LENGTHS), changed(lambda ids: ids[:16]), {}),
    "one that truncates a table": (datasets.Dataset.from_list(samples(LENGTHS)), changed(lambda ids: ids[:16]), {}),
    "keys of no use": ([{**row, "note": "a"} for row in samples(LENGTHS)], strict, {"remove_unused_columns": True}),
    "epochs": (Told(), pad, {"max_steps": 6}),
    "epochs in workers": (Told(), pad, {"max_steps": 6, "dataloader_num_workers": 2}),
    "torch's own order": (samples(LENGTHS), pad, {"accelerator_config": {"use_seedable_sampler": False}}),
    "a seed for data": (samples(LENGTHS), pad, {"data_seed": 5}),
    "the order of the rows": (samples(LENGTHS), pad, {"train_sampling_strategy": "sequential"}),
}


def transformed() -> Any:
    table = datasets.Dataset.from_dict({"text": [" ".join(map(str, row["input_ids"])) for row in samples(LENGTHS)]})

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        ids = [[int(word) for word in text.split()][:20] for text in batch["text"]]
        return {"input_ids": ids, "labels": ids}

    return table.with_transform(tokenise)


def train(kind: str, planned: bool) -> dict[str, Any]:
    data, collator, changes = KINDS.get(kind, (None, pad, {}))
    if kind == "a transform":
        data = transformed()
    base: Any = ScriptedTrainer if planned else Trainer
    if kind == "a sampler":
        data, base = samples(LENGTHS), type("Sampling", (Sampled, base), {})

    class Seeded(base):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            torch.manual_seed(23)  # what a user's script may have done by then
            return super().train(*args, **kwargs)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, data_collator=collator, **kwargs)

    return trained(tiny_model(), data, trainer_class=Seeded, **changes)


ALL = [*KINDS, "a transform", "a sampler"]


@pytest.mark.parametrize("kind", ALL)
def test_one_process(kind: str) -> None:
    """Gradients, step after step, are those of plain Trainer, which reads, orders and collates as the user wrote it."""
    expected, found = train(kind, planned=False), train(kind, planned=True)
    assert len(found["gradients"]) == len(expected["gradients"])
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) < 1e-4


def train_all(planned: bool) -> list[Any]:
    # of these, plain Trainer gives several ranks other rows than one, or tells them nothing of epochs
    return [train(kind, planned)["gradients"] for kind in ALL if "epoch" not in kind and kind != "a sampler"]


def test_two_ranks() -> None:
    """The same on two ranks that share samples."""
    [expected, _], [found, _] = run_ranks(train_all, 2, False), run_ranks(train_all, 2, True)
    for kind, ours, theirs in zip(ALL, found, expected, strict=False):
        for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert largest_difference(mine, other) < 1e-4, (kind, step)


def train_told() -> tuple[Any, int]:
    data = Told()
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    found = trained(tiny_model(), data, max_steps=6, data_seed=23, **workers)
    return found["weights"], data.epoch


def test_epochs_on_two_ranks() -> None:
    """Every rank's dataset is told of each epoch, in the workers that persist as well: weights are one process's."""
    expected = train("epochs", planned=False)["weights"]
    for weights, epoch in run_ranks(train_told, 2):
        assert epoch == 2
        assert largest_difference(weights, expected) < 1e-4


def test_a_stream_through_a_collator(tmp_path: Any) -> None:
    """Rows of a stream, too, have the tokens that the user's collator makes of them."""
    losses: list[list[float]] = []
    for data in (datasets.Dataset.from_list(samples(LENGTHS)).to_iterable_dataset(), samples(LENGTHS)):
        collator, changes = changed(lambda ids: [*ids, 2]), {"train_sampling_strategy": "sequential", "max_steps": 2}
        trainer = HeteroTrainer(
            tiny_model(), arguments(str(tmp_path), 1, **changes), train_dataset=data, data_collator=collator
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def train_by_uneven_samplers() -> None:
    class Uneven(HeteroTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SubsetRandomSampler(range(12 + self.args.process_index))

    trained(tiny_model(), samples(LENGTHS), trainer_class=Uneven)


def test_samplers_that_shard() -> None:
    """A sampler that gives a rank its own rows is refused on all of them, for ranks would take other steps."""
    for error in run_ranks(train_by_uneven_samplers, 2, expect_errors=True):
        assert isinstance(error, HeteroError)
        assert "SubsetRandomSampler draws 13 rows on rank 1, 12 on rank 0" in str(error)


def test_rows_drawn_anew(tmp_path: Any) -> None:
    """Rows of another length at each read are refused before the first step, and no length column is blamed."""

    class Anew(Told):
        def __getitem__(self, row: int) -> dict[str, Any]:
            ids = self.rows[row]["input_ids"][: 1 + random.randrange(len(self.rows[row]["input_ids"]))]
            return {"input_ids": ids, "labels": ids}

    trainer = HeteroTrainer(tiny_model(), arguments(str(tmp_path), 1), train_dataset=Anew())
    with pytest.raises(HeteroError, match=r"so its step cannot be planned. Let the dataset .*Anew") as error:
        trainer.train()
    assert "column" not in str(error.value)


def test_workers_start_as_asked(tmp_path: Any) -> None:
    """Options of the loader reach it, in training and in evaluation."""
    options = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False}
    options |= {"dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    args = arguments(str(tmp_path), 1, **options)
    trainer = HeteroTrainer(tiny_model(), args, train_dataset=samples(LENGTHS), eval_dataset=samples(LENGTHS))
    training, evaluation = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
    for loader in (training, evaluation):
        assert loader.multiprocessing_context.get_start_method() == "spawn"
        assert (loader.in_order, loader.prefetch_factor) == (False, 3)
    assert training.persistent_workers
    assert not dist.is_initialized()
    assert trainer.train().global_step == 4


def test_a_subclass_chooses_what_is_evaluated(tmp_path: Any) -> None:
    """`_get_eval_sampler` decides, as it does in Trainer."""

    def evaluate(base: Any) -> float:
        class Some(base):
            def _get_eval_sampler(self, dataset: Any) -> Any:
                return torch.utils.data.SubsetRandomSampler([6, 7, 8], generator=torch.Generator().manual_seed(0))

        args = arguments(str(tmp_path), 1, per_device_eval_batch_size=1)
        rows = [samples([12], seed=seed)[0] | {"labels": samples([12], seed=seed)[0]["input_ids"]} for seed in range(9)]
        return Some(tiny_model(), args, eval_dataset=rows, data_collator=pad).evaluate()["eval_loss"]

    assert evaluate(HeteroTrainer) == pytest.approx(evaluate(Trainer), rel=1e-5)
