"""What is not exact is refused at construction, with what was found and what to do."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers import LENGTHS, arguments, samples, tiny_model
from hybrids import hybrid_model

from hf_hetero import HeteroConfig, HeteroTrainer, UnsupportedModel
from hf_hetero.checks.exactness import check_arguments
from hf_hetero.errors import ConfigError

DEFAULTS = vars(arguments("unused", 1))
SIZE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def make(folder: Path, model: Any = None, hetero: HeteroConfig | None = None, data: Any = None, **changes: Any) -> Any:
    return HeteroTrainer(
        model or tiny_model(),
        arguments(str(folder), 1, **changes),
        train_dataset=data or samples(LENGTHS),
        hetero=hetero,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 shifts labels"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        ({"ddp_static_graph": True}, "ddp_static_graph=True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches"),
    ],
)
def test_refused_options(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Each option is named with its value."""
    with pytest.raises(UnsupportedModel, match=message):
        make(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"per_device_train_batch_size": 0}, {"per_device_eval_batch_size": -1}, {"gradient_accumulation_steps": 0}],
)
def test_less_than_one(tmp_path: Path, changes: dict[str, int]) -> None:
    """A batch of no samples is refused by its argument's name, before anything is read."""
    [(name, value)] = changes.items()
    with pytest.raises(ConfigError, match=f"^{name}={value}: it must be at least 1"):
        make(tmp_path, **changes)


class OwnMixer(torch.nn.Module):
    """A mixer that nobody knows."""


def with_own_mixers(model: Any) -> Any:
    for block in model.backbone.layers:
        block.mixer = OwnMixer()
    return model


def refused_models() -> dict[str, tuple[Any, str]]:
    gpt2 = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)
    t5 = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    bert = transformers.BertConfig(**SIZE, intermediate_size=48)
    mamba = transformers.Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    moe = transformers.DogeConfig(**SIZE, intermediate_size=48, is_moe=True, num_experts=16, num_experts_per_tok=2)
    moe.output_router_logits = True
    return {
        "dropout": (tiny_model(attention_dropout=0.1), "attention_dropout=0.1"),
        "gpt2 dropout": (transformers.GPT2LMHeadModel(gpt2), "attn_pdrop=0.1"),
        "encoder-decoder": (transformers.T5ForConditionalGeneration(t5), "only decoder-only"),
        "encoder": (transformers.BertForMaskedLM(bert), "only decoder-only"),
        "own state space": (with_own_mixers(transformers.Mamba2ForCausalLM(mamba)), "carry state along a sample"),
        "router loss": (transformers.DogeForCausalLM(moe), "loss of its routers"),
        "z loss": (hybrid_model("bamba", torch.float32, z_loss_coefficient=0.1), "z_loss_coefficient=0.1 adds a mean"),
        "no transformer": (torch.nn.Linear(2, 2), "not a transformers model"),
    }


@pytest.mark.parametrize("name", list(refused_models()))
def test_refused_models(tmp_path: Path, name: str) -> None:
    """Models that no plan can share exactly are refused with the reason."""
    model, message = refused_models()[name]
    with pytest.raises(UnsupportedModel, match=message):
        make(tmp_path, model)


def test_refused_adapter(tmp_path: Path) -> None:
    """Virtual tokens would belong to every sample; LoRA is the remedy named."""
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedModel, match="virtual tokens to every sample; use LoRA"):
        make(tmp_path, model)


def test_all_reasons_at_once(tmp_path: Path) -> None:
    """A user who must change two things hears of both."""
    with pytest.raises(UnsupportedModel) as caught:
        make(tmp_path, label_smoothing_factor=0.1, neftune_noise_alpha=5.0)
    assert "label_smoothing_factor" in str(caught.value)
    assert "neftune_noise_alpha" in str(caught.value)


def refused_arguments(**changes: Any) -> str:
    args: Any = SimpleNamespace(**{**DEFAULTS, **changes})
    args.train_sampling_strategy, args.n_gpu = "random", 0
    with pytest.raises(UnsupportedModel) as caught:
        check_arguments(args)
    return str(caught.value)


def test_other_sharding_is_refused() -> None:
    """The first FSDP and DeepSpeed are refused before anything is built, with the FSDP2 lines to use."""
    assert "FSDP version 1 is not supported; use FSDP2" in refused_arguments(fsdp=True, fsdp_config={"version": 1})
    assert "`distributed_type: FSDP` with `fsdp_config: {fsdp_version: 2}`" in refused_arguments(deepspeed="zero3.json")


@pytest.mark.parametrize(
    ("name", "message"), [("FSDP", "FSDP version 1 is not supported"), ("DEEPSPEED", "DeepSpeed's engine")]
)
def test_sharding_by_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    """So is what an accelerate file asks for."""
    unset = {"fsdp": None, "deepspeed": None}
    assert message not in refused_arguments(**unset, label_smoothing_factor=0.1)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert message in refused_arguments(**unset, label_smoothing_factor=0.1)


def test_fsdp2_by_the_launcher_is_refused_where_it_would_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 in an accelerate file, which on a single process nobody else would miss."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UnsupportedModel, match="FSDP was asked for, and accelerate runs NO here"):
        make(tmp_path)


def test_number_of_ranks(tmp_path: Path) -> None:
    """A run written for 8 ranks does not start on 1 without a word."""
    with pytest.raises(ConfigError, match=r"written for 8 ranks .* has 1"):
        make(tmp_path, hetero=HeteroConfig(num_ranks=8))


def gpt2(**changes: Any) -> Any:
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, **changes)
    return transformers.GPT2LMHeadModel(config)


def test_dropout_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is random by nature is said and allowed."""
    with caplog.at_level(logging.WARNING):
        make(tmp_path, gpt2(resid_pdrop=0.05))
    assert "dropout (p = 0.05, 0.1)" in caplog.text


def test_untested_architectures_are_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a tiny instance shows decides; only what cannot be tried is warned of, and allowed."""
    with caplog.at_level(logging.INFO, logger="hf_hetero"):
        make(tmp_path, gpt2())
        make(tmp_path)
    tried = [record.getMessage() for record in caplog.records if record.name == "hf_hetero.checks.probe"]
    assert tried == ["GPT2LMHeadModel (model type 'gpt2'): a tiny instance learns the same under a plan."]
    bloom = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with caplog.at_level(logging.WARNING, logger="hf_hetero"):
        make(tmp_path, transformers.BloomForCausalLM(bloom))
    assert "ranks cannot share its samples, so each goes over whole ones" in caplog.text
    assert "does not use transformers' attention interface" in caplog.text
    prophet = transformers.ProphetNetConfig(
        vocab_size=97, hidden_size=32, num_decoder_layers=1, num_decoder_attention_heads=4, attention_dropout=0.0
    )
    with pytest.raises(UnsupportedModel, match=r"ProphetNetForCausalLM cannot .* computes a loss of its own"):
        make(tmp_path, transformers.ProphetNetForCausalLM(prophet))


class Doubled(transformers.LlamaForCausalLM):
    """A user's own, with another argument."""

    def __init__(self, config: Any, times: int) -> None:
        super().__init__(config)
        self.times = times


class Averaged(transformers.LlamaForCausalLM):
    """A user's own, in which samples of a batch know of each other."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        if found.loss is not None:
            found.loss = found.loss + 1e-2 * found.logits.square().mean()
        return found


def test_classes_of_users_are_tried(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A subclass of a tested architecture may change anything: it is tried itself, by its own class."""
    config = tiny_model().config
    with pytest.raises(UnsupportedModel, match=r"Averaged cannot .* learns differently when samples are packed"):
        make(tmp_path, Averaged(config))
    with caplog.at_level(logging.WARNING):
        make(tmp_path, Doubled(config, 2))
    assert "Doubled (model type 'llama') is not among those tested" in caplog.text
    assert "missing 1 required positional argument: 'times'" in caplog.text
