"""The limit of descriptors: raised as far as needed and allowed, or reported."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
from twisted.logger import formatEvent

from llmproxy.ops.setup import RESERVE, needed, raise_limit
from tests.ops.conftest import Listening

Limits = tuple[int, int]


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[Limits]]:
    """Return a way to set soft and hard limit, which returns the list of what is set then."""

    def begin(soft: int, hard: int) -> list[Limits]:
        now = [(soft, hard)]

        def set_limit(which: int, limits: Limits) -> None:
            assert which == resource.RLIMIT_NOFILE
            now.append(limits)

        monkeypatch.setattr(resource, "getrlimit", lambda which: now[-1])
        monkeypatch.setattr(resource, "setrlimit", set_limit)
        return now

    return begin


def test_each_connection_needs_two_descriptors() -> None:
    """One for the client, one for the provider, and some for all else."""
    assert needed(1000) == 2000 + RESERVE


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (1024, 100_000, 2512),
        (1024, resource.RLIM_INFINITY, 2512),
        (1024, 2000, 2000),
        (2511, 2512, 2512),
    ],
)
def test_the_limit_is_raised_as_far_as_allowed(
    limits: Callable[[int, int], list[Limits]], soft: int, hard: int, raised: int
) -> None:
    """The soft limit rises to what is needed; the hard one is left alone."""
    now = limits(soft, hard)
    raise_limit(1000)
    assert now == [(soft, hard), (raised, hard)]


@pytest.mark.parametrize(
    ("soft", "hard"),
    [(2512, 2512), (5000, 9000), (resource.RLIM_INFINITY, resource.RLIM_INFINITY), (100, 100)],
)
def test_the_limit_is_kept_where_nothing_can_be_gained(
    limits: Callable[[int, int], list[Limits]], soft: int, hard: int
) -> None:
    """The soft limit is high enough, or the hard one allows no more; it is never lowered."""
    now = limits(soft, hard)
    raise_limit(1000)
    assert now == [(soft, hard)]


@pytest.mark.parametrize(("hard", "warned"), [(2511, True), (2512, False)])
def test_too_low_a_hard_limit_is_reported(
    limits: Callable[[int, int], list[Limits]], logged: Listening, hard: int, warned: bool
) -> None:
    """With both numbers, and a remedy for the operator."""
    limits(1024, hard)
    raise_limit(1000)
    lines = [formatEvent(event) for event in logged]
    assert lines == (
        [
            "2511 file descriptors are allowed, and max_connections = 1000 may need 2512: "
            "raise LimitNOFILE, or lower max_connections"
        ]
        if warned
        else []
    )


def test_a_limit_that_cannot_be_raised_is_an_error(
    limits: Callable[[int, int], list[Limits]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses a value that the hard limit would allow."""
    limits(1024, 9000)

    def refuse(which: int, limits: Limits) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(OSError, match="cannot be raised from 1024 to 2512: not allowed"):
        raise_limit(1000)


def test_the_kernels_table_of_descriptors_has_its_size_from_the_start() -> None:
    """While it grows, a process with threads stands still; nothing stays open for that."""
    script = """
import os
from llmproxy.ops.setup import raise_limit

def size():
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("FDSize")))

before, open_before = size(), os.listdir("/proc/self/fd")
raise_limit(100)
assert before < 712 <= size(), (before, size())
assert os.listdir("/proc/self/fd") == open_before
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
