"""This module makes the model that is timed: whole, or of a few layers, by its config and with random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, TrainingArguments

from hf_hetero.config import HeteroConfig
from hf_hetero.errors import ConfigError
from hf_hetero.fine_tuning import explaining

MOST_LAYERS = 4
"""A model of more times its pattern of layers is timed at two depths instead."""
DEPTHS = (1, 3)
"""Patterns of layers at these depths: their difference is what two patterns take."""
OURS = {
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "resume_from_checkpoint",
    "full_determinism",
    "enable_jit_checkpoint",
    "learning_rate",
    "report_to",
}
"""Arguments of a recipe that timing has its own of."""
RUNS = {"global_batch_size", "auto_resume"}
"""Settings of how a run is dealt out and goes on, which timing does not."""


def _no_settings() -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Subject:
    """A `Subject` is a model, and how it is trained.

    Args:
        name: as it was given.
        config: of the whole model.
        dtype: of its weights, by torch's name.
        lora_r: rank of LoRA adapters; None: all weights train.
        lora_targets: modules with adapters; None: all linear ones.
        arguments: fields of `TrainingArguments`.
        hetero: fields of `HeteroConfig`.
        max_length: most tokens of a sample; None: as many as the model has positions.
    """

    name: str
    config: PretrainedConfig
    dtype: str = "float32"
    lora_r: int | None = None
    lora_targets: list[str] | None = None
    arguments: Mapping[str, Any] = field(default_factory=_no_settings)
    hetero: Mapping[str, Any] = field(default_factory=_no_settings)
    max_length: int | None = None

    @property
    def num_layers(self) -> int:
        """Count the layers of the whole model."""
        return self.config.get_text_config(decoder=True).num_hidden_layers

    def depths(self) -> tuple[int, ...]:
        """Return the layers of the models to time: the whole, if it is small, or two parts of it."""
        pattern = _pattern(self.config.get_text_config(decoder=True))
        if self.num_layers <= MOST_LAYERS * pattern:
            return (self.num_layers,)
        return tuple(depth * pattern for depth in DEPTHS)

    def build(self, num_layers: int, device: str = "cpu") -> Any:
        """Build the model of so many layers; on "meta" it has no weights, so that any number will do.

        Raises:
            ConfigError: transformers, or peft, cannot.
        """
        config = of_depth(self.config, num_layers)
        with explaining(f"Cannot build {self.name!r}"), torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
            if self.lora_r is None:
                return model
            from peft import LoraConfig, get_peft_model

            targets = self.lora_targets or "all-linear"
            return get_peft_model(model, LoraConfig(r=self.lora_r, target_modules=targets, task_type="CAUSAL_LM"))


def subject_named(name: str) -> Subject:
    """Find a model by its name on the hub, its folder, its config file, or a recipe (`recipes/*/train.yaml`).

    Raises:
        ConfigError: there is no such model, or the recipe names none.
    """
    if not name.endswith((".yaml", ".yml")):
        return Subject(name, _config_of(name))
    with explaining(f"Cannot read {name}"):
        values: Any = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not (values.get("model") or values.get("model_config")):
        raise ConfigError(f"{name} names no `model`, and has no `model_config`.")
    settings: dict[str, Any] = values
    if settings.get("model"):
        config = _config_of(settings["model"])
    else:
        with explaining(f"Cannot make the model of {name}"):
            # a tokenizer that the recipe makes has so many entries
            made = {"vocab_size": settings.get("vocab_size", 4096)} if settings.get("tokenizer") == "train" else {}
            config = AutoConfig.for_model(**{**made, **settings["model_config"]})
    known = {item.name for item in fields(TrainingArguments)} - OURS
    planned = {item.name for item in fields(HeteroConfig)} - {"num_ranks", "cost_model", "calibrate"} - RUNS
    return Subject(
        name,
        config,
        dtype=settings.get("dtype", "float32"),
        lora_r=settings.get("lora_r"),
        lora_targets=settings.get("lora_target_modules"),
        arguments={key: value for key, value in settings.items() if key in known},
        hetero={key: value for key, value in settings.items() if key in planned},
        max_length=settings.get("max_length"),
    )


def of_depth(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Return the config of the same model with its first layers only; the given one stays as it is."""
    changed = copy.deepcopy(config)
    text: Any = changed.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:  # what is said of each layer
            setattr(text, key, value[:num_layers])
    text.num_hidden_layers = num_layers
    return changed


def _pattern(config: Any) -> int:
    """Return after how many layers their kinds repeat; all of them, where they do not."""
    whole = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * whole
    for period in range(1, whole + 1):
        if all(kind == kinds[number % period] for number, kind in enumerate(kinds)):
            return period
    return whole


def _config_of(name: str) -> PretrainedConfig:
    with explaining(f"Cannot read a config from {name!r}"):
        # said outright, because transformers would ask at the terminal
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
