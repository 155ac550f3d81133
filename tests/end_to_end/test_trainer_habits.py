"""What a Trainer user is used to still works: evaluation, logs, saving, settings of their own, one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LENGTHS, arguments, run_ranks, samples, tiny_model, trained
from transformers import AutoModelForCausalLM, Trainer

from hf_hetero import HeteroConfig, HeteroTrainer
from hf_hetero.callbacks import PlanMetricsCallback
from hf_hetero.collators import PackedCollator


def evaluate(folder: str, trainer_class: Any, **extra: Any) -> dict[str, float]:
    trainer = trainer_class(
        tiny_model(),
        arguments(folder, 2, per_device_eval_batch_size=3, include_for_metrics=["loss"]),
        train_dataset=samples(LENGTHS),
        eval_dataset=samples(LENGTHS[:12], seed=5),
        data_collator=PackedCollator(),
        compute_metrics=lambda p: {"argmax_sum": float(np.argmax(p.predictions, -1)[p.label_ids != -100].sum())},
        **extra,
    )
    return {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_argmax_sum")}


def evaluate_unplanned(folder: str) -> dict[str, float]:
    return evaluate(folder, HeteroTrainer, hetero=HeteroConfig(plan_evaluation=False))


def test_unplanned_evaluation_is_stock(tmp_path: Path) -> None:
    """evaluate() without plans gives the loss and metrics of plain Trainer, on two ranks."""
    ours = run_ranks(evaluate_unplanned, 2, str(tmp_path))[0]
    theirs = run_ranks(evaluate, 2, str(tmp_path), Trainer)[0]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert len(ours) == 2


def train_in_loop(folder: str) -> Any:
    trainer = HeteroTrainer(
        tiny_model(),
        arguments(folder, 2, eval_strategy="steps", eval_steps=2, max_steps=4, save_strategy="steps", save_steps=4),
        train_dataset=samples(LENGTHS),
        eval_dataset=samples(LENGTHS[:6]),
    )
    trainer.train()
    trainer.save_model(folder)
    return trainer.state.log_history


def test_evaluation_within_training_and_saving(tmp_path: Path) -> None:
    """Evaluation between steps, checkpoints, and a saved model that loads without this package."""
    history = run_ranks(train_in_loop, 2, str(tmp_path))[0]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
    kept = json.loads((tmp_path / "checkpoint-4" / "hetero_cost_model.json").read_text())
    assert (kept["format"], kept["num_ranks"]) == ("hf-hetero-cost/1", 2)
    assert "hf_hetero" not in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config._attn_implementation != "hf_hetero"
    assert not torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


def test_log_has_the_numbers_of_the_steps(tmp_path: Path) -> None:
    """Training logs carry tokens a second and the rest, without being asked; evaluation logs do not."""
    result = trained(tiny_model(), samples(LENGTHS), trainer_class=HeteroTrainer)
    entry = result["logs"][0]
    assert {"hetero/tokens_per_s", "hetero/idle_share", "hetero/planned_s", "hetero/step_s"} <= entry.keys()
    assert entry["hetero/tokens_per_s"] > 0


def test_users_own_metrics_callback_is_used(tmp_path: Path) -> None:
    """A callback that the user brings replaces the one that is added."""
    mine = PlanMetricsCallback(record=True)
    trainer = HeteroTrainer(tiny_model(), arguments(str(tmp_path), 1), train_dataset=samples(LENGTHS), callbacks=[mine])
    trainer.train()
    kinds = [type(c) for c in trainer.callback_handler.callbacks]
    assert kinds.count(PlanMetricsCallback) == 1
    assert len((tmp_path / "plans.jsonl").read_text().splitlines()) == 4


def test_arguments_are_not_changed(tmp_path: Path) -> None:
    """Accumulation is what was asked for; batches and their number are Trainer's."""
    args = arguments(str(tmp_path), 1, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    trainer = HeteroTrainer(tiny_model(), args, train_dataset=samples(LENGTHS))
    assert args.gradient_accumulation_steps == 3
    assert trainer.args is args
    assert trainer.get_total_train_batch_size(trainer.args) == 6
    assert len(trainer.get_train_dataloader()) == 12


def test_trains_twice(tmp_path: Path) -> None:
    """train() may be called again, as on any Trainer."""
    trainer = HeteroTrainer(tiny_model(), arguments(str(tmp_path), 1), train_dataset=samples(LENGTHS))
    first = trainer.train()
    second = trainer.train()
    assert first.global_step == second.global_step == 4
    assert second.training_loss < first.training_loss


def test_a_datasets_table_with_other_columns(tmp_path: Path) -> None:
    """Columns that the model does not know stay out of the way, as with Trainer."""
    import datasets

    rows = [{**row, "length": len(row["input_ids"]), "source": "web"} for row in samples(LENGTHS)]
    args = arguments(str(tmp_path), 1, remove_unused_columns=True)
    table = HeteroTrainer(tiny_model(), args, train_dataset=datasets.Dataset.from_list(rows))
    plain = HeteroTrainer(tiny_model(), args, train_dataset=samples(LENGTHS))
    assert table.train().training_loss == plain.train().training_loss


def train_bf16() -> Any:
    return trained(tiny_model("qwen3"), samples(LENGTHS), bf16=True, activation_checkpointing=True)


def test_mixed_precision() -> None:
    """bf16 autocast runs under mixed plans, and its loss is near that of fp32."""
    half = run_ranks(train_bf16, 2)[0]
    full = run_ranks(train_fp32, 2)[0]
    for a, b in zip(half["logs"], full["logs"], strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-2)


def train_fp32() -> Any:
    return trained(tiny_model("qwen3"), samples(LENGTHS))


def train_compiled() -> Any:
    return trained(tiny_model(), samples(LENGTHS), torch_compile=True, torch_compile_backend="eager")["gradients"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_compiled_model_learns_the_same(ranks: int) -> None:
    """torch.compile works around the attention, by every method; blocks of a ring need four ranks."""
    compiled = run_ranks(train_compiled, ranks)[0]
    eager = run_ranks(train_llama, ranks)[0]["gradients"]
    for ours, theirs in zip(compiled, eager, strict=True):
        assert len(ours) == len(theirs)
        for (_, a), (_, b) in zip(sorted(ours.items()), sorted(theirs.items()), strict=True):
            assert (a - b).abs().max() < 1e-6


def train_llama() -> Any:
    return trained(tiny_model(), samples(LENGTHS))


def test_number_of_ranks_can_be_odd() -> None:
    """Three ranks: planned by the planner itself, with a sample that needs all three."""
    ranks = run_ranks(train_on_three, 3)
    assert all(torch.equal(ranks[0]["weights"][n], r["weights"][n]) for r in ranks for n in r["weights"])
    assert ranks[0]["logs"][0]["loss"] > 0


def train_on_three() -> Any:
    config = HeteroConfig(max_tokens_per_rank=22)
    return trained(
        tiny_model(), samples(LENGTHS), trainer_class=HeteroTrainer, hetero=config, per_device_train_batch_size=4
    )


def train_scripted_step_names() -> list[str]:
    names: list[str] = []

    model = tiny_model()
    model.register_forward_pre_hook(lambda _, args, kwargs: names.append(kwargs["hetero"].where(0)), with_kwargs=True)
    trained(model, samples(LENGTHS), max_steps=2)
    return names


def test_contexts_name_their_step() -> None:
    """Step, micro-batch and ranks of each context are those it is used for."""
    names = run_ranks(train_scripted_step_names, 2)[0]
    assert names[0].startswith("step 1, micro-batch 0, layer 0, ranks [")
    assert any(name.startswith("step 2, micro-batch") for name in names)
