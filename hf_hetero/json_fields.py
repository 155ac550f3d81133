"""Fields of a dataclass from JSON, strictly: what a file gets wrong is named, not guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from hf_hetero.errors import ConfigError

MOST_COUNTED = 1 << 40
MOST_DIGITS = 12
"""Of a degree: more are none that a run can have, and Python reads no number of thousands."""


def read_field(item: Field[Any], value: object, where: str) -> Any:
    """A field's value from JSON, refused unless its kind is the one declared: "1" and true are no numbers.

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
            raise ConfigError(f"{where}: {item.name} is {value!r:.60}; it must be an object, degree -> number.")
        entries: Mapping[object, object] = value
        return {
            _degree(item, degree, where): number_of(number, f"{where}: {item.name}")
            for degree, number in entries.items()
        }
    if kind.startswith("float"):
        return number_of(value, f"{where}: {item.name}")
    if kind.startswith("int"):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_COUNTED:
            raise ConfigError(f"{where}: {item.name} is {value!r:.60}; it must be a positive whole number.")
    elif not isinstance(value, str):
        raise ConfigError(f"{where}: {item.name} is {value!r:.60}; it must be text.")
    return value


def number_of(value: object, name: str) -> float:
    """A number from JSON, where whole ones may have any size.

    Raises:
        ConfigError: anything else, or a number that is too large to compute with.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r:.60}; it must be a number.")
    try:
        float(value)
    except OverflowError:
        raise ConfigError(f"{name} is {str(value)[:12]}...; that is too large.") from None
    return value


def parsed(text: str) -> Any:
    """JSON, each of whose objects has a field once.

    Raises:
        ValueError: it is none, it is nested too deep to be read, or a field stands there twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the field {name!r:.60} stands there twice")
        found[name] = value
    return found


def _degree(item: Field[Any], value: object, where: str) -> int:
    if not isinstance(value, str) or not (value.isdecimal() and len(value) <= MOST_DIGITS and str(int(value)) == value):
        raise ConfigError(f"{where}: {item.name} has the degree {value!r:.60}; a degree is a positive whole number.")
    return int(value)
