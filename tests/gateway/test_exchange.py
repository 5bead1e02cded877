"""How an exchange judges what breaks a story off; every handler goes by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from twisted.internet.defer import CancelledError

from llmproxy.errors import ClientGone, ClientStalled, Cut, ProxyError, upstream_idle
from llmproxy.gateway.exchange import Exchange
from llmproxy.policy.auth import MISPLACED, THE_PATH
from llmproxy.record.trace import Trace


def exchange(*, left: ClientGone | None = None, is_late: bool = False) -> Exchange:
    """Return an exchange whose client has left, or which is late, or neither."""
    trace = Trace(time="", id="1", instance="0", peer="", method="GET", path="/p", user_agent="u")
    made = Exchange(cast("Any", SimpleNamespace()), trace, 0.0)
    made.left, made.is_late = left, is_late
    return made


@pytest.mark.parametrize(
    ("left", "is_late", "problem", "end", "reason"),
    [
        (None, False, upstream_idle(), "upstream_idle", "upstream_idle"),
        (None, False, ClientStalled(), "client_stalled", None),
        (None, True, CancelledError(), "upstream_timeout", "upstream_timeout"),
        (None, True, ClientGone(), "upstream_timeout", "upstream_timeout"),
        (None, True, upstream_idle(), "upstream_idle", "upstream_idle"),
        (Cut(), False, CancelledError(), "drained", None),
        (Cut(), False, ClientGone(), "drained", None),
        (Cut(), False, upstream_idle(), "drained", None),
        (Cut(), True, CancelledError(), "drained", None),
        (Cut(), False, ZeroDivisionError(), "drained", None),
    ],
)
def test_who_ended_it(
    left: ClientGone | None, is_late: bool, problem: Exception, end: str, reason: str | None
) -> None:
    """A client that left first has ended it, whatever failed behind it; nobody reads an error."""
    judged = exchange(left=left, is_late=is_late)
    found, error = judged.judge(problem)
    assert (found, None if error is None else error.reason) == (end, reason)


def test_a_client_that_is_gone_has_left() -> None:
    """Some stories hear of it only where they write."""
    judged, gone = exchange(), ClientGone()
    judged.judge(gone)
    assert judged.left is gone


@pytest.mark.parametrize("work", [0, 1])
def test_a_late_request_is_sent_again_only_if_no_provider_had_it(work: int) -> None:
    """The client's SDK goes by it."""
    judged = exchange(is_late=True)
    judged.at_work = work
    _, error = judged.judge(CancelledError())
    assert error is not None
    assert error.may_have_run is bool(work)


def test_a_fault_of_ours_is_logged_and_not_told(logged_failures: Any) -> None:
    """With its traceback; the client reads a sentence."""
    try:
        raise ZeroDivisionError("s3cret")
    except ZeroDivisionError as fault:
        end, error = exchange().judge(fault)
    assert error is not None
    assert (end, error.status, error.reason) == ("internal", 500, "internal")
    assert "s3cret" not in error.message
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


@pytest.mark.parametrize(("cause", "path"), [(THE_PATH, ""), ("the query", "/p")])
@pytest.mark.parametrize("left", [None, ClientGone()])
def test_a_key_that_would_cross_is_in_no_record(
    cause: str, path: str, left: ClientGone | None
) -> None:
    """Nor what the client wrote beside it; also if it has left."""
    judged = exchange(left=left)
    judged.judge(ProxyError(401, MISPLACED, "", cause=cause))
    assert (judged.trace.path, judged.trace.user_agent) == (path, None)
