"""A response whose client has left is read on for its usage, within its bounds, or cancelled."""

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
    """A stream that has begun, on a route that drains."""
    played = PlayedGateway(route=route, more=more)
    played.call(target=CHAT)
    response = played.response(200, SSE)
    response.push(FIRST)
    return played, response


def told(trace: Trace) -> tuple[Any, ...]:
    """Return what a record says of a client's leaving."""
    return trace.end_reason, trace.on_disconnect, trace.usage, trace.output_tokens


@pytest.mark.parametrize("reason", [FIN, RESET])
def test_a_response_is_read_on_for_its_usage(reason: Exception) -> None:
    """The last counts are in the record, which still says that the client left; it got no more."""
    played, response = streaming()
    played.transport.end(reason)
    assert not response.aborts
    assert len(played.gateway.detached) == 1
    assert not played.sink.traces
    response.push(LAST_COUNTS, DONE)
    response.end()

    trace = played.trace()
    assert told(trace) == ("client_gone", "drain", "reported", 5)
    assert (trace.is_complete, trace.bytes_out, trace.status) == (False, len(FIRST), 200)
    assert len(played.gateway.detached) == 0
    labels = {"client": "c", "provider": "p", "model": "other"}
    assert played.value("tokens_total", **labels, type="input") == 3
    assert played.value("tokens_total", **labels, type="output") == 5
    assert played.value("cancel_seconds_count") == 0


def test_bytes_that_nobody_gets_are_no_bytes_out() -> None:
    """Counters and record agree on what went out, while it runs and after."""
    played, response = streaming()
    played.transport.end(FIN)
    for push in (lambda: response.push(LAST_COUNTS, DONE), response.end):
        push()
        assert played.value("bytes_total", direction="out") == len(FIRST)
        assert played.value("chunks_total") == 1

    assert (played.trace().bytes_out, played.trace().chunks) == (len(FIRST), 1)


def test_a_response_is_read_on_for_so_long_at_most() -> None:
    """Then the provider's connection is closed, and the record has what was known by then."""
    played, response = streaming(DRAIN + 'drain_for = "7s"')
    played.transport.end(FIN)
    played.clock.advance(6.9)
    early = response.aborts
    played.clock.advance(0.2)

    assert (early, response.aborts > 0) == (0, True)
    trace = played.trace()
    assert told(trace) == ("client_gone", "drain", "partial", None)
    assert (trace.input_tokens, trace.error) == (3, None)
    assert len(played.gateway.detached) == 0


def test_only_so_many_are_read_on_at_once() -> None:
    """One more is cancelled; when there is room again the next one is not."""
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
    first.push(LAST_COUNTS, DONE)
    first.end()
    three.end(FIN)
    assert not third.aborts
    third.push(LAST_COUNTS, DONE)
    third.end()

    assert [told(trace) for trace in played.sink.traces] == [
        ("client_gone", "cancel", "none", None),
        ("client_gone", "drain", "reported", 5),
        ("client_gone", "drain", "reported", 5),
    ]
    assert played.value("cancel_seconds_count") == 1
    assert not played.clock.getDelayedCalls()


def test_no_drain_at_all_may_be_allowed() -> None:
    """``limits.drains = 0`` cancels each."""
    played, response = streaming(more="[limits]\ndrains = 0\n")
    played.transport.end(FIN)

    assert response.aborts
    assert told(played.trace()) == ("client_gone", "cancel", "partial", None)


def test_a_response_whose_head_is_waited_for_is_read() -> None:
    """The provider works already; the usage of the document is reported, a zero of it, too."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT, body=b'{"model": "m"}')
    played.transport.end(FIN)
    assert not played.upstream.cancelled
    response = played.response(200, KIND, (b"content-length", b"%d" % len(WHOLE)))
    response.push(WHOLE[:9], WHOLE[9:])
    response.end()

    trace = played.trace()
    assert told(trace) == ("client_gone", "drain", "reported", 0)
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
def test_a_head_that_promises_no_usage_ends_the_waiting(
    code: int, fields: list[tuple[bytes, bytes]]
) -> None:
    """Whose body cannot be understood, or is a refusal, is not read."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT)
    played.transport.end(FIN)
    response = played.response(code, *fields)

    assert response.aborts
    assert response.body is None
    assert told(played.trace()) == ("client_gone", "drain", "none", None)


NOT_READ_ON: dict[str, Callable[[PlayedGateway], object]] = {
    "a route that cancels": lambda played: None,
    "an endpoint that is not known": lambda played: played.call(target="/p/v1/files"),
    "a GET": lambda played: played.call("GET", CHAT, body=b""),
    "half a request": lambda played: played.send(
        request(
            "POST",
            CHAT,
            "X-Api-Key: key",
            "Content-Type: application/octet-stream",
            "Content-Length: 9",
        )
    ),
}


@pytest.mark.parametrize("what", NOT_READ_ON)
def test_what_has_no_usage_or_is_not_whole_is_cancelled(what: str) -> None:
    """In any of these cases the leaving is the end."""
    facts = NOT_READ_ON[what]
    played = PlayedGateway(route="" if what == "a route that cancels" else DRAIN)
    facts(played)
    if not played.upstream.asked:
        played.call(target=CHAT)
    played.transport.end(FIN)

    assert played.upstream.cancelled == 1
    assert told(played.trace())[:2] == ("client_gone", "cancel")


def test_a_record_of_a_client_that_stayed_says_nothing_of_leaving() -> None:
    """Null, on a route that drains as on any other."""
    played, response = streaming()
    response.push(LAST_COUNTS, DONE)
    response.end()

    assert told(played.trace()) == ("complete", None, "reported", 5)


def test_a_client_that_leaves_at_the_end_marker_got_everything() -> None:
    """There is nothing to read on for."""
    played, response = streaming()
    response.push(LAST_COUNTS, DONE)
    played.transport.end(FIN)

    assert response.aborts
    trace = played.trace()
    assert told(trace) == ("complete", "cancel", "reported", 5)
    assert trace.is_complete


def test_a_client_that_leaves_at_the_providers_error_did_so_because_of_it() -> None:
    """SDKs close there: the request failed, and nothing is read on for."""
    played, response = streaming()
    response.push(ERROR)
    played.transport.end(FIN)

    assert response.aborts
    assert told(played.trace()) == ("upstream_failed", "cancel", "partial", None)


def test_a_provider_that_fails_while_nobody_listens_does_not_change_why_it_ended() -> None:
    """The client had left before."""
    played, response = streaming()
    played.transport.end(FIN)
    response.push(ERROR)
    response.end()

    assert told(played.trace()) == ("client_gone", "drain", "partial", None)


def test_a_provider_that_breaks_while_nobody_listens_leaves_what_it_said() -> None:
    """The client was told nothing of it, and the record has no word for what it was told."""
    played, response = streaming()
    played.transport.end(FIN)
    response.end(upstream_broken("reset"))

    assert told(played.trace()) == ("client_gone", "drain", "partial", None)
    assert played.trace().error is None


@pytest.mark.parametrize(
    "timeouts", ['total = "5s"', 'idle = "5s"', 'total = "5s", first_byte = "off"']
)
def test_the_deadlines_hold_for_what_is_read_on(timeouts: str) -> None:
    """The provider is given up as ever, and the client's leaving stays the reason."""
    played, response = streaming(DRAIN + f"timeouts = {{ {timeouts} }}")
    played.transport.end(FIN)
    played.clock.advance(4.9)
    early = response.aborts
    played.clock.advance(0.2)

    assert (early, response.aborts > 0) == (0, True)
    trace = played.trace()
    assert told(trace) == ("client_gone", "drain", "partial", None)
    assert trace.error is None


def test_a_stalled_client_is_dropped_and_its_response_read_on() -> None:
    """The relay it held up runs again, to the end; the reason is the stalling."""
    played, response = streaming(DRAIN + 'timeouts = { client_stall = "3s", idle = "off" }')
    played.transport.producer.pauseProducing()
    played.transport.hold(3)
    assert response.transport.is_paused()
    played.clock.pump([0.5] * 10)
    assert played.transport.count("abort") == 1
    played.transport.end(RESET)
    assert not response.aborts
    assert not response.transport.is_paused()
    response.push(LAST_COUNTS, DONE)
    response.end()

    assert told(played.trace()) == ("client_stalled", "drain", "reported", 5)


def test_a_slow_client_that_leaves_lets_the_relay_go_on() -> None:
    """A relay that stood still for it reads again, and its pause is over."""
    played, response = streaming()
    played.transport.producer.pauseProducing()
    played.clock.advance(2)
    played.transport.end(RESET)
    assert not response.transport.is_paused()
    played.clock.advance(2)
    response.push(LAST_COUNTS, DONE)
    response.end()

    assert told(played.trace()) == ("client_gone", "drain", "reported", 5)
    assert played.trace().paused_s == 2


@pytest.mark.parametrize("phase", ["head", "body"])
def test_the_end_of_the_process_ends_every_drain(phase: str) -> None:
    """Each has its record, with what it said so far."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT)
    response = played.response(200, SSE) if phase == "body" else None
    played.transport.end(FIN)
    played.recorder.close_all()

    assert told(played.trace()) == ("client_gone", "drain", "none", None)
    assert played.upstream.cancelled == (phase == "head")
    assert response is None or response.aborts
    assert len(played.gateway.detached) == 0


def test_a_second_signal_cuts_who_is_connected_and_drains_nothing() -> None:
    """It is the proxy that ends the request, and it wants to end itself."""
    played, response = streaming()
    played.site.cut()
    played.transport.end(RESET)

    assert response.aborts
    assert told(played.trace()) == ("drained", "cancel", "partial", None)


def test_a_request_that_is_not_sent_yet_is_cancelled() -> None:
    """Who leaves while the provider is being connected to has nothing that could be billed."""
    played = PlayedGateway(route=DRAIN)
    played.upstream.begins = False
    played.call(target=CHAT)
    played.transport.end(FIN)

    assert played.upstream.cancelled == 1
    assert told(played.trace()) == ("client_gone", "cancel", "none", None)


@pytest.mark.parametrize("status", [200, 429])
def test_a_response_that_cannot_be_read_ends_with_its_client(status: int) -> None:
    """A refusal, or a type that is not understood, is not read on, whoever is told first."""
    played = PlayedGateway(route=DRAIN)
    played.call(target=CHAT)
    response = played.response(status, (b"content-type", b"text/plain"))
    response.push(b"some")
    played.transport.end(FIN)

    assert response.aborts
    assert len(played.gateway.detached) == 0
    assert played.trace().on_disconnect == "cancel"
