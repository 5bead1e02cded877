"""The line that the service manager shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmproxy.ops.status import Status
from llmproxy.version import version


@pytest.fixture
def parts() -> Any:
    """The parts that the line is made of."""
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


def test_the_line_has_streams_connections_and_version(parts: Any) -> None:
    """In one line."""
    assert line(parts) == f"2 streams, 3 connections, version {version()}"


def test_a_failed_reload_is_shown(parts: Any) -> None:
    """The running configuration is not the one in the file."""
    parts.reload.succeeded = False
    assert line(parts).endswith(", the last reload FAILED (see the log)")


def test_a_drain_shows_the_remaining_streams_and_its_end(parts: Any) -> None:
    """By the clock, in UTC, so that the line does not change each second."""
    parts.drain = SimpleNamespace(begun=True, remaining=2, remaining_s=61.0)
    assert line(parts) == "draining: 2 streams are left, to be cut at 12:01:01 UTC"


def test_a_drain_that_was_cut_short_has_no_deadline(parts: Any) -> None:
    """The remaining streams are about to end."""
    parts.drain = SimpleNamespace(begun=True, remaining=1, remaining_s=0.0)
    assert line(parts) == "draining: 1 streams are left"
