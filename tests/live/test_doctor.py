"""The doctor before a running llmproxy: what a provider does is not put down to it.

Real hops stand in ``test_hops.py``.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmproxy.cli.doctor.diagnosis import Diagnosis, conclude, diagnose
from llmproxy.cli.doctor.examination import Checks, Observations, examine
from llmproxy.cli.doctor.exchange import Trust
from llmproxy.cli.doctor.target import target
from llmproxy.cli.doctor.verdict import Kind, State
from llmproxy.dialects.dialect import Dialect
from tests.support.hops import hop, is_installed
from tests.support.live_proxy import LiveProxy, live_fixture
from tests.support.scripts import DONE, LAST, SSE
from tests.support.sockets import Script, Wire, chunked

PACE = "/-/pace?n=16&interval_ms=100&bytes=200"
CHECKS = Checks(timeout_s=20.0, stall_s=1.0, patience_s=1.0)


def diagnosed(*urls: str, checks: Checks = CHECKS) -> Diagnosis:
    """What the doctor says of URLs; examined at the same time, it takes half as long."""

    def one(url: str) -> Observations:
        return examine(target(url), checks, Trust(), lambda words: None)

    with ThreadPoolExecutor() as threads:
        return conclude([*threads.map(one, urls)])


# --- a real request through llmproxy --------------------------------------------------------------

live = live_fixture()


def words(count: int, *, pause_s: float) -> Script:
    """Play a provider that sends events in the shape of a chat, with pauses or all at once."""

    def script(wire: Wire) -> None:
        request = wire.read_request()
        assert request.target.endswith(b"/chat/completions")
        events = [b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'] * count
        if pause_s:
            wire.send(SSE)
            for one in events:
                wire.send(chunked(one))
                time.sleep(pause_s)
            wire.send(chunked(DONE), LAST)
        else:
            time.sleep(1.2)
            wire.send(SSE + chunked(b"".join([*events, DONE])) + LAST)

    return script


def called(live: LiveProxy) -> Diagnosis:
    """What is said of llmproxy, and of the provider that is asked directly."""
    ways = ((f"http://127.0.0.1:{live.daemon.port}/p", False), (live.provider.url, True))
    calls = [target(url, dialect=Dialect.OPENAI, model="m", direct=direct) for url, direct in ways]
    return diagnose(calls, checks=CHECKS)


def test_a_call_through_llmproxy_streams(live: LiveProxy) -> None:
    """As it does at the provider itself."""
    live.script = words(12, pause_s=0.1)
    found = called(live)
    assert (found.code, found.guilts) == (0, [])
    assert [one.shape.events for one in found.verdicts] == [13, 13]


def test_a_provider_that_holds_its_stream_is_not_put_down_to_llmproxy(live: LiveProxy) -> None:
    """It is held at both URLs, so that the inner one is to blame."""
    live.script = words(12, pause_s=0)
    found = called(live)
    assert found.code == 1
    assert [one.state for one in found.verdicts] == [State.BUFFERED] * 2
    (guilt, _), *more = found.guilts
    assert (guilt.kind, guilt.at, guilt.programs, more) == (
        *(Kind.HELD, found.verdicts[1].target, []),
        [],
    )


def test_the_daemons_own_paced_stream(live: LiveProxy) -> None:
    """It shows everything, and nginx does not hold it: its head forbids that."""
    if not is_installed("nginx"):
        pytest.skip("nginx is not installed")
    with hop("nginx", live.daemon.port) as port:
        ports = (port, live.daemon.port)
        checks = Checks(timeout_s=20.0, idle_s=1.0, stall_s=1.0, patience_s=5.0)
        found = diagnosed(*(f"http://127.0.0.1:{one}{PACE}" for one in ports), checks=checks)
    assert [one.state for one in found.verdicts] == [State.HEALTHY] * 2
    assert [(one.kind, one.programs) for one, _ in found.guilts] == [(Kind.ASKED_IN_1_0, ["nginx"])]
    for seen in found.seen:
        tried = (seen.broken, seen.cancel_sending, seen.cancel_silent, seen.unread, seen.silence)
        assert None not in tried
