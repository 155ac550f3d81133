"""This module reads the rows to fine-tune on from where they are: files, a saved folder, or the hub."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_hetero.errors import HeteroError

if TYPE_CHECKING:
    import datasets

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


def load_rows(source: str, config: str | None, split: str) -> datasets.Dataset:
    """Load a dataset as it is found; a .txt file is one row.

    Args:
        source: files, by a pattern; a folder that `save_to_disk` has written; or a name on the hub.
        config: of a dataset on the hub.
        split: of a dataset that has any.

    Raises:
        HeteroError: no such file or split. Others are those of `datasets`.
    """
    import datasets

    path = Path(source)
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        found: Any = datasets.load_from_disk(source)
        if not isinstance(found, dict):
            return found
        if split not in found:
            raise HeteroError(f"dataset_split={split!r}: {source!r} has only {', '.join(found)}.")
        return found[split]
    loaded: Any = datasets.load_dataset
    if (file_format := FILE_FORMATS.get(path.suffix)) is not None:
        if not (files := sorted(glob.glob(source))):
            raise HeteroError(f"dataset={source!r}: there is no such file.")
        options = {"sample_by": "document"} if file_format == "text" else {}
        return loaded(file_format, data_files=files, split="train", **options)
    return loaded(source, config, split=split)
