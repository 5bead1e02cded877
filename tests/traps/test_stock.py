"""Proof that the scenarios of this folder can fail: Twisted's and treq's own parts fail the rows.

The files of the folder run with ``--stock``, in a few processes at once (what stock parts never do
is waited for), and their reports are read back.  A row counts as red only where an assertion of one
of its tests failed; what merely broke does not.  A few rows tell what is so with any parts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

UPSTREAM = tuple(f"U{number}" for number in range(1, 23))
STRICTNESS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9")
RESPONSES = ("C10", "C11", "C12", "C13", "C15", "C16", "C18", "C19")
DUE = UPSTREAM + STRICTNESS + RESPONSES
SHARED = {
    "C14": "a client that half-closes counts as gone, here too: that is documented, not repaired",
    "C17": "TLS joins no writes of different turns: that is to be known, and to stay so",
}
"""Rows that are no fault of stock parts; ours do the same, and each has the reason beside it."""

AT_ONCE = 6

# A socket that stock parts never let go of must not fail the test that comes next.
QUIET = ("-W", "ignore::ResourceWarning", "-W", "ignore::pytest.PytestUnraisableExceptionWarning")

COLLECT = """\
import json, sys, pytest
class Rows:
    def pytest_collection_finish(self, session):
        marks = [(item.nodeid, mark.args[0])
                 for item in session.items for mark in item.iter_markers("trap")]
        print("ROWS", json.dumps(marks))
sys.exit(pytest.main(["--collect-only", "-q", sys.argv[1]], plugins=[Rows()]))
"""


class Case(NamedTuple):
    """One test of the stock run.

    Attributes:
        row: the row that it is for; empty for a test that must pass on any parts.
        asserted: an assertion of it failed.
        passed: nothing went wrong.
    """

    name: str
    row: str
    asserted: bool
    passed: bool


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100, check=False
    )


def _run_stock(report: Path, files: list[str]) -> list[Case]:
    options = ["--stock", "-q", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = _python("-m", "pytest", *options, *QUIET, *files)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout + run.stderr
    return list(_cases(report))


def _cases(report: Path) -> Iterator[Case]:
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - pytest wrote it just now
        rows = [one.get("value", "") for one in case.iter("property") if one.get("name") == "trap"]
        messages = [one.get("message", "") for one in case.iter("failure")]
        asserted = any(text.startswith(("assert ", "AssertionError")) for text in messages)
        passed = not messages and case.find("error") is None and case.find("skipped") is None
        yield Case(case.get("name", ""), "".join(rows), asserted, passed)


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """The tests of this folder, as they went on stock parts."""
    folder = tmp_path_factory.mktemp("stock")
    files = sorted(str(file) for file in HERE.glob("test_*.py") if file.name != Path(__file__).name)
    parts = [files[part::AT_ONCE] for part in range(AT_ONCE)]
    reports = [folder / f"{part}.xml" for part in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [case for cases in pool.map(_run_stock, reports, parts) for case in cases]


def test_every_row_has_its_tests() -> None:
    """The marks on the tests of this folder name the rows that are listed here, and no other."""
    run = _python("-c", COLLECT, str(HERE))
    assert run.returncode == pytest.ExitCode.OK, run.stdout + run.stderr
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("ROWS ")]
    marked = {row for _, row in json.loads(line.removeprefix("ROWS "))}
    assert marked == {*DUE, *SHARED}


@pytest.mark.parametrize("row", DUE)
def test_the_row_is_red_on_stock_parts(stock_run: list[Case], row: str) -> None:
    """What Twisted and treq do by themselves makes at least one of the row's assertions fail."""
    cases = [case for case in stock_run if case.row == row]
    assert [case.name for case in cases if case.asserted], cases


@pytest.mark.parametrize("row", SHARED)
def test_the_row_is_as_it_is_on_stock_parts(stock_run: list[Case], row: str) -> None:
    """What we have in common with Twisted is known to be so: its parts pass all of these tests."""
    cases = [case for case in stock_run if case.row == row]
    assert cases
    assert [case.name for case in cases if not case.passed] == []


def test_stock_parts_play_their_part(stock_run: list[Case]) -> None:
    """The tests that are about no row pass on stock parts: it is not the harness that fails."""
    plain = [case for case in stock_run if not case.row]
    assert plain
    assert [case.name for case in plain if not case.passed] == []
