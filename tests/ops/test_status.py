"""The line that the service manager shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmproxy.ops.status import Status
from llmproxy.version import version


@pytest.fixture
def parts() -> Any:
    """What the line is made of."""
    return SimpleNamespace(
        site=SimpleNamespace(connections={1, 2, 3}),
        recorder=SimpleNamespace(running=2),
        drain=SimpleNamespace(begun=False, remaining=0, remaining_s=0.0),
        reload=SimpleNamespace(succeeded=True),
    )


def line(parts: Any) -> str:
    """Return the line; it is noon of the first day."""
    wall = 43200.0
    return Status(parts.site, parts.recorder, parts.drain, parts.reload, lambda: wall)()


def test_it_tells_streams_connections_and_version(parts: Any) -> None:
    """In one line."""
    assert line(parts) == f"2 streams, 3 connections, version {version()}"


def test_a_failed_reload_is_told(parts: Any) -> None:
    """What runs is not what the file says."""
    parts.reload.succeeded = False
    assert line(parts).endswith(", the last reload FAILED (see the log)")


def test_a_drain_tells_what_is_left_and_until_when(parts: Any) -> None:
    """By the clock, in UTC, so that the line does not change each second."""
    parts.drain = SimpleNamespace(begun=True, remaining=2, remaining_s=61.0)
    assert line(parts) == "draining: 2 streams are left, to be cut at 12:01:01 UTC"


def test_a_drain_that_was_cut_has_no_deadline(parts: Any) -> None:
    """What is left is on its way out."""
    parts.drain = SimpleNamespace(begun=True, remaining=1, remaining_s=0.0)
    assert line(parts) == "draining: 1 streams are left"
