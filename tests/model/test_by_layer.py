"""What differs by layer is read of each layer, where a config refuses to say it of all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers import TINY
from transformers import LlamaConfig, MistralConfig

from hf_hetero.attention.kernels.choice import features_of
from hf_hetero.attention.kernels.contract import WINDOW
from hf_hetero.model.by_layer import fewest, of_layer, sizes_of, stated


def test_layers_that_differ() -> None:
    """A config whose layers differ raises when it is asked for all; here each layer says its own."""
    config = LlamaConfig(**TINY, per_layer_config={1: {"num_key_value_heads": 1}})
    with pytest.raises(RuntimeError, match="per-layer"):
        getattr(config, "num_key_value_heads", None)
    assert sizes_of(config, "num_key_value_heads") == [2, 1]
    assert fewest(config, "num_key_value_heads", 8) == 1
    assert [of_layer(config, number).num_key_value_heads for number in range(2)] == [2, 1]


def test_windows_that_differ() -> None:
    """A kernel is asked for a window where any layer has one."""
    config = MistralConfig(**TINY, sliding_window=None, per_layer_config={1: {"sliding_window": 8}})
    assert features_of(config) == {WINDOW}
    assert not features_of(MistralConfig(**TINY, sliding_window=None))


def test_layers_that_are_alike() -> None:
    """One size stands for all; none, 0 and lists are as the config says."""
    config = LlamaConfig(**TINY)
    assert sizes_of(config, "num_attention_heads") == [4]
    assert of_layer(config, 1) is config
    assert stated(config, "no_such_field") == [None]
    assert sizes_of(config, "no_such_field") == []
    assert fewest(config, "no_such_field", 8) == 8
    assert fewest(SimpleNamespace(heads=0), "heads", 8) == 8
    assert sizes_of(SimpleNamespace(heads=[4, 2]), "heads") == [4, 2]
