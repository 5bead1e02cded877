"""What a gateway notes beside a request, and that an operator can end it."""

from __future__ import annotations

import pytest

from tests.gateway.played import PlayedGateway
from tests.support.fake_transport import FIN
from tests.support.sockets import request

SSE = (b"content-type", b"text/event-stream")


def test_a_request_behind_a_cut_came_again() -> None:
    """Its record says how the first one ended; one with another body is none."""
    played = PlayedGateway()
    played.begun(SSE)
    played.transport.end(FIN)
    played.clock.advance(0)
    played.connect()
    played.begun(SSE)
    (running,) = played.recorder.exchanges
    assert running.trace.resent == "client_gone"
    assert played.value("resent_total", client="c", first="client_gone") == 1
    played.connect()
    played.call(body=b'{"model":"other"}')
    assert [one.trace.resent for one in played.recorder.exchanges].count(None) == 1


def test_a_request_beside_one_like_it_came_again() -> None:
    """While the first runs."""
    played = PlayedGateway()
    played.begun(SSE)
    played.connect()
    played.begun(SSE)
    found = sorted(str(one.trace.resent) for one in played.recorder.exchanges)
    assert found == ["None", "running"]
    assert played.value("resent_total", client="c", first="running") == 1


def test_a_refused_request_leaves_no_trace_of_its_body() -> None:
    """Who was told to come again, or got an answer, is not behind a cut."""
    played = PlayedGateway()
    for code in (429, 200):
        played.call()
        played.response(code).end()
        played.clock.advance(0)
    assert [trace.resent for trace in played.sink.traces] == [None, None]
    assert played.value("resent_total", client="c", first="running") is None


@pytest.mark.parametrize("provider", ["", "pass_credential = true"])
def test_what_a_provider_says_of_its_limits_is_kept(provider: str) -> None:
    """Unless it speaks of the caller's own account there."""
    played = PlayedGateway(provider=provider)
    head = ("X-Llmproxy-Key: key", "Authorization: Bearer own")
    played.send(request("GET", "/p", *head))
    played.response(200, (b"x-ratelimit-remaining-requests", b"5"))
    told = played.gateway.standing.headroom.told("p")
    assert (told is None) is bool(provider)


def test_a_killed_request_without_a_response_gets_an_error() -> None:
    """After which an SDK does not try again; the provider is dropped."""
    played = PlayedGateway()
    played.call()
    (exchange,) = played.recorder.exchanges
    exchange.kill()
    status, fields, _ = played.got()
    assert (status, fields[b"x-llmproxy-error"], fields[b"x-should-retry"]) == (
        503,
        b"killed",
        b"false",
    )
    assert played.upstream.cancelled == 1
    trace = played.trace()
    assert (trace.end_reason, trace.error, trace.attempts[0].outcome) == (
        "killed",
        "killed",
        "killed",
    )


def test_a_killed_stream_is_broken_off() -> None:
    """It never looks whole."""
    played = PlayedGateway()
    response = played.begun(SSE)
    response.push(b"data: 1\n\n")
    (exchange,) = played.recorder.exchanges
    exchange.kill()
    played.clock.advance(0)
    assert not played.transport.take().endswith(b"0\r\n\r\n")
    assert response.aborts
    assert played.trace().end_reason == "killed"
