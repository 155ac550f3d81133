"""A run that finds out that one of its ranks is slow gives it less to do, and learns what it would have learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import LENGTHS, arguments, run_ranks, samples, tiny_model

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import RankSpeedsCallback
from hf_hetero.callbacks.rank_speeds import UNEVEN_COST_MODEL

NUM_STEPS = 9


def a_machine(**changes: Any) -> CostModel:
    cost = CostModel(1e-5, 1e-4, 1e-3, 100, {2: 1e6}, 10, 100, 1100, provenance="measured")
    return replace(cost, **changes)


class OnASlowRank(RankSpeedsCallback):
    """It measures, to the bit the same in each run, what a machine would take whose last rank is slow."""

    def __init__(self, adopt: bool) -> None:
        super().__init__(every_steps=4, skip_steps=0, adopt=adopt)
        self.tokens: list[list[int]] = []

    def on_step_report(self, args: Any, state: Any, report: Any) -> None:
        num_ranks = report.plan.num_ranks
        truth = a_machine(rank_speeds={num_ranks - 1: 0.4})
        busy = [[0.0] * num_ranks for _ in report.plan.micro_batches]
        tokens = [0] * num_ranks
        for seconds, micro_batch in zip(busy, report.plan.micro_batches, strict=True):
            for group in micro_batch.groups:
                for rank in group.ranks:
                    seconds[rank] = truth.group_seconds(group, report.lengths)
                    tokens[rank] += sum(report.lengths[sample] for sample in group.samples)
        self.tokens.append(tokens)
        super().on_step_report(args, state, replace(report, busy_s=tuple(map(tuple, busy))))


def run(folder: str, adopt: bool) -> dict[str, Any]:
    model, watch = tiny_model(), OnASlowRank(adopt)
    Path(folder).mkdir(exist_ok=True)
    a_machine().save(f"{folder}/cost-{torch.distributed.get_rank()}.json")
    trainer = HeteroTrainer(
        model=model,
        args=arguments(folder, torch.distributed.get_world_size(), 12, max_steps=NUM_STEPS),
        train_dataset=samples(LENGTHS),
        callbacks=[watch],
        hetero=HeteroConfig(
            cost_model=f"{folder}/cost-{torch.distributed.get_rank()}.json", solver="fast", plan_ahead_steps=1
        ),
    )
    trainer.train()
    assert trainer.cost_model is not None
    return {
        "tokens": watch.tokens,
        "speeds": dict(trainer.cost_model.rank_speeds),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def test_a_run_plans_by_the_speeds_it_measures(tmp_path: Path) -> None:
    """The slow rank gets fewer tokens than before, the cost model is written, and weights are those without it."""
    aware = run_ranks(run, 2, str(tmp_path / "aware"), True)
    unaware = run_ranks(run, 2, str(tmp_path / "unaware"), False)
    assert set(aware[0]["speeds"]) == {1}
    assert abs(aware[0]["speeds"][1] - 0.4) < 0.05
    assert aware[0]["speeds"] == aware[1]["speeds"]
    assert unaware[0]["speeds"] == {}
    for found in (tmp_path / "aware", tmp_path / "unaware"):
        assert set(CostModel.load(found / UNEVEN_COST_MODEL).rank_speeds) == {1}

    def share(tokens: list[list[int]]) -> float:
        return sum(step[1] for step in tokens) / sum(map(sum, tokens))

    assert aware[0]["tokens"][:4] == unaware[0]["tokens"][:4]
    assert share(aware[0]["tokens"][-3:]) < 0.9 * share(unaware[0]["tokens"][-3:])
    for name, weights in unaware[0]["weights"].items():
        torch.testing.assert_close(aware[0]["weights"][name], weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(aware[0]["losses"]), torch.tensor(unaware[0]["losses"]), rtol=1e-5, atol=0)
