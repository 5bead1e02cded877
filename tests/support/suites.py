"""Suites of a test's own, run in a process (and a reactor) of their own, with our conftest."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parents[1] / "conftest.py").read_text()


def outcomes(
    pytester: pytest.Pytester, source: str, *args: str, conftest: str = CONFTEST
) -> tuple[dict[str, int], str]:
    """Run one test module; return how many tests ended how, and what pytest printed."""
    pytester.makeconftest(conftest)
    pytester.makepyfile(source)
    result = pytester.runpytest_subprocess(*args, timeout=60)
    return result.parseoutcomes(), result.stdout.str()
