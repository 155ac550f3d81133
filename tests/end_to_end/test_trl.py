"""TRL's SFTTrainer, whose loss has a head of its own, under plans: chats, masked labels, packed rows."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import transformers
from helpers import (
    LENGTHS,
    TINY,
    Recorder,
    ScriptedPlanner,
    arguments,
    largest_difference,
    often,
    reference_steps,
    run_ranks,
    samples,
    scripted,
    shard_on_cpu,
    tiny_model,
    trainer_order,
    with_lora,
)
from hybrids import hybrid_model
from transformers import Trainer
from words import say, tokenizer

from hf_hetero import HeteroTrainerMixin, UnsupportedModel

trl = pytest.importorskip("trl")


def chats() -> list[dict[str, Any]]:
    """Conversations of one or two turns and of very different lengths."""
    found = []
    for n, length in enumerate(LENGTHS):
        turns = [{"role": "user", "content": say(1 + n % 5, n)}, {"role": "assistant", "content": say(length, n)}]
        found.append({"messages": turns * (1 + n % 2)})
    return found


def config(folder: str, **changes: Any) -> Any:
    plain = arguments(folder, dist.get_world_size() if dist.is_initialized() else 1).to_dict()
    names = ("per_device_train_batch_size", "max_steps", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm")
    options = {
        "use_cpu": True,
        "bf16": False,
        "seed": 7,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_length": None,
        "activation_checkpointing": False,
    }
    return trl.SFTConfig(folder, **{**{name: plain[name] for name in names}, **options, **changes})


def train(
    folder: str, data: Any, changes: dict[str, Any], adapters: bool = False, methods: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Gradients, logs, and the dataset as TRL has prepared it."""
    import datasets

    from hf_hetero import HeteroSFTTrainer

    class Scripted(type("Own", (HeteroSFTTrainer,), methods or {})):
        def _plan_source(self) -> Any:
            return scripted(ScriptedPlanner(self.args.world_size))

        def _planners(self) -> Any:
            return SimpleNamespace(for_evaluation=self._plan_source)

    if changes.get("fsdp"):
        shard_on_cpu()
    recorder, model = Recorder(), with_lora(tiny_model()) if adapters else tiny_model()
    table = datasets.Dataset.from_list(data)
    options = {"eval_dataset": table} if changes.get("eval_strategy") else {}
    trainer = Scripted(
        model,
        config(folder, **changes),
        train_dataset=table,
        processing_class=tokenizer(),
        callbacks=[recorder],
        **options,
    )
    trainer.train()
    return {
        "gradients": recorder.gradients,
        "logs": trainer.state.log_history,
        "prepared": list(trainer.train_dataset),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def check(found: dict[str, Any], data: Any, steps: list[list[int]], adapters: bool = False) -> None:
    expected = reference_steps(with_lora(tiny_model()) if adapters else tiny_model(), data, steps)
    for ours, theirs in zip(found["gradients"], expected["gradients"], strict=True):
        assert largest_difference(ours, theirs) <= 1e-6
    logs = [entry for entry in found["logs"] if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(expected["losses"], rel=1e-6)
    assert logs[-1]["num_tokens"] == sum(len(data[row]["input_ids"]) for rows in steps for row in rows)


STEPS = trainer_order(len(LENGTHS), 12, 7, 4)
UNPREPARED = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def test_sft_trainer_learns_the_same(tmp_path: Any) -> None:
    """Gradients and losses of SFTTrainer under mixed plans equal the reference; its token count is that of the data."""
    found = run_ranks(train, 4, str(tmp_path), samples(LENGTHS), UNPREPARED)[0]
    check(found, samples(LENGTHS), STEPS)


@pytest.mark.parametrize("is_padding_free", often([True, False], True))
def test_assistant_only_loss(tmp_path: Any, is_padding_free: bool) -> None:
    """Chats with a loss on the assistant's tokens alone, whatever TRL would have made of a batch."""
    found = run_ranks(train, 4, str(tmp_path), chats(), {"assistant_only_loss": True, "padding_free": is_padding_free})[
        0
    ]
    for row, chat in zip(found["prepared"], chats(), strict=True):
        spoken = [m["content"].split() for m in chat["messages"] if m["role"] == "assistant"]
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
        ids = tokenizer().convert_tokens_to_ids([word for words in spoken for word in [*words, "</s>"]])
        assert learned == ids
    check(found, found["prepared"], STEPS)


def test_completion_only_loss(tmp_path: Any) -> None:
    """Prompts are read and not learned."""
    pairs = [{"prompt": say(1 + n % 4, n), "completion": " " + say(m, n)} for n, m in enumerate(LENGTHS)]
    found = run_ranks(train, 2, str(tmp_path), pairs, {})[0]
    assert all(row["labels"][0] == -100 for row in found["prepared"])
    check(found, found["prepared"], STEPS)


def test_packed_rows(tmp_path: Any) -> None:
    """With packing=True a step is as many packed rows as Trainer would take; their documents do not see each other."""
    changes = {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "max_steps": 2}
    found = run_ranks(train, 4, str(tmp_path), samples(LENGTHS), {**changes})[0]
    documents: list[dict[str, Any]] = []
    of_row: list[list[int]] = []
    for row in found["prepared"]:
        of_row.append([])
        start = 0
        for length in row["seq_lengths"]:
            of_row[-1].append(len(documents))
            documents.append({name: row[name][start : start + length] for name in ("input_ids", "labels")})
            start += length
    assert max(map(len, of_row)) > 2
    drawn = trainer_order(len(of_row), 4, 7, 2)
    check(found, documents, [[n for row in step for n in of_row[row]] for step in drawn])


def test_adapters_under_fsdp2(tmp_path: Any) -> None:
    """LoRA, sharded, with TRL's loss."""
    sharded = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    found = run_ranks(train, 2, str(tmp_path), samples(LENGTHS), {**UNPREPARED, **sharded}, True)[0]
    assert found["wrapper"].startswith("FSDP")
    check(found, samples(LENGTHS), STEPS, adapters=True)


def test_evaluation(tmp_path: Any) -> None:
    """Evaluation between steps goes by plans, through TRL's loss."""
    changes = {**UNPREPARED, "eval_strategy": "steps", "eval_steps": 4, "learning_rate": 0.0}
    found = run_ranks(train, 2, str(tmp_path), samples(LENGTHS), changes)[0]
    [evaluated] = [entry["eval_loss"] for entry in found["logs"] if "eval_loss" in entry]
    [expected] = reference_steps(tiny_model(), samples(LENGTHS), [list(range(len(LENGTHS)))])["losses"]
    assert evaluated == pytest.approx(expected, rel=1e-6)


MEANS = ("entropy", "mean_token_accuracy", "num_tokens")


def test_logged_means_are_over_tokens(tmp_path: Any) -> None:
    """What TRL logs of a step does not depend on its plan: it is what TRL finds in one batch, in evaluation, too."""
    import datasets

    table = datasets.Dataset.from_list(with_masked(samples(LENGTHS)))
    changes = {**UNPREPARED, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": len(LENGTHS)}
    trainer = trl.SFTTrainer(
        tiny_model(),
        config(str(tmp_path), **changes),
        train_dataset=table,
        eval_dataset=table,
        processing_class=tokenizer(),
    )
    trainer.train()
    expected = [of_logs(trainer.state.log_history, prefix) for prefix in ("", "eval_")]
    for num_ranks in (2, 4):
        data = with_masked(samples(LENGTHS))
        found = run_ranks(train, num_ranks, str(tmp_path), data, {**changes, "per_device_eval_batch_size": 2})[0]
        for prefix, values in zip(("", "eval_"), expected, strict=True):
            assert of_logs(found["logs"], prefix) == [pytest.approx(value, rel=1e-6) for value in values]


def test_logged_means_over_several_steps(tmp_path: Any) -> None:
    """Between two logs each token counts alike, not each step or micro-batch."""
    data = with_masked(samples(LENGTHS))
    each = run_ranks(train, 2, str(tmp_path), data, UNPREPARED)[0]["logs"]
    [together] = of_logs(run_ranks(train, 2, str(tmp_path), data, {**UNPREPARED, "logging_steps": 4})[0]["logs"], "")
    targets = [sum(label != -100 for row in rows for label in data[row]["labels"][1:]) for rows in STEPS]
    means = of_logs(each, "")
    for at in (0, 1):
        weighted = sum(mean[at] * count for mean, count in zip(means, targets, strict=True)) / sum(targets)
        assert together[at] == pytest.approx(weighted, rel=1e-9)
    assert together[2] == means[-1][2]


def watched_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a user's class over SFTTrainer's, which TRL recommends."""
    return trl.SFTTrainer.compute_loss(self, *args, **kwargs)


def test_own_loss_over_trls(tmp_path: Any) -> None:
    """It is tried before training, which leaves no trace in what is learnt or logged."""
    methods = {"compute_loss": watched_loss}
    found = run_ranks(train, 4, str(tmp_path), samples(LENGTHS), UNPREPARED, False, methods)[0]
    check(found, samples(LENGTHS), STEPS)


def with_masked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every second row few tokens are learnt."""
    masked = [{**row, "labels": [-100] * (len(row["labels"]) - 2) + row["labels"][-2:]} for row in rows]
    return [one if n % 2 else other for n, (one, other) in enumerate(zip(rows, masked, strict=True))]


def of_logs(logs: list[dict[str, Any]], prefix: str) -> list[list[float]]:
    return [[log[f"{prefix}{name}"] for name in MEANS] for log in logs if f"{prefix}loss" in log]


def test_the_mixin_alone(tmp_path: Any) -> None:
    """The mixin over SFTTrainer, with TRL's own collator below, prepares the same samples."""
    import datasets

    class Mixed(HeteroTrainerMixin, trl.SFTTrainer):
        pass

    data = datasets.Dataset.from_list(samples(LENGTHS))
    trainer = Mixed(tiny_model(), config(str(tmp_path), **UNPREPARED), train_dataset=data, processing_class=tokenizer())
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(reference_steps(tiny_model(), samples(LENGTHS), STEPS)["losses"], rel=1e-5)


def sft(kind: Any, name: str, folder: Path, **changes: Any) -> list[float]:
    """The losses of two steps, in a single process."""
    import datasets

    if name == "llama4":
        own = {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**TINY, **own}))
    else:
        model = hybrid_model(name)
    rows = datasets.Dataset.from_list(samples([16] * 24))
    made = kind(model, config(str(folder), max_steps=2, **changes), train_dataset=rows, processing_class=tokenizer())
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_a_model_without_a_part_before_its_head(tmp_path: Path) -> None:
    """TRL's loss does not find it in Llama 4's text model, plain or planned: refused when the trainer is made."""
    from hf_hetero import HeteroSFTTrainer

    with pytest.raises(UnsupportedModel, match="finds no such part of Llama4ForCausalLM: it has no 'language_model'"):
        sft(HeteroSFTTrainer, "llama4", tmp_path)
    with pytest.raises(AttributeError, match="last_hidden_state"):
        sft(trl.SFTTrainer, "llama4", tmp_path)


def test_routers_that_trl_does_not_know(tmp_path: Path) -> None:
    """TRL asks for the loss of Granite's routers and cannot compute it; without, as is said, plans learn the same."""
    from hf_hetero import HeteroSFTTrainer

    with pytest.raises(UnsupportedModel, match=r"under TRL, .* SFTConfig\(router_aux_loss_coef=0.0\)"):
        sft(HeteroSFTTrainer, "granitemoehybrid", tmp_path)
    with pytest.raises(AttributeError, match="num_experts"):
        sft(trl.SFTTrainer, "granitemoehybrid", tmp_path)
    planned, plain = (
        sft(kind, "granitemoehybrid", tmp_path, router_aux_loss_coef=0.0) for kind in (HeteroSFTTrainer, trl.SFTTrainer)
    )
    assert planned == pytest.approx(plain, rel=1e-5)


def trainers_of_trl() -> list[type]:
    """Every trainer of TRL that can be imported here."""
    found: dict[type, None] = {}
    for module in pkgutil.walk_packages(trl.__path__, "trl."):
        if not re.match(r"trl\.(trainer|experimental)\b", module.name):
            continue
        with warnings.catch_warnings(), contextlib.suppress(ImportError):
            warnings.simplefilter("ignore")
            members = vars(importlib.import_module(module.name)).values()
            classes = [one for one in members if isinstance(one, type) and issubclass(one, Trainer)]
            found |= dict.fromkeys(one for one in classes if one.__module__.startswith("trl."))
    return sorted(found, key=lambda one: f"{one.__module__}.{one.__name__}")


def test_other_losses_of_trl_are_refused() -> None:
    """Pairs, rewards, samples that are generated, a teacher: class and method are named, and nothing is built."""
    tried = set()
    for kind in trainers_of_trl():
        if kind.__name__ in ("SFTTrainer", "_BaseTrainer"):
            continue
        tried.add(kind.__name__)
        with pytest.raises(UnsupportedModel, match=rf"^{kind.__name__} compares.*: \w+Trainer\.\w+ is no sum"):
            type("Mixed", (HeteroTrainerMixin, kind), {})(tiny_model())
    assert tried >= {"DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer", "RewardTrainer"}
