"""The soak's own arithmetic; what it finds is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import soak
from llmproxy.config import load


def test_a_slope_is_that_of_the_nearest_line() -> None:
    """In units of the second for one of the first; nothing rises where there is one sample."""
    assert soak.slope([(0, 5), (1, 7), (2, 9)]) == pytest.approx(2)
    assert soak.slope([(0, 1), (1, 3), (2, 1), (3, 3)]) == pytest.approx(0.4)
    assert soak.slope([(1, 5)]) == 0


def test_what_grew_most_comes_first() -> None:
    """What shrank or stayed is left out, and what is new counts from nothing."""
    before, after = {"a": 5, "b": 5, "c": 5}, {"a": 6, "b": 5, "c": 4, "d": 9}
    assert soak.grown(before, after, 9) == [("d", 0, 9), ("a", 5, 6)]
    assert soak.grown(before, after, 1) == [("d", 0, 9)]


def test_two_files_in_turn_are_configurations_that_differ(tmp_path: Path) -> None:
    """Each reload has something to do, and the third file is the first again."""
    file, files = soak.File(tmp_path, ledger=True), []
    for number in range(3):
        file.write(number)
        files.append(load(str(file.path), environ={}))
    assert files[0] == files[2] != files[1]
    assert files[0].clients != files[1].clients
    assert files[0].providers != files[1].providers
