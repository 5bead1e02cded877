"""Requests that come again: while the first runs, behind its cut, and those that are none."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.errors import EndReason
from llmproxy.gateway import resends
from llmproxy.gateway.resends import Resends, key_of

KEY = key_of("c", "/p", b"body")
CUTS = (
    "client_gone",
    "client_stalled",
    "upstream_idle",
    "upstream_broken",
    "unfinished",
    "drained",
)


def test_a_request_that_runs_is_seen() -> None:
    """As long as one like it runs, each further one came again."""
    seen = Resends(Clock().seconds)
    assert [seen.begins(KEY) for _ in range(3)] == [None, "running", "running"]
    seen.ends(KEY, EndReason.COMPLETE)
    seen.ends(KEY, EndReason.COMPLETE)
    assert seen.begins(KEY) == "running"
    seen.ends(KEY, EndReason.COMPLETE)
    seen.ends(KEY, EndReason.COMPLETE)
    assert seen.begins(KEY) is None


@pytest.mark.parametrize("end", list(EndReason))
def test_a_cut_is_remembered_for_a_minute(end: EndReason) -> None:
    """Whoever got a whole response, or an error instead, has no stream that was cut."""
    clock = Clock()
    seen = Resends(clock.seconds)
    wanted = end.value if end in CUTS else None
    seen.begins(KEY)
    seen.ends(KEY, end)
    clock.advance(60)
    assert seen.begins(KEY) == wanted
    seen.ends(KEY, end)
    clock.advance(60.1)
    assert seen.begins(KEY) is None


def test_a_cut_counts_once() -> None:
    """The third request is told of the second."""
    seen = Resends(Clock().seconds)
    seen.begins(KEY)
    seen.ends(KEY, EndReason.CLIENT_GONE)
    assert seen.begins(KEY) == "client_gone"
    seen.ends(KEY, EndReason.COMPLETE)
    assert seen.begins(KEY) is None


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest cut is forgotten first; what has ended leaves nothing else."""
    monkeypatch.setattr(resends, "_MOST", 2)
    seen = Resends(Clock().seconds)
    keys = [key_of("c", "/p", b"%d" % number) for number in range(3)]
    for key in keys:
        seen.begins(key)
        seen.ends(key, EndReason.CLIENT_GONE)
    assert [seen.begins(key) for key in keys] == [None, "client_gone", "client_gone"]


@pytest.mark.parametrize("size", [100, 200_000, 3_000_000])
def test_bodies_are_told_apart(size: int) -> None:
    """By client, path, length, and both ends."""
    body = bytes(size)
    keys = {
        key_of("c", "/p", body),
        key_of("d", "/p", body),
        key_of("c", "/q", body),
        key_of("c", "/p", body + b"x"),
        key_of("c", "/p", b"x" + body[1:]),
        key_of("c", "/p", body[:-1] + b"x"),
    }
    assert len(keys) == 6
    assert key_of("c", "/p", bytes(bytearray(body))) in keys
