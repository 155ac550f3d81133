"""TRL's RewardTrainer under plans learns what it learns of whole batches on one process, whatever the plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from helpers import (
    TINY,
    Recorder,
    arguments,
    keep_float64,
    largest_difference,
    plain_name,
    run_ranks,
    scripted,
    shard_on_cpu,
    tiny_model,
    whole,
)
from transformers import LlamaConfig, LlamaForSequenceClassification
from words import tokenizer

from hf_hetero import HeteroDPOTrainer, HeteroRewardTrainer, HeteroSFTTrainer, UnsupportedModel
from hf_hetero.checks.exactness import model_problems
from hf_hetero.trainer.pairs.plans import PlansOfPairs

trl = pytest.importorskip("trl")
from preference_pairs import PLAIN, PlannerOfItems, pairs  # noqa: E402

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
LOGGED = ("loss", "min_reward", "mean_reward", "max_reward", "accuracy", "margin", "num_tokens")


class Scripted(HeteroRewardTrainer):
    def _plan_source(self) -> Any:
        return PlansOfPairs(scripted(PlannerOfItems(self.args.world_size)))

    def _planners(self) -> Any:
        return SimpleNamespace(for_evaluation=self._plan_source)


def scoring_model(adapters: bool = False) -> Any:
    torch.manual_seed(0)
    shape = LlamaConfig(**TINY, num_labels=1, attn_implementation="sdpa")
    model = keep_float64(LlamaForSequenceClassification(shape).double())
    if not adapters:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def config(folder: str, **changes: Any) -> Any:
    world = dist.get_world_size() if dist.is_initialized() else 1
    plain = arguments(folder, world, global_batch=4).to_dict()
    options = {
        "use_cpu": True,
        "bf16": False,
        "seed": 7,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    return trl.RewardConfig(folder, **{**{name: plain[name] for name in PLAIN}, **options, **changes})


def train(
    folder: str, changes: dict[str, Any], kind: Any = Scripted, adapters: bool = False, margins: bool = False
) -> dict[str, Any]:
    if changes.get("fsdp"):
        shard_on_cpu()
    rows: list[dict[str, Any]] = [dict(pair) for pair in pairs()]
    if margins:
        rows = [{**row, "margin": 0.25 * number - 0.5} for number, row in enumerate(rows)]
    else:  # TRL's own evaluation of a last batch that is not full would see some pairs twice on two ranks
        rows.append(rows[0])
    recorder, table = Recorder(), datasets.Dataset.from_list(rows)
    options = {"eval_dataset": table} if changes.get("eval_strategy") else {}
    # one that is told apart from the end of text, and one that is not
    words = tokenizer()
    if margins:
        words.pad_token = words.eos_token
    trainer = kind(
        scoring_model(adapters),
        config(folder, **changes),
        train_dataset=table,
        processing_class=words,
        callbacks=[recorder],
        **options,
    )
    trainer.train()
    return {
        "gradients": recorder.gradients,
        "weights": {plain_name(name): whole(p) for name, p in trainer.model.named_parameters()},
        "logs": trainer.state.log_history,
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) < 1e-12
    assert largest_difference(found["weights"], expected["weights"]) < 1e-12
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        for name in (name for name in theirs if name.removeprefix("eval_") in LOGGED):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


def test_rewards_are_learned_the_same(tmp_path: Any) -> None:
    """Gradients, weights, logs and evaluation are TRL's, with margins, and where the end of text is padding, too."""
    changes = {"center_rewards_coefficient": 0.01, **EVALUATED}
    stock = {**changes, "per_device_eval_batch_size": 8}
    expected = train(str(tmp_path / "stock"), stock, trl.RewardTrainer, margins=True)
    assert any("eval_loss" in entry for entry in expected["logs"])
    planned = {**changes, "per_device_eval_batch_size": 2}
    for rank in run_ranks(train, 4, str(tmp_path / "planned"), planned, Scripted, False, True):
        compare(rank, expected)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, SHARDED, {"activation_checkpointing": True}], ids=["whole", "sharded", "again"]
)
def test_however_the_model_is_held(changes: dict[str, Any], adapters: bool, tmp_path: Any) -> None:
    """So they are of adapters, of sharded weights, and where layers are recomputed; evaluations, too."""
    expected = train(
        str(tmp_path / "stock"), {**EVALUATED, "per_device_eval_batch_size": 8}, trl.RewardTrainer, adapters
    )
    planned = {**EVALUATED, "per_device_eval_batch_size": 4, **changes}
    found = run_ranks(train, 2, str(tmp_path / "planned"), planned, Scripted, adapters)[0]
    assert found["wrapper"].startswith("FSDP") == bool(changes.get("fsdp"))
    compare(found, expected)


def of_one_rank(folder: str) -> dict[str, Any]:
    from hf_hetero.trainer.pairs import reward

    reward.over_group = lambda context, parts: parts
    return train(folder, {})


@pytest.mark.slow
def test_rewards_of_one_rank_are_caught(tmp_path: Any) -> None:
    """A negative control: who does not hold a token takes its score for 0."""
    expected = train(str(tmp_path / "stock"), {}, trl.RewardTrainer)
    found = run_ranks(of_one_rank, 4, str(tmp_path / "planned"))[0]
    with pytest.raises(AssertionError):
        compare(found, expected)


def test_other_models_are_refused(tmp_path: Any) -> None:
    """A model that predicts tokens has no score; and no trainer of tokens takes one that has."""
    model = tiny_model()
    model.config.num_labels = 1
    data = datasets.Dataset.from_list(pairs())
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM does not score sequences"):
        HeteroRewardTrainer(model, config(str(tmp_path)), train_dataset=data, processing_class=tokenizer())
    for kind in (HeteroDPOTrainer, HeteroSFTTrainer):
        (problem,) = model_problems(scoring_model(), kind.labelled)
        assert problem.startswith("only decoder-only language models are supported")
