"""A run finds its cost model: the user's file, else the checkpoint's, else an estimate; all ranks have the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from costs.test_cost_model import a_cost_model
from helpers import LENGTHS, arguments, run_ranks, samples, tiny_model

from hf_hetero import CostModel, HeteroConfig, HeteroTrainer
from hf_hetero.callbacks.slowness import with_speeds
from hf_hetero.model.activations import Activations
from hf_hetero.ranks.sharding import Sharding
from hf_hetero.trainer.checkpoints.checkpoint import RUN_FILE
from hf_hetero.trainer.checkpoints.kept_cost_model import (
    KEPT_COST_MODEL,
    Kept,
    digest_of,
    keep_cost_model,
    kept_cost_model,
)
from hf_hetero.trainer.machine import set_up

QUERIES = {"kv_bytes_per_token": 1.0, "query_bytes_per_token": 1.0}


def set_up_here(folder: str, config: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    world = torch.distributed.get_world_size()
    args, hetero = arguments(folder, world), HeteroConfig(**config)
    model = tiny_model()
    activations = Activations(model, recomputes=False, in_chunks=hetero.chunked_mlp, compiled=False)
    machine = set_up(model, args, hetero, torch.float32, Sharding(), activations, checkpoint)
    ranks = tuple(range(world))
    found = {"cost": machine.cost_model.to_dict(), "has_group": machine.groups.get(ranks) is not None}
    machine.groups.close()
    return found


def checkpoint_of(folder: Path, num_ranks: int, cost: CostModel) -> str:
    """A checkpoint as a run on so many ranks leaves it."""
    (folder / "checkpoint-3").mkdir()
    keep_cost_model(folder / "checkpoint-3", cost, num_ranks)
    return str(folder / "checkpoint-3")


def test_the_users_file_comes_first(tmp_path: Path) -> None:
    """Given a file, all ranks have it, under the user's limits, whatever the checkpoint says."""
    a_cost_model(name="mine").save(tmp_path / "cost.json")
    checkpoint = checkpoint_of(tmp_path, 2, a_cost_model(name="kept"))
    config = {"cost_model": str(tmp_path / "cost.json"), "max_tokens_per_rank": 50}
    first, second = run_ranks(set_up_here, 2, str(tmp_path), config, checkpoint)
    assert first == second
    assert first["cost"]["name"] == "mine"
    assert CostModel.from_dict(first["cost"]).capacity_tokens == 50
    assert first["has_group"]


@pytest.mark.parametrize(
    ("methods", "known", "is_said"),
    [(["ulysses", "token_ring"], {}, True), (["ulysses", "ring"], {}, False), (["token_ring"], QUERIES, False)],
)
def test_a_method_without_a_price_is_said(
    methods: list[str], known: dict[str, float], is_said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asks for a token ring, with a file that does not know of queries, is told that none is planned, and why."""
    a_cost_model(**known).save(tmp_path / "cost.json")
    trainer = HeteroTrainer(
        tiny_model(),
        arguments(str(tmp_path / "run"), 1, max_steps=1),
        train_dataset=samples(LENGTHS),
        hetero=HeteroConfig(cost_model=str(tmp_path / "cost.json"), methods=methods),
    )
    with caplog.at_level("WARNING"):
        trainer.train()
    assert ("'token_ring' is never planned" in caplog.text) == is_said
    assert ("add kv_bytes_per_token and query_bytes_per_token" in caplog.text) == is_said


@pytest.mark.parametrize(("kept_on", "name"), [(2, "kept"), (4, "estimate")])
def test_the_checkpoints_comes_next(tmp_path: Path, kept_on: int, name: str) -> None:
    """A resumed run goes on with its own cost model; on another number of ranks it is estimated anew."""
    checkpoint = checkpoint_of(tmp_path, kept_on, a_cost_model(name="kept"))
    found = run_ranks(set_up_here, 2, str(tmp_path), {}, checkpoint)
    assert found[0]["cost"]["name"] == name
    assert found[0] == found[1]


def test_speeds_that_a_run_found_are_kept(tmp_path: Path) -> None:
    """A run that resumes from a user's file goes on with the speeds of ranks that were found, unless it is another."""
    given = a_cost_model(provenance="measured")
    given.save(tmp_path / "cost.json")
    found = with_speeds(given, [1.0, 0.5], least_change=0.1)
    (tmp_path / "checkpoint-3").mkdir()
    keep_cost_model(tmp_path / "checkpoint-3", found, 2, digest_of(given))
    config = {"cost_model": str(tmp_path / "cost.json")}
    resumed = run_ranks(set_up_here, 2, str(tmp_path), config, str(tmp_path / "checkpoint-3"))
    assert CostModel.from_dict(resumed[1]["cost"]).rank_speeds == {1: 0.5}
    replace(given, name="another").save(tmp_path / "cost.json")
    resumed = run_ranks(set_up_here, 2, str(tmp_path), config, str(tmp_path / "checkpoint-3"))
    assert not CostModel.from_dict(resumed[0]["cost"]).is_uneven


def test_keeping(tmp_path: Path) -> None:
    """What is kept has the documented format and the number of ranks."""
    checkpoint = Path(checkpoint_of(tmp_path, 2, a_cost_model()))
    data = json.loads((checkpoint / KEPT_COST_MODEL).read_text())
    assert (data["format"], data["num_ranks"]) == ("hf-hetero-cost/1", 2)
    assert kept_cost_model(str(checkpoint), 2) == Kept(a_cost_model(), None)
    assert kept_cost_model(None, 2) is None


def test_one_of_other_replicas_is_made_anew(tmp_path: Path) -> None:
    """A cost model has the memory of one mesh: over another it is estimated again; older ones are of one replica."""
    keep_cost_model(tmp_path, a_cost_model(), 4, replicas=2)
    assert kept_cost_model(str(tmp_path), 4, replicas=2) == Kept(a_cost_model(), None)
    assert kept_cost_model(str(tmp_path), 4) is None
    data = json.loads((tmp_path / KEPT_COST_MODEL).read_text())
    del data["replicas"]
    (tmp_path / KEPT_COST_MODEL).write_text(json.dumps(data))
    assert kept_cost_model(str(tmp_path), 4) == Kept(a_cost_model(), None)
    assert kept_cost_model(str(tmp_path), 4, replicas=2) is None


def evaluated_then_resumed(folder: str, resume: str | None) -> list[str]:
    world = torch.distributed.get_world_size()
    args = arguments(folder, world, max_steps=2, save_strategy="steps", save_steps=1)
    data = samples(LENGTHS[:12])
    trainer = HeteroTrainer(tiny_model(), args, train_dataset=data, eval_dataset=data)
    names: list[str] = []
    for act in (trainer.evaluate, lambda: trainer.train(resume_from_checkpoint=resume), trainer.evaluate):
        act()
        assert trainer.cost_model is not None
        names.append(trainer.cost_model.name)
    return names


def test_evaluating_first_changes_nothing(tmp_path: Path) -> None:
    """A run that is resumed goes on with the checkpoint's cost model, whatever was set up to evaluate before."""
    assert run_ranks(evaluated_then_resumed, 2, str(tmp_path), None) == [["estimate"] * 3] * 2
    kept = tmp_path / "checkpoint-1"
    keep_cost_model(kept, a_cost_model(name="kept"), 2)
    (kept / RUN_FILE).unlink()  # it was changed on purpose
    found = run_ranks(evaluated_then_resumed, 2, str(tmp_path), str(kept))
    assert found == [["estimate", "kept", "kept"]] * 2
