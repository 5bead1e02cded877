"""Scripts that print credentials, for tests of commands."""

from __future__ import annotations

from pathlib import Path


def script(folder: Path, body: str, name: str = "token") -> Path:
    """Write a program for ``sh`` and return its path; in ``body`` ``FOLDER`` is its folder."""
    path = folder / name
    new = path.with_suffix(".new")
    new.write_text("#!/bin/sh\n" + body.replace("FOLDER", str(folder)) + "\n")
    new.chmod(0o700)
    new.replace(path)  # at once, as it may be run at this moment
    return path


COUNTED = """\
n=$(cat FOLDER/count 2>/dev/null || echo 0); n=$((n + 1)); echo $n > FOLDER/count.new
mv FOLDER/count.new FOLDER/count
"""
"""How a script begins that counts its runs: ``$n`` is the number of this one."""


def runs(folder: Path) -> int:
    """Return how often a script that begins with ``COUNTED`` has been run in its folder."""
    path = folder / "count"
    return int(path.read_text()) if path.exists() else 0
