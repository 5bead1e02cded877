"""Suites of a test's own, run in a process (and a reactor) of their own, with our conftest."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parents[1] / "conftest.py").read_text()


def outcomes(suite: pytest.Pytester, source: str, *args: str) -> tuple[dict[str, int], str]:
    """Run one test module; give back how many tests ended how, and what pytest printed."""
    suite.makepyfile(source)
    result = suite.runpytest_subprocess(*args, timeout=60)
    return result.parseoutcomes(), result.stdout.str()
