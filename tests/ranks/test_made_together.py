"""A trainer is made on all ranks or on none, soon and with the reason; and all ranks train the same weights."""

from __future__ import annotations

import tempfile
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import LENGTHS, arguments, run_ranks, samples, tiny_model
from torch.nn.parallel import DistributedDataParallel

from hf_hetero import HeteroError, HeteroTrainer, UnsupportedModel
from hf_hetero.errors import CollectiveFailed
from hf_hetero.ranks.made_together import made_together

LIMIT_S = 100.0
"""What ranks that do not hear of each other would wait, and longer than any of these tests may."""


class Made:
    """What a trainer is to its ranks: something with a limit, whose constructor may fail on one of them."""

    @made_together
    def __init__(self, fails_on: int | None = None, is_met: bool = False, limit_s: float = LIMIT_S) -> None:
        self.args = SimpleNamespace(ddp_timeout=limit_s)
        if dist.get_rank() == fails_on:
            raise FileNotFoundError("/data/only-here.json")
        if is_met:
            dist.barrier()


class MadeBySubclass(Made):
    """One whose own part fails, after that of its base class."""

    @made_together
    def __init__(self, fails_on: int) -> None:
        super().__init__()
        if dist.get_rank() == fails_on:
            raise UnsupportedModel("a setting of pairs")


def make(kind: type[Made], *args: Any) -> None:
    kind(*args)


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    """The rank that fails has its own error, and the others hear of it, whatever its kind, and name the rank."""
    errors = run_ranks(make, 3, Made, 1, expect_errors=True, timeout_s=60)
    assert "FileNotFoundError('/data/only-here.json')" in str(errors[1])
    for error in (errors[0], errors[2]):
        assert type(error) is HeteroError
        words = "Rank 1 could not make its trainer, so none goes on: FileNotFoundError: /data/only-here.json"
        assert str(error) == words


def test_a_subclass_of_this_package_meets_once() -> None:
    """What a subclass refuses after its base class was made is heard, too, with the class of the error."""
    errors = run_ranks(make, 2, MadeBySubclass, 0, expect_errors=True, timeout_s=60)
    assert {type(error) for error in errors} == {UnsupportedModel}
    assert [str(error) for error in errors] == [
        "a setting of pairs",
        "Rank 0 could not make its trainer, so none goes on: a setting of pairs",
    ]


def test_ranks_that_wait_for_the_one_that_fails() -> None:
    """Who waits in a collective of somebody else's (TRL's, around its tokenizing) ends when the other does, named."""
    errors = run_ranks(make, 2, Made, 1, True, expect_errors=True, timeout_s=60)
    assert str(errors[0]).startswith("Rank 1 could not make its trainer"), errors[0]


def late() -> None:
    if dist.get_rank() == 1:
        with pytest.raises(CollectiveFailed):
            Made(limit_s=1.0)
    elif dist.get_rank() == 0:
        Made(limit_s=1.0)
    else:
        time.sleep(4.0)


def test_a_rank_that_makes_none_is_named() -> None:
    """Within the limit of the job, with the rank and the setting."""
    error, *_ = run_ranks(late, 3, expect_errors=True, timeout_s=60)
    assert isinstance(error, CollectiveFailed)
    assert "waited 1 s for ranks [2] to make theirs" in str(error)
    assert "ddp_timeout" in str(error)


def one_after_the_other() -> list[str]:
    said: list[str] = []
    for fails_on in (None, 1, None, 0, None):
        try:
            Made(fails_on)
            said.append("made")
        except (HeteroError, FileNotFoundError) as error:
            said.append(type(error).__name__)
    return said


def test_trainers_one_after_the_other() -> None:
    """What was said of one trainer is not said of the next."""
    found = run_ranks(one_after_the_other, 2, timeout_s=60)
    assert found[0] == ["made", "HeteroError", "made", "FileNotFoundError", "made"]
    assert found[1] == ["made", "FileNotFoundError", "made", "HeteroError", "made"]


def refused_on_rank_1() -> None:
    smoothing = 0.1 if dist.get_rank() == 1 else 0.0
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, 2, label_smoothing_factor=smoothing)
        HeteroTrainer(model=tiny_model(), args=args, train_dataset=samples(LENGTHS))


def test_a_trainer_that_is_refused_on_one_rank() -> None:
    """As a user meets it: one refusal, in the same words, on all ranks."""
    errors = run_ranks(refused_on_rank_1, 2, expect_errors=True, timeout_s=60)
    assert {type(error) for error in errors} == {UnsupportedModel}
    assert str(errors[0]).startswith("Rank 1 could not make its trainer, so none goes on: These training arguments")
    assert all("label_smoothing_factor=0.1" in str(error) for error in errors)


def freeze(model: Any, how: str) -> Any:
    """The same number of weights of the same shapes on all ranks, but for "fewer" and "other"."""
    rank = dist.get_rank()
    mlp = model.model.layers[0].mlp
    first, second = mlp.gate_proj.weight, mlp.up_proj.weight  # of one shape, and neighbours
    if how == "alike":
        first.requires_grad_(False)
    elif how == "neighbours":
        (second if rank == 1 else first).requires_grad_(False)
    elif how == "fewer" and rank == 1:
        first.requires_grad_(False)
    elif how == "other" and rank == 1:
        model.model.layers[1].mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    return model


def train_frozen(how: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, 2, max_steps=1)
        HeteroTrainer(model=freeze(tiny_model(), how), args=args, train_dataset=samples(LENGTHS)).train()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("neighbours", "model.layers.0.mlp.gate_proj.weight is 48x32 of float32, requires_grad=True there and 48x32 "),
        ("fewer", "model.layers.0.mlp.gate_proj.weight is 48x32 of float32, requires_grad=False there and 48x32 "),
        ("other", "model.layers.1.mlp.scale is 3 of float32, requires_grad=True there and missing on rank 0"),
    ],
)
def test_ranks_that_train_other_weights(how: str, words: str) -> None:
    """Refused on all ranks before the first step, with the weight that differs first and the remedy."""
    for error in run_ranks(train_frozen, 2, how, expect_errors=True, timeout_s=100):
        assert type(error) is HeteroError
        assert str(error).startswith(f"Rank 1 has other weights to train than rank 0: {words}"), error
        assert "requires_grad of each" in str(error)


def test_ranks_that_freeze_the_same() -> None:
    """They train: what is refused is a difference, not a frozen layer."""
    assert run_ranks(train_frozen, 2, "alike", timeout_s=100) == [None, None]


def silently_mixed() -> bool:
    model = DistributedDataParallel(freeze(tiny_model(), "neighbours"))
    model(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
    mlp = model.module.model.layers[0].mlp
    mixed = mlp.up_proj.weight.grad if dist.get_rank() == 0 else mlp.gate_proj.weight.grad
    sums: list[Any] = [None, None]
    dist.all_gather_object(sums, mixed)
    return torch.equal(*sums)


def test_torch_itself_mixes_them() -> None:
    """The control: DDP adds up the gradients of two weights as if they were one's, and says nothing."""
    assert run_ranks(silently_mixed, 2, timeout_s=60) == [True, True]
