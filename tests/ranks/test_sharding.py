"""What accelerate will do with a trainer's model is read from its arguments, whatever release names them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hf_hetero.ranks.sharding import sharding_of


def trainer(**arguments: Any) -> Any:
    """A trainer without a wrapper, whose release of transformers knows these arguments."""
    return SimpleNamespace(
        args=SimpleNamespace(**arguments), accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=None))
    )


@pytest.mark.parametrize("recomputes", [True, False])
def test_recomputed_layers_by_either_name(recomputes: bool) -> None:
    """Older releases have only `gradient_checkpointing`, where it is a later one's alias the new name counts."""
    old = trainer(gradient_checkpointing=recomputes)
    new = trainer(gradient_checkpointing=None, activation_checkpointing=recomputes)
    assert sharding_of(old, None).checkpointing is recomputes
    assert sharding_of(new, None).checkpointing is recomputes
