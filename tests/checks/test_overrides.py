"""What a subclass brings of its own is found by the method resolution order, whatever its name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer

from hf_hetero import HeteroTrainer, HeteroTrainerMixin, UnsupportedModel
from hf_hetero.checks.overrides import EVALUATION, LOOPS, LOSS, calls, check, own


class Theirs(Trainer):
    """Somebody's trainer, with steps of its own."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return None


class Watching(HeteroTrainer):
    """Looks, and hands on."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        def handed_on() -> Any:
            return super(Watching, self).training_step(*args, **kwargs)

        return handed_on()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_nothing_is_its_own_in_known_trainers() -> None:
    """Neither transformers' methods nor this package's count."""
    assert own(HeteroTrainer, [*LOSS, *LOOPS, *EVALUATION, "training_step"]) == {}
    check(HeteroTrainer)


def test_methods_are_found_on_either_side_of_the_mixin() -> None:
    """Above it and below it, with the class that has them."""
    below = type("Below", (HeteroTrainerMixin, Theirs), {})
    assert own(below, ["training_step", "prediction_step"]) == {"training_step": "Theirs", "prediction_step": "Theirs"}
    assert own(Watching, LOSS) == {"compute_loss": "Watching"}


def test_methods_of_an_instance_are_found() -> None:
    """A method that was put on one trainer alone."""
    trainer: Any = object.__new__(HeteroTrainer)
    trainer.compute_loss = print
    assert own(trainer, LOSS) == {"compute_loss": "this HeteroTrainer"}


def test_a_step_of_its_own_is_refused() -> None:
    """One that calls Trainer's is not."""
    with pytest.raises(UnsupportedModel, match=r"Theirs.training_step does not call super"):
        check(type("Below", (HeteroTrainerMixin, Theirs), {}))
    check(Watching)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_its_own_are_refused(name: str) -> None:
    """Also where they call Trainer's: what they give is no planned step."""
    own_kind = type("Own", (HeteroTrainer,), {name: lambda self, *args: None})
    with pytest.raises(UnsupportedModel, match=f"Own.{name} is its own"):
        check(own_kind)


def test_calls_are_seen_in_inner_functions() -> None:
    """In a function inside, and not where there are none."""
    assert calls(Watching.training_step, "training_step")
    assert not calls(Theirs.training_step, "training_step")
    assert not calls(print, "training_step")
