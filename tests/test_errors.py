"""The error family, and the closed set of end reasons."""

from __future__ import annotations

import pytest

from llmproxy.errors import (
    ClientGone,
    ClientStalled,
    Cut,
    EndReason,
    ProxyError,
    no_descriptors,
    upstream_broken,
    upstream_idle,
    upstream_protocol,
    upstream_timeout,
    upstream_tls,
    upstream_unreachable,
)


def test_end_reasons_are_the_closed_set() -> None:
    """The words are those of the design, and no others."""
    upstream = ("refused", "unreachable", "tls", "timeout", "idle", "broken", "protocol", "failed")
    assert {reason.value for reason in EndReason} == {
        *("complete", "client_gone", "client_stalled", "unfinished"),
        *(f"upstream_{word}" for word in upstream),
        *("rejected", "drained", "killed", "internal"),
    }


@pytest.mark.parametrize(
    ("error", "status", "end", "may_have_run"),
    [
        (upstream_unreachable("10.0.0.1"), 502, "upstream_unreachable", False),
        (upstream_tls("expired", "10.0.0.1"), 502, "upstream_tls", False),
        (upstream_timeout("10.0.0.1", may_have_run=False), 504, "upstream_timeout", False),
        (upstream_timeout("10.0.0.1", may_have_run=True), 504, "upstream_timeout", True),
        (upstream_idle(), 504, "upstream_idle", True),
        (upstream_broken("10.0.0.1"), 502, "upstream_broken", True),
        (upstream_protocol("10.0.0.1"), 502, "upstream_protocol", True),
        (no_descriptors(), 503, "rejected", False),
    ],
)
def test_errors_of_the_upstream_side(
    error: ProxyError, status: int, end: str, may_have_run: bool
) -> None:
    """Each error has its status and end reason, and says whether the provider may have worked."""
    assert (error.status, error.end.value, error.may_have_run) == (status, end, may_have_run)
    assert str(error) == error.message


def test_no_descriptors_says_when_to_come_again() -> None:
    """A 503 carries ``retry-after``."""
    assert dict(no_descriptors().fields)[b"retry-after"].isdigit()


def test_clients_leave_in_three_ways() -> None:
    """They close, do not read, or are ended by the proxy; each way has its end reason."""
    assert ClientGone.end is EndReason.CLIENT_GONE
    assert ClientStalled.end is EndReason.CLIENT_STALLED
    assert Cut.end is EndReason.DRAINED
    assert issubclass(ClientStalled, ClientGone)
    assert issubclass(Cut, ClientGone)
