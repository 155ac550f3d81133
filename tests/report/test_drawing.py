"""Files are what their names say; the same figure gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_hetero.errors import HeteroError
from hf_hetero.report.drawing import new_figure, picture_format, rendered, short, write_picture


@pytest.mark.parametrize(("tokens", "words"), [(7, "7"), (1023, "1023"), (1536, "1.5K"), (196608, "192K")])
def test_short(tokens: int, words: str) -> None:
    """Thousands are of 1024, as context lengths are spoken of."""
    assert short(tokens) == words


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_files(tmp_path: Path, suffix: str, start: bytes) -> None:
    """A .png is one, a .svg is one, and they depend on nothing but the figure: no date, no random ids."""
    write_picture(lambda: new_figure(2, 1)[0], tmp_path / f"a.{suffix}")
    written = (tmp_path / f"a.{suffix}").read_bytes()
    assert written.startswith(start)
    assert written == rendered(lambda: new_figure(2, 1)[0], suffix)
    assert written != rendered(lambda: new_figure(3, 1)[0], suffix)


def test_another_kind_of_file(tmp_path: Path) -> None:
    """Any other suffix, and a folder that is not there, are refused before anything is drawn."""
    with pytest.raises(HeteroError, match=r"a\.pdf: pictures are drawn as \.png or \.svg"):
        write_picture(lambda: new_figure(2, 1)[0], tmp_path / "a.pdf")
    assert not (tmp_path / "a.pdf").exists()
    with pytest.raises(HeteroError, match=r"there is no folder .*absent"):
        picture_format(tmp_path / "absent" / "a.svg")
    assert picture_format(tmp_path / "a.svg") == "svg"
