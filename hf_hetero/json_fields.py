"""Fields of a dataclass from JSON, strictly: what a file gets wrong is named, not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from hf_hetero.errors import ConfigError


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
            raise ConfigError(f"{where}: {item.name} is {value!r}; it must be an object, degree -> number.")
        entries: Mapping[object, object] = value
        return {_degree(item, degree, where): _number(item, number, where) for degree, number in entries.items()}
    if kind.startswith("float"):
        return _number(item, value, where)
    if kind.startswith("int"):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{where}: {item.name} is {value!r}; it must be a positive whole number.")
    elif not isinstance(value, str):
        raise ConfigError(f"{where}: {item.name} is {value!r}; it must be text.")
    return value


def _number(item: Field[Any], value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {item.name} is {value!r}; it must be a number.")
    try:
        float(value)
    except OverflowError:  # a whole number may have any size
        raise ConfigError(f"{where}: {item.name} is {str(value)[:12]}...; that is too large.") from None
    return value


def _degree(item: Field[Any], value: object, where: str) -> int:
    if not (isinstance(value, str) and value.isdecimal() and str(int(value)) == value):
        raise ConfigError(f"{where}: {item.name} has the degree {value!r}; a degree is a positive whole number.")
    return int(value)
