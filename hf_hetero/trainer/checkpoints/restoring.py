"""The methods of `Trainer` that read weights back: as the names in a checkpoint have it, not only as the model's.

transformers saves many models under the names, and in the shapes, of their release (experts one by one, Gemma 3's text
under `language_model.model`), and `from_pretrained` puts them together again. Trainer's own way back looks for the
model's names alone: of such a model it leaves out what it does not find, and training goes on from other weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_hetero.errors import ConfigError

logger = logging.getLogger(__name__)


class RestoresWeights(Trainer):
    """`RestoresWeights` reads back all weights of a checkpoint, whatever transformers saves them as, or says so."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load as Trainer does, from a checkpoint that training goes on from."""
        folder, target = Path(resume_from_checkpoint), self.model if model is None else model
        if self.is_fsdp_enabled or not is_saved_otherwise(target, folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore(target, folder)

    def _load_best_model(self) -> None:
        """Load as Trainer does, from the best checkpoint."""
        folder = Path(self.state.best_model_checkpoint or "")
        if self.is_fsdp_enabled or not is_saved_otherwise(self.model, folder):
            super()._load_best_model()
        else:
            logger.info("Loading the best model from %s (score: %s).", folder, self.state.best_metric)
            restore(self.model, folder)


def is_saved_otherwise(model: Any, folder: Path) -> bool:
    """Tell whether a checkpoint has a model's weights under names, or in shapes, that are not the model's.

    Args:
        model: whole, on this rank.
        folder: of the checkpoint; one that has adapters, or the shards of FSDP, has no whole weights.
    """
    if not isinstance(model, PreTrainedModel) or not _files_of(folder):
        return False
    on_meta = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    saved = revert_weight_conversion(model, dict(on_meta))
    return saved.keys() != on_meta.keys() or any(saved[name] is not tensor for name, tensor in on_meta.items())


def restore(model: Any, folder: Path) -> None:
    """Give a model the weights of a checkpoint, as `from_pretrained` reads them, in the place of its own.

    Args:
        model: of transformers, whole, on this rank. Its tensors stay the same ones.
        folder: of the checkpoint, in safetensors.

    Raises:
        ConfigError: the checkpoint lacks weights of the model.
    """
    own: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    # reading may draw random numbers for what it does not find, and training has its own
    with torch.random.fork_rng(devices=[]):
        read, report = type(model).from_pretrained(
            folder, config=model.config, dtype=_widest(own.values()), output_loading_info=True
        )
    not_found = set(report["missing_keys"])
    values = {name: value for name, value in read.state_dict().items() if name in own and name not in not_found}
    # what was added to the model is saved under its own name
    values |= _named(folder, own.keys() - values.keys())
    if missing := _missing(model, own, values):
        raise ConfigError(
            f"{folder} has no weights for {_brief(missing)} of {type(model).__name__}: training would go on from what "
            "they are by chance. Resume with the model that was saved, or begin a new run with the checkpoint's "
            "weights (from_pretrained)."
        )
    model.load_state_dict(values, strict=False)


def _widest(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the floating type that holds each of these tensors as it is."""
    types = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
    return next(iter(types)) if len(types) == 1 else torch.float64 if torch.float64 in types else torch.float32


def _missing(model: Any, own: Mapping[str, torch.Tensor], values: Mapping[str, object]) -> list[str]:
    """Return the names of tensors that have no value: under none of their names, and though they are saved."""
    valued = {id(own[name]) for name in values}
    unsaved: Any = model._keys_to_ignore_on_save or ()
    return sorted(name for name, tensor in own.items() if id(tensor) not in valued and name not in unsaved)


def _named(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return those tensors of a checkpoint that it has under these names."""
    wanted, found = set(names), dict[str, torch.Tensor]()
    file: Any
    for path in _files_of(folder) if wanted else ():
        with safe_open(path, framework="pt", device="cpu") as file:
            found |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    return found


def _files_of(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that hold the weights of a whole model, in safetensors."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return []
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return sorted({folder / name for name in index["weight_map"].values()})


def _brief(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 3 else shown
