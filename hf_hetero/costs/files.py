"""This module reads and writes cost models as JSON files (hf-hetero-cost/1): what is wrong is named, not guessed.

`CostModel.load`, `save`, `from_dict` and `to_dict` are the doors; the files beside this one come with the package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from hf_hetero.costs.activation_policy import ActivationPolicy
from hf_hetero.errors import ConfigError

COST_FORMAT = "hf-hetero-cost/1"
SHIPPED_FOLDER = Path(__file__).parent
MOST_COUNTED = 1 << 40
MOST_DIGITS = 12
"""Digits of a degree, at most: no run has more, and Python refuses to read a number of thousands of digits."""
BY_RANK = {"rank_speeds", "link_speeds"}
BY_NUMBER = {"all_to_all_bytes_per_s", "all_to_all_latency_s", "state_s_per_token", *BY_RANK}
"""Fields that map degrees, or ranks, to numbers."""
LEFT_OUT = {"activation_policies", "state_s_per_token", *BY_RANK}
"""Fields that a file lacks where they say nothing."""


def shipped_names() -> tuple[str, ...]:
    """List the cost models that come with the package; `hf-hetero costs` says what they are."""
    return tuple(sorted(file.stem for file in SHIPPED_FOLDER.glob("*.json")))


def read_json(path: str | Path) -> Any:
    """Read a JSON file, or the shipped cost model of this name.

    Raises:
        ConfigError: no such file or name, or not JSON.
    """
    file = SHIPPED_FOLDER / f"{path}.json" if str(path) in shipped_names() else Path(path)
    try:
        return parsed(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"Cannot read the cost model {str(path)!r}: {error.strerror}. "
            f"Name a file, or one of {', '.join(shipped_names())}."
        ) from error
    except ValueError as error:  # bytes that are no text, or text that is no JSON
        raise ConfigError(f"{path} is not JSON: {error}.") from error


def write_json(data: Mapping[str, Any], path: str | Path) -> None:
    """Write a JSON file that `read_json` reads: whole, or not at all.

    Raises:
        OSError: it cannot be written; what was there still is.
    """
    file = Path(path).resolve()  # what a link names is written, not the link
    text = json.dumps(data, indent=1) + "\n"
    if file.exists() and not file.is_file():  # a pipe or a terminal, which nothing can take the place of
        file.write_text(text, encoding="utf-8")
        return
    # named by the process, beside the file: a rename within a folder is one operation
    written = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        written.write_text(text, encoding="utf-8")
        written.replace(file)
    finally:
        written.unlink(missing_ok=True)


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cost model's values ready for JSON: degrees and ranks as text, without what is None or says nothing.

    Args:
        values: of each field of `CostModel`, by name; policies as mappings of their own fields.
    """
    data: dict[str, Any] = {"format": COST_FORMAT}
    for name, value in values.items():
        if value is None or (name in LEFT_OUT and not value):
            continue
        data[name] = {str(number): of for number, of in value.items()} if name in BY_NUMBER else value
    return data


def values_of(declared: Sequence[Field[Any]], data: object, where: str) -> dict[str, Any]:
    """Read the values of a cost model's fields, by name; what `declared` does not name is left aside.

    Args:
        declared: fields of `CostModel`.
        data: what a file holds.
        where: the file, for messages.

    Raises:
        ConfigError: another format, a missing field, or a value of the wrong kind.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} holds a {type(data).__name__}; a cost model is a JSON object.")
    entries: Mapping[object, object] = data
    if entries.get("format") != COST_FORMAT:
        raise ConfigError(f"{where}: format {entries.get('format')!r:.60} is unknown; expected {COST_FORMAT!r}.")
    values: dict[str, Any] = {}
    for item in declared:
        if item.name not in entries:
            continue
        value = entries[item.name]
        is_policies = item.name == "activation_policies"
        values[item.name] = read_policies(value, where) if is_policies else read_field(item, value, where)
    needed = {item.name for item in declared if item.default is MISSING and item.default_factory is MISSING}
    if missing := sorted(needed - set(values)):
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return values


def read_policies(value: object, where: str) -> dict[str, ActivationPolicy]:
    """Read the policies of a cost model's JSON, by name.

    Raises:
        ConfigError: not an object of objects, or a field that is missing or no number.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: activation_policies is {value!r:.60}; it must be an object, name -> policy.")
    entries: Mapping[object, object] = value
    policies: dict[str, ActivationPolicy] = {}
    for name, entry in entries.items():
        place = f"{where}: activation_policies.{name!s:.60}"
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{place} is {entry!r:.60}; it must be an object.")
        data: Mapping[object, object] = entry
        numbers: dict[str, float] = {}
        for item in fields(ActivationPolicy):
            if item.name in data:
                numbers[item.name] = number_of(data[item.name], f"{place}.{item.name}")
        try:
            policies[str(name)] = ActivationPolicy(**numbers)
        except (TypeError, ConfigError) as error:  # a field that is missing, or out of range
            raise ConfigError(f"{place}: {error}") from error
    return policies


def read_field(item: Field[Any], value: object, where: str) -> Any:
    """Return a field's value from JSON, and refuse one of another kind than declared: "1" and true are no numbers.

    Args:
        item: the field; its annotation is a string, and one of float, int, str, Mapping[int, float], or one or None.
        value: what the file holds.
        where: the file, for messages.

    Raises:
        ConfigError: another kind.
    """
    kind = str(item.type)
    if value is None and kind.endswith("None"):
        return None
    if kind.startswith("Mapping"):
        if not isinstance(value, Mapping):
            kind = "rank" if item.name in BY_RANK else "degree"
            raise ConfigError(f"{where}: {item.name} is {value!r:.60}; it must be an object, {kind} -> number.")
        entries: Mapping[object, object] = value
        return {_key(item, key, where): number_of(number, f"{where}: {item.name}") for key, number in entries.items()}
    if kind.startswith("float"):
        return number_of(value, f"{where}: {item.name}")
    if kind.startswith("int"):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_COUNTED:
            raise ConfigError(f"{where}: {item.name} is {value!r:.60}; it must be a positive whole number.")
    elif not isinstance(value, str):
        raise ConfigError(f"{where}: {item.name} is {value!r:.60}; it must be text.")
    return value


def number_of(value: object, name: str) -> float:
    """Return a number from JSON, where whole ones may have any size, and refuse what cannot be computed with.

    Raises:
        ConfigError: anything else, or a number that is too large to compute with.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r:.60}; it must be a number.")
    try:
        float(value)  # tried only: a whole number stays one, so that a file is written as it was read
    except OverflowError:
        raise ConfigError(f"{name} is {str(value)[:12]}...; that is too large.") from None
    return value


def parsed(text: str) -> Any:
    """Parse JSON, each of whose objects has a field once.

    Raises:
        ValueError: the text is no JSON, it is nested too deep to be read, or a field stands there twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with a field twice: `json` would take the last one in silence."""
    by_name: dict[str, Any] = {}
    for name, value in pairs:
        if name in by_name:
            raise ValueError(f"the field {name!r:.60} stands there twice")
        by_name[name] = value
    return by_name


def _key(item: Field[Any], value: object, where: str) -> int:
    """Read a degree, or a rank, which as the name of a JSON field is text."""
    # in one spelling only, so that "08" and "8" are not the same degree twice
    if isinstance(value, str) and value.isdecimal() and len(value) <= MOST_DIGITS and str(int(value)) == value:
        return int(value)
    what = "the rank" if item.name in BY_RANK else "the degree"
    kind = "rank is a whole number from 0 on" if item.name in BY_RANK else "degree is a positive whole number"
    raise ConfigError(f"{where}: {item.name} has {what} {value!r:.60}; a {kind}.")
