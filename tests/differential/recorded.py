"""Reads the recorded messages beside it: a few ``name: value`` lines, an empty one, the wire.

A wire is text in which each byte that does not show is written as in a Python literal; a line's own
end says nothing, so that what looks like one line of HTTP is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Recorded(NamedTuple):
    """One recorded message: ``about`` it, and the bytes."""

    name: str
    about: dict[str, str]
    wire: bytes


def read(path: Path) -> Recorded:
    """Read one file."""
    head, _, text = path.read_text("ascii").partition("\n\n")
    about = dict(line.split(": ", 1) for line in head.splitlines())
    wire = text.replace("\n", "").encode("ascii").decode("unicode_escape").encode("latin-1")
    return Recorded(path.stem, about, wire)


def load(folder: str) -> list[Recorded]:
    """Read every file of a folder, by name."""
    return [read(path) for path in sorted((HERE / folder).glob("*.txt"))]
