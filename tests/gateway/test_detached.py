"""Detached streams: after its client left, a response is read for its usage, or cancelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmproxy.errors import upstream_broken
from llmproxy.record.trace import Trace
from tests.gateway.played import SSE, PlayedGateway, PlayedResponse
from tests.support.fake_transport import FIN, RESET
from tests.support.sockets import request

DRAIN = 'on_disconnect = "drain"\n'
CHAT = "/p/v1/chat/completions"
KIND = (b"content-type", b"application/json")
WHOLE = b'{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":0}}'
FIRST = b'data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":3}}\n\n'
LAST_COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"no"}}\n\n'


def streaming(route: str = DRAIN, more: str = "") -> tuple[PlayedGateway, PlayedResponse]:
    """Return a stream that has begun, on a route that drains."""
    played = PlayedGateway(route=route, more=more)
    response = played.begun(SSE, target=CHAT)
    response.push(FIRST)
    return played, response


def finish(response: PlayedResponse) -> None:
    """Let the response come to its end, with usage."""
    response.push(LAST_COUNTS, DONE)
    response.end()


def end_of(trace: Trace) -> tuple[Any, ...]:
    """Return the end, the decision, and the usage in a record."""
    return trace.end_reason, trace.on_disconnect, trace.usage, trace.output_tokens


@pytest.mark.parametrize("reason", [FIN, RESET])
def test_a_detached_stream_is_read_for_its_usage(reason: Exception) -> None:
    """The record has the last counts, and still says that the client left."""
    played, response = streaming()
    played.transport.end(reason)
    assert not response.aborts
    assert len(played.gateway.detached) == 1
    assert not played.sink.traces
    finish(response)

    trace = played.trace()
    assert end_of(trace) == ("client_gone", "drain", "reported", 5)
    assert (trace.is_complete, trace.bytes_out, trace.status) == (False, len(FIRST), 200)
    assert len(played.gateway.detached) == 0
    labels = {"client": "c", "provider": "p", "model": "other"}
    assert played.value("tokens_total", **labels, type="input") == 3
    assert played.value("tokens_total", **labels, type="output") == 5
    assert played.value("cancel_seconds_count") == 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_whole_body_for_nobody_is_no_bytes_out(whole: bool) -> None:
    """The client left before the head came; the usage is read all the same."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT)
    played.transport.end(FIN)
    response = PlayedResponse(200, (KIND,))
    response.whole = WHOLE if whole else None
    played.asked.response.callback(response)
    if response.body is not None:
        response.push(WHOLE)
        response.end()
    trace = played.trace()
    assert end_of(trace) == ("client_gone", "drain", "reported", 0)
    assert (trace.chunks, trace.bytes_out) == (0, 0)
    assert played.value("bytes_total", direction="out") == 0
    assert played.value("chunks_total") == 0


def test_detached_bytes_are_no_bytes_out() -> None:
    """Counters and record have only the bytes that the client got."""
    played, response = streaming()
    played.transport.end(FIN)
    for push in (lambda: response.push(LAST_COUNTS, DONE), response.end):
        push()
        assert played.value("bytes_total", direction="out") == len(FIRST)
        assert played.value("chunks_total") == 1

    assert (played.trace().bytes_out, played.trace().chunks) == (len(FIRST), 1)


def test_the_number_of_detached_streams_is_bounded() -> None:
    """One more is cancelled, until there is room again."""
    played = PlayedGateway(route=DRAIN, more="[limits]\ndrains = 1\n")
    responses = []
    for number in range(3):
        if number:
            played.connect()
        played.call(target=CHAT)
        responses.append((played.response(200, SSE), played.transport))
    (first, one), (_, two), (third, three) = responses
    one.end(FIN)
    two.end(FIN)
    played.clock.advance(0)
    assert [bool(response.aborts) for response, _ in responses] == [False, True, False]
    finish(first)
    three.end(FIN)
    assert not third.aborts
    finish(third)

    assert [end_of(trace) for trace in played.sink.traces] == [
        ("client_gone", "cancel", "none", None),
        ("client_gone", "drain", "reported", 5),
        ("client_gone", "drain", "reported", 5),
    ]
    assert played.value("cancel_seconds_count") == 1
    assert not played.clock.getDelayedCalls()


def test_a_bound_of_zero_detaches_no_stream() -> None:
    """``limits.drains = 0`` cancels each response."""
    played, response = streaming(more="[limits]\ndrains = 0\n")
    played.transport.end(FIN)

    assert response.aborts
    assert end_of(played.trace()) == ("client_gone", "cancel", "partial", None)


def test_a_client_may_leave_before_the_head() -> None:
    """The provider works already; even a usage of zero in its document is reported."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT, body=b'{"model": "m"}')
    played.transport.end(FIN)
    assert not played.upstream.cancelled
    response = played.response(200, KIND, (b"content-length", b"%d" % len(WHOLE)))
    response.push(WHOLE[:9], WHOLE[9:])
    response.end()

    trace = played.trace()
    assert end_of(trace) == ("client_gone", "drain", "reported", 0)
    assert (trace.status, trace.bytes_out, trace.chunks, trace.is_complete) == (None, 0, 0, False)
    assert played.value("bytes_total", direction="out") == 0
    assert trace.attempts[0].outcome == "ok"
    assert not played.transport.writes


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (500, [KIND]),
        (200, [(b"content-type", b"text/html")]),
        (200, []),
        (200, [SSE, (b"content-encoding", b"x-unheard-of")]),
    ],
)
def test_a_head_without_usage_ends_the_waiting(
    code: int, fields: list[tuple[bytes, bytes]]
) -> None:
    """A refusal, or a body that cannot be read, is cancelled."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT)
    played.transport.end(FIN)
    response = played.response(code, *fields)

    assert response.aborts
    assert response.body is None
    assert end_of(played.trace()) == ("client_gone", "drain", "none", None)


HALF = ("X-Api-Key: key", "Content-Type: application/octet-stream", "Content-Length: 9")
CANCELLED: dict[str, Callable[[PlayedGateway], object]] = {
    "a route that cancels": lambda played: None,
    "an endpoint that is not known": lambda played: played.call(target="/p/v1/files"),
    "a GET": lambda played: played.call("GET", CHAT, body=b""),
    "a request that is not sent yet": lambda played: setattr(played.upstream, "begins", False),
    "half a request": lambda played: played.send(request("POST", CHAT, *HALF)),
}


@pytest.mark.parametrize("case", CANCELLED)
def test_a_request_without_usage_is_cancelled(case: str) -> None:
    """The request ends when its client leaves."""
    played = PlayedGateway(route="" if case == "a route that cancels" else DRAIN)
    CANCELLED[case](played)
    if not played.upstream.asked:
        played.call(target=CHAT)
    played.transport.end(FIN)

    assert played.upstream.cancelled == 1
    assert end_of(played.trace())[:2] == ("client_gone", "cancel")


def test_the_record_of_a_client_that_stays_has_no_decision() -> None:
    """``on_disconnect`` is null, on a route that drains, too."""
    played, response = streaming()
    finish(response)

    assert end_of(played.trace()) == ("complete", None, "reported", 5)


@pytest.mark.parametrize(
    ("last", "end"),
    [
        ((LAST_COUNTS, DONE), ("complete", "cancel", "reported", 5)),
        ((ERROR,), ("upstream_failed", "cancel", "partial", None)),
    ],
)
def test_a_client_that_leaves_at_the_last_event_is_not_the_end(
    last: tuple[bytes, ...], end: tuple[Any, ...]
) -> None:
    """After the end marker or the provider's error there is nothing to read."""
    played, response = streaming()
    response.push(*last)
    played.transport.end(FIN)

    assert response.aborts
    assert end_of(played.trace()) == end


@pytest.mark.parametrize(("last", "error"), [([ERROR], None), ([], upstream_broken("reset"))])
def test_a_provider_that_fails_later_does_not_change_the_end(
    last: list[bytes], error: Exception | None
) -> None:
    """The client had left before, and got no error."""
    played, response = streaming()
    played.transport.end(FIN)
    response.push(*last)
    response.end(error)

    assert end_of(played.trace()) == ("client_gone", "drain", "partial", None)
    assert played.trace().error is None


@pytest.mark.parametrize(
    "limit",
    [
        'drain_for = "5s"',
        'timeouts = { total = "5s" }',
        'timeouts = { idle = "5s" }',
        'timeouts = { total = "5s", first_byte = "off" }',
    ],
)
def test_every_deadline_holds_for_a_detached_stream(limit: str) -> None:
    """The provider's connection is closed; the record has the counts so far, and no error."""
    played, response = streaming(DRAIN + limit)
    played.transport.end(FIN)
    played.clock.advance(4.9)
    early = response.aborts
    played.clock.advance(0.2)

    assert (early, response.aborts > 0) == (0, True)
    trace = played.trace()
    assert end_of(trace) == ("client_gone", "drain", "partial", None)
    assert (trace.input_tokens, trace.error) == (3, None)
    assert len(played.gateway.detached) == 0


def test_the_stream_of_a_stalled_client_is_detached() -> None:
    """The paused relay runs again to its end; the stall is the end reason."""
    played, response = streaming(DRAIN + 'timeouts = { client_stall = "3s", idle = "off" }')
    played.transport.producer.pauseProducing()
    played.transport.hold(3)
    assert response.transport.is_paused()
    played.clock.pump([0.5] * 10)
    assert played.transport.count("abort") == 1
    played.transport.end(RESET)
    assert not response.aborts
    assert not response.transport.is_paused()
    finish(response)

    assert end_of(played.trace()) == ("client_stalled", "drain", "reported", 5)


def test_a_slow_client_that_leaves_ends_its_pause() -> None:
    """The paused relay reads again."""
    played, response = streaming()
    played.transport.producer.pauseProducing()
    played.clock.advance(2)
    played.transport.end(RESET)
    assert not response.transport.is_paused()
    played.clock.advance(2)
    finish(response)

    assert end_of(played.trace()) == ("client_gone", "drain", "reported", 5)
    assert played.trace().paused_s == 2


@pytest.mark.parametrize("phase", ["head", "body"])
def test_the_end_of_the_process_ends_every_detached_stream(phase: str) -> None:
    """Each stream has its record, with the counts so far."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT)
    response = played.response(200, SSE) if phase == "body" else None
    played.transport.end(FIN)
    played.recorder.close_all()

    assert end_of(played.trace()) == ("client_gone", "drain", "none", None)
    assert played.upstream.cancelled == (phase == "head")
    assert response is None or response.aborts
    assert len(played.gateway.detached) == 0


def test_a_second_signal_detaches_no_stream() -> None:
    """The proxy ends the requests, because it ends itself."""
    played, response = streaming()
    played.site.cut()
    played.transport.end(RESET)

    assert response.aborts
    assert end_of(played.trace()) == ("drained", "cancel", "partial", None)


@pytest.mark.parametrize("status", [200, 429])
def test_a_response_without_usage_ends_with_its_client(status: int) -> None:
    """A refusal, or a body that cannot be read, is not detached."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT)
    response = played.response(status, (b"content-type", b"text/plain"))
    response.push(b"some")
    played.transport.end(FIN)

    assert response.aborts
    assert len(played.gateway.detached) == 0
    assert played.trace().on_disconnect == "cancel"
