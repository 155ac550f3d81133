"""How a run ends: flags of a single process stay its own; memory that ran out keeps its type and gets its remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerControl

from hf_hetero.errors import CollectiveFailed
from hf_hetero.trainer.stopping import FLAGS, OneDecision, ending_in_words, evaluating_in_words


def test_a_single_process_decides_alone() -> None:
    """Nothing is joined, nothing is changed."""
    control = TrainerControl(should_save=True)
    OneDecision(lambda: None).join(control)
    assert [getattr(control, name) for name in FLAGS] == [False, False, True, False, False]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to"),
        MemoryError("Unable to allocate 4 GiB for an array"),
    ],
)
def test_out_of_memory(error: Exception) -> None:
    """The step, the remedy, and what torch said; whoever catches torch's error still does."""
    said = str(error)
    with pytest.raises(type(error)) as caught, ending_in_words(lambda: 7):
        raise error
    assert caught.value is error
    for words in ("Step 7: ", "max_tokens_per_rank", "activation_policies", said):
        assert words in str(error), str(error)


def test_out_of_memory_in_the_optimizer() -> None:
    """Where its state finds no room, fewer tokens are no remedy, and are not said to be one."""

    class Full(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(torch.OutOfMemoryError) as caught, ending_in_words(lambda: 7):
        Full([torch.zeros(1, requires_grad=True)], lr=0.1).step()
    assert "Step 7: " in str(caught.value)
    assert "optimizer's step" in str(caught.value)
    assert "max_tokens_per_rank" not in str(caught.value)


def test_out_of_memory_in_an_evaluation() -> None:
    """It says what can be done, once, also where the evaluation is within a training."""
    with pytest.raises(torch.OutOfMemoryError) as caught, ending_in_words(lambda: 7), evaluating_in_words():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert str(caught.value).count("max_tokens_per_rank") == 1
    with pytest.raises(KeyError, match=r"^'x'$"), evaluating_in_words():
        raise KeyError("x")


@pytest.mark.parametrize("error", [ValueError("out of memory"), KeyError("x"), RuntimeError("shapes differ")])
def test_other_errors_are_left_alone(error: Any) -> None:
    """Their words stay as they are."""
    said = str(error)
    with pytest.raises(type(error)) as caught, ending_in_words(lambda: 7):
        raise error
    assert str(caught.value) == said


def test_a_wrapper_that_misses_a_rank_is_named() -> None:
    """What DDP or FSDP wait for has Trainer's time limit."""
    words = r"Training failed .* at step 7: .*raise TrainingArguments.ddp_timeout"
    with pytest.raises(CollectiveFailed, match=words), ending_in_words(lambda: 7):
        raise RuntimeError("[gloo/unbound_buffer.cc:81] Timed out waiting 4000ms for recv operation to complete")
