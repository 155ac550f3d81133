"""Letters in shapes mean one thing in all of `attention/`, and are explained once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hf_hetero.attention

FOLDER = Path(hf_hetero.attention.__file__).parent
SPELLED_OUT = {"num_heads", "num_kv_heads", "head_dim", "value_dim", "num_q", "num_k", "num_tokens", "local_tokens"}
SHAPE = re.compile(r"\(([^()]*,[^()]*)\)")


def letters(legend: str, row: str) -> set[str]:
    """The letters that start the rows of a legend."""
    return {letter for found in re.findall(row, legend, re.MULTILINE) for letter in re.findall(r"\w+", found)}


def docstrings(text: str) -> Iterator[str]:
    """Every string that stands for itself: docstrings, and those after a constant."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def unexplained(text: str, legend: set[str]) -> list[str]:
    """Shapes in docstrings with a letter, or a size in words, that the legend does not have."""
    wrong: list[str] = []
    for docstring in docstrings(text):
        for shape in SHAPE.findall(docstring):
            words = set(re.findall(r"[A-Za-z_]+", shape))
            is_shape = words & (legend | SPELLED_OUT) or re.fullmatch(r"[A-Z]\w?(, [A-Z]\w?)+", shape)
            if is_shape and not words <= legend:
                wrong.append(shape)
    return wrong


LEGEND = letters(hf_hetero.attention.__doc__ or "", r"^    (\w+(?:, \w+)?) {2,}")


def test_there_is_one_legend() -> None:
    """The package's docstring and its README explain the same letters."""
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {"T", "t", "Tq", "Tk", "H", "Hk", "D", "Dv"} <= LEGEND
    assert letters(readme.split("## Letters in shapes")[1].split("## ")[0], r"^\| (`.*?`) \|") == LEGEND


def test_shapes_use_its_letters() -> None:
    """No shape in a docstring has another letter, or spells a size out."""
    for path in FOLDER.rglob("*.py"):
        assert not unexplained(path.read_text(encoding="utf-8"), LEGEND), path


def test_other_letters_are_noticed() -> None:
    """A shape with a letter of its own, and one in words, are told from tuples of other things."""
    for docstring, wrong in (
        ("shape (t, X, D)", ["t, X, D"]),
        ("(num_tokens, H)", ["num_tokens, H"]),
        ("(Q, N)", ["Q, N"]),
        ("(q, k, v, segments) -> (Tq, H, D), shape (1, H, n, D), (..., Tk, H / Hk)", []),
    ):
        assert unexplained(f'"""{docstring}"""', LEGEND) == wrong
