"""A response whose client has left is read on for its usage, within its bounds, or cancelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmproxy.errors import upstream_broken
from llmproxy.record.trace import Trace
from tests.gateway.test_gateway import SSE, Response, Stage
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


def streaming(route: str = DRAIN, more: str = "") -> tuple[Stage, Response]:
    """A stream that has begun, on a route that drains."""
    stage = Stage(route=route, more=more)
    stage.call(target=CHAT)
    response = stage.response(200, SSE)
    response.push(FIRST)
    return stage, response


def told(trace: Trace) -> tuple[Any, ...]:
    """Return what a record says of a client's leaving."""
    return trace.end_reason, trace.on_disconnect, trace.usage, trace.output_tokens


@pytest.mark.parametrize("reason", [FIN, RESET])
def test_a_response_is_read_on_for_its_usage(reason: Exception) -> None:
    """The last counts are in the record, which still says that the client left; it got no more."""
    stage, response = streaming()
    stage.transport.end(reason)
    assert not response.aborts
    assert len(stage.gateway.detached) == 1
    assert not stage.sink.traces
    response.push(LAST_COUNTS, DONE)
    response.end()

    trace = stage.trace()
    assert told(trace) == ("client_gone", "drain", "reported", 5)
    assert (trace.is_complete, trace.bytes_out, trace.status) == (False, len(FIRST), 200)
    assert len(stage.gateway.detached) == 0
    labels = {"client": "c", "provider": "p", "model": "other"}
    assert stage.value("tokens_total", **labels, type="input") == 3
    assert stage.value("tokens_total", **labels, type="output") == 5
    assert stage.value("cancel_seconds_count") == 0


def test_bytes_that_nobody_gets_are_no_bytes_out() -> None:
    """Counters and record agree on what went out, while it runs and after."""
    stage, response = streaming()
    stage.transport.end(FIN)
    for push in (lambda: response.push(LAST_COUNTS, DONE), response.end):
        push()
        assert stage.value("bytes_total", direction="out") == len(FIRST)
        assert stage.value("chunks_total") == 1

    assert (stage.trace().bytes_out, stage.trace().chunks) == (len(FIRST), 1)


def test_a_response_is_read_on_for_so_long_at_most() -> None:
    """Then the provider's connection is closed, and the record has what was known by then."""
    stage, response = streaming(DRAIN + 'drain_for = "7s"')
    stage.transport.end(FIN)
    stage.clock.advance(6.9)
    early = response.aborts
    stage.clock.advance(0.2)

    assert (early, response.aborts > 0) == (0, True)
    trace = stage.trace()
    assert told(trace) == ("client_gone", "drain", "partial", None)
    assert (trace.input_tokens, trace.error) == (3, None)
    assert len(stage.gateway.detached) == 0


def test_only_so_many_are_read_on_at_once() -> None:
    """One more is cancelled; when there is room again the next one is not."""
    stage = Stage(route=DRAIN, more="[limits]\ndrains = 1\n")
    responses = []
    for number in range(3):
        if number:
            stage.connect()
        stage.call(target=CHAT)
        responses.append((stage.response(200, SSE), stage.transport))
    (first, one), (_, two), (third, three) = responses
    one.end(FIN)
    two.end(FIN)
    stage.clock.advance(0)
    assert [bool(response.aborts) for response, _ in responses] == [False, True, False]
    first.push(LAST_COUNTS, DONE)
    first.end()
    three.end(FIN)
    assert not third.aborts
    third.push(LAST_COUNTS, DONE)
    third.end()

    assert [told(trace) for trace in stage.sink.traces] == [
        ("client_gone", "cancel", "none", None),
        ("client_gone", "drain", "reported", 5),
        ("client_gone", "drain", "reported", 5),
    ]
    assert stage.value("cancel_seconds_count") == 1
    assert not stage.clock.getDelayedCalls()


def test_no_drain_at_all_may_be_allowed() -> None:
    """``limits.drains = 0`` cancels each."""
    stage, response = streaming(more="[limits]\ndrains = 0\n")
    stage.transport.end(FIN)

    assert response.aborts
    assert told(stage.trace()) == ("client_gone", "cancel", "partial", None)


def test_a_response_whose_head_is_waited_for_is_read() -> None:
    """The provider works already; the usage of the document is reported, a zero of it, too."""
    stage = Stage(route=DRAIN)
    stage.call(target=CHAT, body=b'{"model": "m"}')
    stage.transport.end(FIN)
    assert not stage.upstream.cancelled
    response = stage.response(200, KIND, (b"content-length", b"%d" % len(WHOLE)))
    response.push(WHOLE[:9], WHOLE[9:])
    response.end()

    trace = stage.trace()
    assert told(trace) == ("client_gone", "drain", "reported", 0)
    assert (trace.status, trace.bytes_out, trace.chunks, trace.is_complete) == (None, 0, 0, False)
    assert stage.value("bytes_total", direction="out") == 0
    assert trace.attempts[0].outcome == "ok"
    assert not stage.transport.writes


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
    stage = Stage(route=DRAIN)
    stage.call(target=CHAT)
    stage.transport.end(FIN)
    response = stage.response(code, *fields)

    assert response.aborts
    assert response.body is None
    assert told(stage.trace()) == ("client_gone", "drain", "none", None)


NOT_READ_ON: dict[str, Callable[[Stage], object]] = {
    "a route that cancels": lambda stage: None,
    "an endpoint that is not known": lambda stage: stage.call(target="/p/v1/files"),
    "a GET": lambda stage: stage.call("GET", CHAT, body=b""),
    "half a request": lambda stage: stage.send(
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
    stage = Stage(route="" if what == "a route that cancels" else DRAIN)
    facts(stage)
    if not stage.upstream.asked:
        stage.call(target=CHAT)
    stage.transport.end(FIN)

    assert stage.upstream.cancelled == 1
    assert told(stage.trace())[:2] == ("client_gone", "cancel")


def test_a_record_of_a_client_that_stayed_says_nothing_of_leaving() -> None:
    """Null, on a route that drains as on any other."""
    stage, response = streaming()
    response.push(LAST_COUNTS, DONE)
    response.end()

    assert told(stage.trace()) == ("complete", None, "reported", 5)


def test_a_client_that_leaves_at_the_end_marker_got_everything() -> None:
    """There is nothing to read on for."""
    stage, response = streaming()
    response.push(LAST_COUNTS, DONE)
    stage.transport.end(FIN)

    assert response.aborts
    trace = stage.trace()
    assert told(trace) == ("complete", "cancel", "reported", 5)
    assert trace.is_complete


def test_a_client_that_leaves_at_the_providers_error_did_so_because_of_it() -> None:
    """SDKs close there: the request failed, and nothing is read on for."""
    stage, response = streaming()
    response.push(ERROR)
    stage.transport.end(FIN)

    assert response.aborts
    assert told(stage.trace()) == ("upstream_failed", "cancel", "partial", None)


def test_a_provider_that_fails_while_nobody_listens_does_not_change_why_it_ended() -> None:
    """The client had left before."""
    stage, response = streaming()
    stage.transport.end(FIN)
    response.push(ERROR)
    response.end()

    assert told(stage.trace()) == ("client_gone", "drain", "partial", None)


def test_a_provider_that_breaks_while_nobody_listens_leaves_what_it_said() -> None:
    """The client was told nothing of it, and the record has no word for what it was told."""
    stage, response = streaming()
    stage.transport.end(FIN)
    response.end(upstream_broken("reset"))

    assert told(stage.trace()) == ("client_gone", "drain", "partial", None)
    assert stage.trace().error is None


@pytest.mark.parametrize(
    "timeouts", ['total = "5s"', 'idle = "5s"', 'total = "5s", first_byte = "off"']
)
def test_the_deadlines_hold_for_what_is_read_on(timeouts: str) -> None:
    """The provider is given up as ever, and the client's leaving stays the reason."""
    stage, response = streaming(DRAIN + f"timeouts = {{ {timeouts} }}")
    stage.transport.end(FIN)
    stage.clock.advance(4.9)
    early = response.aborts
    stage.clock.advance(0.2)

    assert (early, response.aborts > 0) == (0, True)
    trace = stage.trace()
    assert told(trace) == ("client_gone", "drain", "partial", None)
    assert trace.error is None


def test_a_stalled_client_is_dropped_and_its_response_read_on() -> None:
    """The relay it held up runs again, to the end; the reason is the stalling."""
    stage, response = streaming(DRAIN + 'timeouts = { client_stall = "3s", idle = "off" }')
    stage.transport.producer.pauseProducing()
    stage.transport.hold(3)
    assert response.transport.is_paused()
    stage.clock.pump([0.5] * 10)
    assert stage.transport.count("abort") == 1
    stage.transport.end(RESET)
    assert not response.aborts
    assert not response.transport.is_paused()
    response.push(LAST_COUNTS, DONE)
    response.end()

    assert told(stage.trace()) == ("client_stalled", "drain", "reported", 5)


def test_a_slow_client_that_leaves_lets_the_relay_go_on() -> None:
    """A relay that stood still for it reads again, and its pause is over."""
    stage, response = streaming()
    stage.transport.producer.pauseProducing()
    stage.clock.advance(2)
    stage.transport.end(RESET)
    assert not response.transport.is_paused()
    stage.clock.advance(2)
    response.push(LAST_COUNTS, DONE)
    response.end()

    assert told(stage.trace()) == ("client_gone", "drain", "reported", 5)
    assert stage.trace().paused_s == 2


@pytest.mark.parametrize("phase", ["head", "body"])
def test_the_end_of_the_process_ends_every_drain(phase: str) -> None:
    """Each has its record, with what it said so far."""
    stage = Stage(route=DRAIN)
    stage.call(target=CHAT)
    response = stage.response(200, SSE) if phase == "body" else None
    stage.transport.end(FIN)
    stage.recorder.close_all()

    assert told(stage.trace()) == ("client_gone", "drain", "none", None)
    assert stage.upstream.cancelled == (phase == "head")
    assert response is None or response.aborts
    assert len(stage.gateway.detached) == 0


def test_a_second_signal_cuts_who_is_connected_and_drains_nothing() -> None:
    """It is the proxy that ends the request, and it wants to end itself."""
    stage, response = streaming()
    stage.site.cut()
    stage.transport.end(RESET)

    assert response.aborts
    assert told(stage.trace()) == ("drained", "cancel", "partial", None)


def test_a_request_that_is_not_sent_yet_is_cancelled() -> None:
    """Who leaves while the provider is being connected to has nothing that could be billed."""
    stage = Stage(route=DRAIN)
    stage.upstream.begins = False
    stage.call(target=CHAT)
    stage.transport.end(FIN)

    assert stage.upstream.cancelled == 1
    assert told(stage.trace()) == ("client_gone", "cancel", "none", None)


@pytest.mark.parametrize("status", [200, 429])
def test_a_response_that_cannot_be_read_ends_with_its_client(status: int) -> None:
    """A refusal, or a type that is not understood, is not read on, whoever is told first."""
    stage = Stage(route=DRAIN)
    stage.call(target=CHAT)
    response = stage.response(status, (b"content-type", b"text/plain"))
    response.push(b"some")
    stage.transport.end(FIN)

    assert response.aborts
    assert len(stage.gateway.detached) == 0
    assert stage.trace().on_disconnect == "cancel"
