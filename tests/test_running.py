"""How the suite runs: its order, its examples, and that a worker reports a failure in full."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.support.suites import CONFTEST, outcomes

SLOW_TO_SHRINK = """
    import time
    from hypothesis import given, strategies as st

    @given(st.lists(st.integers(0, 10**6), min_size=20))
    def test_it(numbers):
        time.sleep(0.1)
        assert len(set(numbers)) < 10
    """


def test_an_example_that_fails_is_reported_before_the_timeout(pytester: pytest.Pytester) -> None:
    """A slow search for a smaller one ends in time; Hypothesis's own limit is five minutes."""
    conftest = CONFTEST.replace("SHRINKING_S = 20\n", "SHRINKING_S = 1\n")
    counts, output = outcomes(pytester, SLOW_TO_SHRINK, "--timeout=15", conftest=conftest)
    assert counts == {"failed": 1}
    assert "Failing test case: " in output
    assert "Timeout" not in output


DRAWN = """
    from pathlib import Path
    from hypothesis import given, strategies as st

    DRAWN = []

    @given(st.integers())
    def test_it(number):
        DRAWN.append(number)

    def test_they_are_kept():
        Path("drawn").write_text(str(DRAWN))
    """


def test_examples_are_drawn_from_a_seed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed draws the same; another seed draws others; a search draws more of them."""

    def drawn(seed: str, search: str = "") -> list[int]:
        monkeypatch.setenv("LLMPROXY_TEST_SEED", seed)
        monkeypatch.setenv("LLMPROXY_TEST_SEARCH", search)
        counts, output = outcomes(pytester, DRAWN)
        assert counts == {"passed": 2}
        assert f"drawn from: LLMPROXY_TEST_SEED={seed}\n" in output
        found: list[int] = json.loads((pytester.path / "drawn").read_text())
        return found

    usual = drawn("7")
    assert len(usual) == 100
    assert drawn("7", "0") == usual
    assert drawn("8") != usual
    searched = drawn("7", "3")
    assert len(searched) == 300
    assert searched[:50] == usual[:50]


def test_the_seed_of_a_search_is_the_commits(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else, and without a commit, it is a fixed one; a quiet run names it when a test fails."""

    def seed_of_failure(asked: str, search: str) -> int:
        monkeypatch.setenv("LLMPROXY_TEST_SEED", asked)
        monkeypatch.setenv("LLMPROXY_TEST_SEARCH", search)
        found = re.findall(
            r"LLMPROXY_TEST_SEED=(\d+)\n",
            outcomes(pytester, "def test_it(): assert False", "-q")[1],
        )
        return int(found[-1])

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(pytester.path.parent))
    assert seed_of_failure("commit", "2") == 1

    def git(*command: str) -> str:
        own = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        return subprocess.run(
            ["git", *own, *command], cwd=pytester.path, capture_output=True, text=True, check=True
        ).stdout

    git("init")
    git("commit", "--allow-empty", "--message=one", "--no-gpg-sign")
    seed = int(git("rev-parse", "HEAD")[:7], 16)
    asked = [("", ""), ("", "0"), ("", "2"), ("commit", ""), ("7", "2")]
    assert [seed_of_failure(*one) for one in asked] == [1, 1, seed, seed, 7]


def test_files_with_the_longest_tests_begin(pytester: pytest.Pytester) -> None:
    """A long file that begins last would keep a run going; within a file the order stays."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        test_a="def test_a(): pass",
        test_b="""
        import pytest

        def test_b(): pass

        @pytest.mark.timeout(300)
        def test_c(): pass
        """,
        test_c="import pytest\npytestmark = pytest.mark.timeout(400)\ndef test_d(): pass",
    )
    found = pytester.runpytest_subprocess("--collect-only", "-q", timeout=60).stdout.str()
    assert re.findall(r"::(\w+)", found) == ["test_d", "test_b", "test_c", "test_a"]


def test_a_worker_keeps_no_report(pytester: pytest.Pytester) -> None:
    """The controller of xdist has the reports, and shows a failure in full."""
    counts, output = outcomes(
        pytester,
        """
        def test_it():
            assert [1, 2] == [1, 3], "in full"

        def test_what_is_kept(request):
            kept = request.config.pluginmanager.get_plugin("terminalreporter").stats
            assert [report.when for reports in kept.values() for report in reports] == ["setup"]
        """,
        "-n1",
    )
    assert counts == {"passed": 1, "failed": 1}
    assert "At index 1 diff: 2 != 3" in output


def test_programs_of_the_tree_are_compiled_once(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the environment says otherwise: what a test starts keeps its bytecode."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (pytester.path / "started.py").write_text("")
    counts, _ = outcomes(
        pytester,
        """
        import subprocess
        import sys
        from pathlib import Path

        def test_it():
            subprocess.run([sys.executable, "-c", "import started"], check=True)
            assert list(Path("__pycache__").glob("started.*.pyc"))
        """,
        "-n1",
    )
    assert counts == {"passed": 1}
