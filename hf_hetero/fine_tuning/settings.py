"""This module fills the dataclasses of a script's settings from a YAML file and the command line, and checks them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import formatannotation
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_hetero.errors import HeteroError


def parse_settings(argv: Sequence[str], kinds: Sequence[type], script: str) -> tuple[Any, ...]:
    """Make one instance of each dataclass: fields from the YAML file after `--config`, then from the command line.

    Args:
        argv: the command line, without the script's name.
        kinds: dataclasses; one of them has a field `config`.
        script: for error messages, which name its `--help`.

    Raises:
        HeteroError: a file that cannot be read, a value of another type, or a key that no dataclass has, with the one
            that was probably meant.
    """

    def refuse(message: str) -> NoReturn:
        raise HeteroError(f"{message.rstrip('.')}. `python {script} --help` says what can be.")

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    parser: Any = HfArgumentParser(tuple(kinds), allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parser.error = refuse  # in place of argparse's page of usage
    known = set(vars(parser.parse_args([]))) - {"config"}
    if path:
        with explaining(f"Cannot read {path}"):
            values: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise HeteroError(f"{path} holds {values!r:.60}; it must hold lines of `key: value`.")
        _refuse_unknown(path, values, known, script)
        parser.set_defaults(**values)  # so that the command line, parsed last, has the last word
    with explaining("These settings cannot be"):
        *parsed, unknown = parser.parse_args_into_dataclasses(list(argv), True, look_for_args_file=False)
    _refuse_unknown("the command line", [word.lstrip("-").split("=")[0] for word in unknown], known, script)
    return tuple(parsed)


def check_fields(settings: Any) -> None:
    """Refuse a field of another type than declared, which a YAML file may hold, or a whole number below 1.

    Raises:
        HeteroError: it names the field, its value, and what that must be.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, kind):
            raise HeteroError(f"{name}={value!r:.60}: it must be {formatannotation(kind)}.")
        if type(value) is int and value < 1:
            raise HeteroError(f"{name}={value}: it must be at least 1.")


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Say in one line what failed within: files, libraries and the hub raise errors of many kinds."""
    try:
        yield
    except HeteroError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise HeteroError(f"{what}: {type(error).__name__}: {message:.300}") from error


def _fits(value: object, kind: Any) -> bool:
    """Tell whether a value is of an annotated type; True is no int here, as it is for `isinstance`."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    return any(_fits(value, one) for one in get_args(kind)) if get_args(kind) else type(value) is kind


def _refuse_unknown(where: str, keys: Iterable[str], known: set[str], script: str) -> None:
    """Refuse the first key that is not known; name where it stands and the nearest one that is."""
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise HeteroError(f"{where}: unknown key {key!r}.{hint} `python {script} --help` lists them all.")
