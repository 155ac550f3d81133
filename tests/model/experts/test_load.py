"""The load of experts is that of the step's tokens, whatever the plan, and it is logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LENGTHS, ScriptedTrainer, run_ranks, samples, tiny_model, trained, trainer_order
from transformers import TrainerCallback

from hf_hetero.callbacks import StepReportCallback
from hf_hetero.model.experts.load import ExpertLoad


def run(model: Any, load: ExpertLoad, ids: torch.Tensor) -> None:
    with load.micro_batch(ids.numel()):
        model(input_ids=ids)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_counts_are_the_routers(family: str) -> None:
    """Each token goes to two of four experts in each layer; counting starts anew when counts are taken."""
    model = tiny_model(family, "eager").train()
    load = ExpertLoad(model)
    assert load
    ids = torch.arange(3, 30)[None]
    for _ in range(2):
        run(model, load, ids)
    taken = torch.tensor(load.take()).view(2, 4)
    assert taken.sum(1).tolist() == [2 * 2 * 27] * 2
    run(model, load, ids)
    assert torch.equal(torch.tensor(load.take()).view(2, 4) * 2, taken)
    run(model.eval(), load, ids)
    assert sum(load.take()) == 0


def test_the_token_run_for_none_does_not_count() -> None:
    """A rank without samples in a micro-batch adds nothing, and counts again with the next."""
    model = tiny_model("qwen3-moe", "eager").train()
    load = ExpertLoad(model)
    for num_tokens in (0, 1):
        with load.micro_batch(num_tokens):
            model(input_ids=torch.tensor([[3]]))
    assert sum(load.take()) == 2 * 2  # two layers, two experts a token


def test_nothing_is_left_on_the_model() -> None:
    """Routers are watched during a micro-batch, even one that fails, and not after it."""
    model = tiny_model("qwen3-moe", "eager").train()
    load = ExpertLoad(model)
    with pytest.raises(IndexError):
        run(model, load, torch.tensor([[10**6]]))
    assert not any(module._forward_hooks for module in model.modules())
    model(input_ids=torch.tensor([[3]]))
    assert not sum(load.take())


def test_of_all_ranks() -> None:
    """Busiest by mean, over the sum of all ranks."""
    load = ExpertLoad(tiny_model("qwen3-moe", "eager"))
    assert load.of_all([[1, 1, 1, 1, 8, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]) == (1.0, 4.0)


def test_dense_models_have_none() -> None:
    """Nothing is watched where there is no router."""
    assert not ExpertLoad(tiny_model())


class Keep(StepReportCallback):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_step_report(self, args: Any, state: Any, report: Any) -> None:
        self.found.append(report.expert_load)


def train() -> dict[str, Any]:
    keep: TrainerCallback = Keep()
    model = tiny_model("qwen3-moe", "eager")
    found = trained(model, samples(LENGTHS), ScriptedTrainer, callbacks=[keep], max_steps=1)
    return {"load": keep.found, "logs": found["logs"]}  # type: ignore[attr-defined]


def test_no_plan_changes_it() -> None:
    """Four ranks that share samples count what one process counts that takes one sample at a time."""
    model = tiny_model("qwen3-moe", "eager").train()
    load, data = ExpertLoad(model), samples(LENGTHS)
    for row in trainer_order(len(LENGTHS), 12, 7, 1)[0]:
        run(model, load, torch.tensor(data[row]["input_ids"])[None])
    expected = load.of_all([load.take()])
    for rank in run_ranks(train, 4):
        assert rank["load"][0] == pytest.approx(expected, rel=1e-12)
        [logged] = [entry for entry in rank["logs"] if "loss" in entry]
        assert logged["hetero/expert_load"] == pytest.approx(sum(expected) / 2, rel=1e-6)
        assert logged["hetero/expert_load_worst"] >= logged["hetero/expert_load"] >= 1
