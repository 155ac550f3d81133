"""Doing what a refusal says is enough: each is provoked, its advice is followed to the letter, and the run trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from helpers import LENGTHS, arguments, samples, tiny_model, with_lora
from tokenizers import Tokenizer, models

from hf_hetero import HeteroConfig, HeteroError, HeteroTrainer

Settings = dict[str, Any]


def refusal(run: Callable[..., object], *given: Any, **options: Any) -> str:
    """What was said."""
    with pytest.raises(HeteroError) as caught:
        run(*given, **options)
    return str(caught.value)


def train(
    folder: Path, model: Any = None, data: Any = None, hetero: Settings | None = None, **changes: Any
) -> HeteroTrainer:
    """A step of a small run on one rank."""
    args = arguments(str(folder), 1, **{"max_steps": 1, **changes})
    trainer = HeteroTrainer(
        model or tiny_model(), args, train_dataset=data or samples(LENGTHS), hetero=HeteroConfig(**hetero or {})
    )
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------ training arguments


ARGUMENTS: dict[str, tuple[Settings, str, Settings]] = {  # what is refused, what is said, what that leads to
    "smoothing": ({"label_smoothing_factor": 0.1}, "set it to 0", {"label_smoothing_factor": 0}),
    "means of ranks": (
        {"average_tokens_across_devices": False},
        "leave it True",
        {"average_tokens_across_devices": True},
    ),
    "noise": ({"neftune_noise_alpha": 5.0}, "unset it", {}),
    "batch size": ({"auto_find_batch_size": True}, "unset it", {}),
    "lengths": (
        {"train_sampling_strategy": "group_by_length"},
        "use 'random'",
        {"train_sampling_strategy": "random"},
    ),
    "split batches": ({"accelerator_config": {"split_batches": True}}, "unset it", {"accelerator_config": {}}),
    "dispatched": ({"accelerator_config": {"dispatch_batches": True}}, "unset it", {"accelerator_config": {}}),
    "accumulation": (
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
        "set gradient_accumulation_steps instead",
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3},
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(tmp_path: Path, name: str) -> None:
    """Training arguments that are refused, and those that the message asks for instead."""
    refused, said, mended = ARGUMENTS[name]
    assert said in refusal(train, tmp_path, **refused)
    assert train(tmp_path, **mended).state.global_step == 1


def test_fsdp_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerate file that asks for FSDP where it does not apply, and one that does not."""
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_FSDP", "true")
        launched.setenv("FSDP_VERSION", "2")
        assert "take FSDP out of the configuration" in refusal(train, tmp_path)
    train(tmp_path)


# ------------------------------------------------------------------------------------------------------------ models


def gpt2(folder: Path) -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


DROPOUTS = {
    "attention_dropout": lambda folder: tiny_model(attention_dropout=0.1).save_pretrained(folder),
    "attn_pdrop": gpt2,
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_attention_dropout(tmp_path: Path, name: str) -> None:
    """A model is loaded as the message says; to change its config later would not reach its layers."""
    DROPOUTS[name](tmp_path)
    said = refusal(train, tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert f"{name}=0.1 draws another mask" in said
    assert f"from_pretrained(..., {name}=0.0)" in said
    train(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **{name: 0.0}))


def test_router_loss(tmp_path: Path) -> None:
    """Checkpoints that cut off the gradient of routers; those that do not, or no loss of routers."""
    model, reentrant = tiny_model("qwen3-moe", output_router_logits=True), {"use_reentrant": True}
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": reentrant}
    said = refusal(train, tmp_path, model, **options)
    assert 'activation_checkpointing_kwargs={"use_reentrant": False}' in said
    assert "Set config.output_router_logits = False" in said
    train(tmp_path, model, **{**options, "activation_checkpointing_kwargs": {"use_reentrant": False}})
    model.config.output_router_logits = False
    train(tmp_path, model, **options)


def test_router_loss_in_trl(tmp_path: Path) -> None:
    """TRL's trainer has it reported whatever the config says; its own setting is what the message names."""
    trl = pytest.importorskip("trl")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")

    from hf_hetero import HeteroSFTTrainer

    def sft(**changes: Any) -> None:
        options = {
            "max_steps": 1,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": [],
            "max_length": None,
        }
        args = trl.SFTConfig(str(tmp_path), use_cpu=True, save_strategy="no", disable_tqdm=True, **options, **changes)
        data = datasets.Dataset.from_list(samples(LENGTHS))
        HeteroSFTTrainer(tiny_model("qwen3-moe"), args, train_dataset=data, processing_class=tokenizer).train()

    assert "SFTConfig(router_aux_loss_coef=0.0)" in refusal(sft)
    sft(router_aux_loss_coef=0.0)


def test_virtual_tokens(tmp_path: Path) -> None:
    """LoRA in place of prompt tuning."""
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert "use LoRA" in refusal(train, tmp_path, model)
    train(tmp_path, with_lora(tiny_model()))


# --------------------------------------------------------------------------------------------------------- own settings


CHOICES = {"solver": "best", "mip_backend": "gurobi", "longer_samples": "drop"}
LISTS = {"methods": ["send"], "activation_policies": ["forget"]}


@pytest.mark.parametrize("name", [*CHOICES, *LISTS])
def test_choices(name: str) -> None:
    """Each of the values that the message offers is taken."""
    said = refusal(HeteroConfig, **{name: {**CHOICES, **LISTS}[name]})
    offered = re.split(", ", said.rpartition("choose one of " if name in CHOICES else "choose from ")[2].rstrip("."))
    assert len(offered) > 1
    for value in offered:
        HeteroConfig(**{name: [value] if name in LISTS else value})


@pytest.mark.parametrize("name", ["max_degree", "max_tokens_per_rank", "max_sample_tokens", "num_ranks"])
def test_least_numbers(name: str) -> None:
    """The least value that the message allows is taken."""
    said = refusal(HeteroConfig, **{name: 0})
    HeteroConfig(**{name: int(said.rpartition("at least ")[2].rstrip("."))})


def test_number_of_ranks(tmp_path: Path) -> None:
    """A run written for more ranks than there are, written anew."""
    assert "or change num_ranks" in refusal(train, tmp_path, hetero={"num_ranks": 8})
    train(tmp_path, hetero={"num_ranks": 1})


@pytest.mark.parametrize("policy", ["truncate", "split", None])
def test_longer_samples(tmp_path: Path, policy: str | None) -> None:
    """A sample above max_sample_tokens: cut in either way, or the limit raised to what the message counts."""
    said = refusal(train, tmp_path, hetero={"max_sample_tokens": 40})
    assert "has 64. Raise HeteroConfig.max_sample_tokens" in said
    assert "longer_samples='truncate' or 'split'" in said
    cut = {"max_sample_tokens": 40, "longer_samples": policy} if policy else {"max_sample_tokens": 64}
    train(tmp_path, hetero=cut, max_steps=2)


@pytest.mark.parametrize(
    "mended", [{"max_tokens_per_rank": 64}, {"max_tokens_per_rank": 16, "max_sample_tokens": 16}], ids=["memory", "cut"]
)
def test_a_sample_that_no_rank_holds(tmp_path: Path, mended: Settings) -> None:
    """More room, or shorter samples."""
    said = refusal(train, tmp_path, hetero={"max_tokens_per_rank": 16}, max_steps=2)
    assert "Lower the maximum length, add ranks, raise the memory limit" in said
    train(tmp_path, hetero={"longer_samples": "split", **mended}, max_steps=2)


# ------------------------------------------------------------------------------------------------------------ samples


ROW = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}
DATA: dict[str, tuple[Settings, str, Settings]] = {  # a row, what is said, what that makes of it
    "no tokens": ({"input_ids": [], "labels": []}, "Filter empty samples out", ROW),
    "fewer labels": ({**ROW, "labels": [3, 4]}, "Give every token a label", {**ROW, "labels": [-100, -100, 3, 4]}),
    "no input_ids": ({"labels": [3, 4]}, "Tokenise", ROW),
    "lengths": ({**ROW, "length": 3}, "Remove the dataset's length column", ROW),
    "documents": ({**ROW, "seq_lengths": [3, 2]}, "or remove the seq_lengths column", ROW),
    "packed": (
        {**ROW, "position_ids": [0, 1, 0, 1]},
        "a seq_lengths column",
        {**ROW, "position_ids": [0, 1, 0, 1], "seq_lengths": [2, 2]},
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_samples(tmp_path: Path, name: str) -> None:
    """A row that is refused, and the data as the message wants them."""
    bad, said, mended = DATA[name]
    assert said in refusal(train, tmp_path, data=datasets.Dataset.from_list([bad] * 12))
    train(tmp_path, data=datasets.Dataset.from_list([mended] * 12))


def test_outputs_that_are_no_tokens(tmp_path: Path) -> None:
    """Metrics of whole samples, which planned evaluation refuses, from stock evaluation."""

    def evaluate(**settings: Any) -> None:
        trainer = HeteroTrainer(
            tiny_model(),
            arguments(str(tmp_path), 1),
            eval_dataset=samples(LENGTHS),
            preprocess_logits_for_metrics=lambda logits, labels: logits.mean(dim=1),
            compute_metrics=lambda found: {"rows": len(found.predictions)},
            hetero=HeteroConfig(**settings),
        )
        assert trainer.evaluate()["eval_rows"] == len(LENGTHS)

    assert "set HeteroConfig.plan_evaluation=False" in refusal(evaluate)
    evaluate(plan_evaluation=False)
