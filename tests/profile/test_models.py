"""What is profiled is what a name, a config file or a recipe says, whole or of its first layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from helpers import FAMILIES, TINY

from hf_hetero.errors import HeteroError
from hf_hetero.estimate.model_shape import shape_of
from hf_hetero.profile.models import of_depth, subject_named

ROOT = Path(__file__).parents[2]


def config_in(folder: Path, family: str, **changes: object) -> str:
    name, special = FAMILIES[family]
    getattr(transformers, f"{name}Config")(**{**TINY, **special, **changes}).save_pretrained(folder)
    return str(folder)


def test_a_recipe(tmp_path: Path) -> None:
    """The quickstart's model, and how it is trained, without what belongs to the run; other recipes name theirs."""
    subject = subject_named(str(ROOT / "recipes" / "quickstart_cpu" / "train.yaml"))
    assert (subject.num_layers, subject.depths(), subject.max_length) == (1, (1,), 8192)
    assert subject.config.vocab_size == 4096
    assert subject.hetero == {"max_tokens_per_rank": 6144}
    assert subject.arguments["use_cpu"] is True
    assert not {"max_steps", "output_dir", "num_ranks"} & set(subject.arguments)
    (tmp_path / "empty.yaml").write_text("dtype: float32\n")
    with pytest.raises(HeteroError, match="names no `model`"):
        subject_named(str(tmp_path / "empty.yaml"))
    with pytest.raises(HeteroError, match="nowhere"):
        subject_named(str(tmp_path / "nowhere"))


def test_a_deep_model_is_timed_in_parts(tmp_path: Path) -> None:
    """A model of many layers is timed at two depths, of whole patterns of its kinds of layers."""
    assert subject_named(config_in(tmp_path / "a", "llama", num_hidden_layers=40)).depths() == (1, 3)
    kinds = ["sliding_attention", "full_attention"] * 20
    name = config_in(tmp_path / "b", "gemma2", num_hidden_layers=40, layer_types=kinds)
    subject = subject_named(name)
    assert subject.depths() == (2, 6)
    part = of_depth(subject.config, 6)
    assert part.layer_types == kinds[:6]
    assert subject.config.layer_types == kinds  # the given one stays as it is
    model = subject.build(6, "meta")
    assert model.config.num_hidden_layers == 6
    assert len(model.model.layers) == 6


def test_adapters(tmp_path: Path) -> None:
    """With LoRA few weights train, in the whole model as in a part of it."""
    pytest.importorskip("peft")
    from dataclasses import replace

    subject = replace(subject_named(config_in(tmp_path, "llama")), lora_r=4)
    model = subject.build(2, "meta")
    shape = shape_of(model, subject.config, element_bytes=4, checkpointing=False)
    assert 0 < shape.trainable_params < shape.num_params / 5
