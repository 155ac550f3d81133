"""A checkpoint keeps the cost model that its plans were made by, so that a run that goes on from it plans as before."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from hf_hetero.costs import CostModel

KEPT_COST_MODEL = "hetero_cost_model.json"
"""The cost model that a checkpoint's plans were made by."""


class Kept(NamedTuple):
    """A `Kept` is what a checkpoint says about its cost model.

    Args:
        cost_model: of its last step.
        given: digest of the user's file that it was, or was refitted from; None: the user gave none.
    """

    cost_model: CostModel
    given: str | None


def digest_of(cost: CostModel) -> str:
    """Return a fingerprint by which a cost model of the user is known again, whatever its file is called."""
    return hashlib.sha256(json.dumps(cost.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def keep_cost_model(folder: Path, cost: CostModel, num_ranks: int, given: str | None = None, replicas: int = 1) -> None:
    """Put a cost model into a checkpoint, with the ranks and replicas it is for, and the digest of the user's file."""
    data = {**cost.to_dict(), "num_ranks": num_ranks, "given": given, "replicas": replicas}
    (folder / KEPT_COST_MODEL).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def kept_cost_model(checkpoint: str | None, num_ranks: int, replicas: int = 1) -> Kept | None:
    """Read the cost model of a checkpoint; None if it has none, or was made on other numbers of ranks or replicas."""
    if checkpoint is None or not (path := Path(checkpoint) / KEPT_COST_MODEL).is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    if (data.get("num_ranks"), data.get("replicas", 1)) != (num_ranks, replicas):
        return None
    return Kept(CostModel.from_dict(data, where=str(path)), data.get("given"))
