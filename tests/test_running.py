"""How the suite runs: its order, its examples, and that a worker reports a failure in full."""

from __future__ import annotations

import json
import re

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


def test_examples_are_the_same_each_time_unless_they_are_searched(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change is judged by what was judged before it; a search draws others, and more of them."""

    def drawn(search: str) -> list[int]:
        monkeypatch.setenv("LLMPROXY_TEST_SEARCH", search)
        assert outcomes(pytester, DRAWN)[0] == {"passed": 2}
        found: list[int] = json.loads((pytester.path / "drawn").read_text())
        return found

    usual = drawn("")
    assert len(usual) == 100
    assert drawn("0") == usual
    searched = drawn("3")
    assert len(searched) == 300
    assert searched[:100] != usual


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
