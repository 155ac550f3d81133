"""hf_hetero is a Hugging Face Trainer that chooses, every step, how many ranks share each sample.

Names are imported when first used, so that planning and the command line need no torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("hf-hetero")
except PackageNotFoundError:  # sources that were never installed
    __version__ = "0+unknown"

# Torch reads this where the first process group is made, which is before any trainer. Left at torch's own value, a step
# that was repeated ends the process minutes later (`hf_hetero.ranks.breaking`). A script's own value stands; and where
# there is a group, it is too late.
_distributed = sys.modules.get("torch.distributed")
if _distributed is None or not (_distributed.is_available() and _distributed.is_initialized()):
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")

if TYPE_CHECKING:
    from hf_hetero.config import HeteroConfig
    from hf_hetero.costs import CostModel
    from hf_hetero.errors import HeteroError, InfeasibleBatch, UnsupportedModel
    from hf_hetero.plan import Group, MicroBatch, Plan
    from hf_hetero.planner import Planner
    from hf_hetero.topology import Topology
    from hf_hetero.trainer import HeteroTrainer, HeteroTrainerMixin
    from hf_hetero.trainer.embeddings.embedding import HeteroEmbeddingTrainer
    from hf_hetero.trainer.pairs.dpo import HeteroDPOTrainer
    from hf_hetero.trainer.pairs.kto import HeteroKTOTrainer
    from hf_hetero.trainer.pairs.reward import HeteroRewardTrainer
    from hf_hetero.trainer.pairs.without_reference import HeteroCPOTrainer, HeteroORPOTrainer
    from hf_hetero.trainer.sft import HeteroSFTTrainer

__all__ = [
    "CostModel",
    "Group",
    "HeteroCPOTrainer",
    "HeteroConfig",
    "HeteroDPOTrainer",
    "HeteroEmbeddingTrainer",
    "HeteroError",
    "HeteroKTOTrainer",
    "HeteroORPOTrainer",
    "HeteroRewardTrainer",
    "HeteroSFTTrainer",
    "HeteroTrainer",
    "HeteroTrainerMixin",
    "InfeasibleBatch",
    "MicroBatch",
    "Plan",
    "Planner",
    "Topology",
    "UnsupportedModel",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    homes = {
        "HeteroConfig": "config",
        "CostModel": "costs",
        "HeteroError": "errors",
        "InfeasibleBatch": "errors",
        "UnsupportedModel": "errors",
        "Group": "plan",
        "MicroBatch": "plan",
        "Plan": "plan",
        "Planner": "planner",
        "Topology": "topology",
        "HeteroCPOTrainer": "trainer.pairs.without_reference",
        "HeteroDPOTrainer": "trainer.pairs.dpo",
        "HeteroKTOTrainer": "trainer.pairs.kto",
        "HeteroORPOTrainer": "trainer.pairs.without_reference",
        "HeteroEmbeddingTrainer": "trainer.embeddings.embedding",
        "HeteroRewardTrainer": "trainer.pairs.reward",
        "HeteroSFTTrainer": "trainer.sft",
        "HeteroTrainer": "trainer",
        "HeteroTrainerMixin": "trainer",
    }
    if name not in homes:
        raise AttributeError(f"module 'hf_hetero' has no attribute {name!r}")
    return getattr(import_module(f"hf_hetero.{homes[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, too, that are not imported yet."""
    return sorted({*globals(), *__all__})
