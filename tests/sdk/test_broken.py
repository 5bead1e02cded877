"""A response that breaks raises in the SDK, and what it gave before never looks whole."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest

from tests.sdk.clients import KITS, Kit
from tests.sdk.directed_provider import DirectedProvider, chunked_events, events, stream_head
from tests.sdk.sdks import (
    STREAMS,
    WAYS,
    Outcome,
    Question,
    Way,
    looks_complete,
    route,
    text_of,
    trace_of,
)
from tests.support.daemon import Daemon
from tests.support.scripts import LAST
from tests.support.sockets import Received, Wire, chunked

BROKEN = [("demo-break", "upstream_broken"), ("demo-malformed", "upstream_protocol")]

LOST = (
    openai.APIConnectionError,
    anthropic.APIConnectionError,
    httpx.RemoteProtocolError,
    httpx2.RemoteProtocolError,
)
"""What the SDKs raise over a body that breaks off; Anthropic's only wraps it in whole responses."""


def assert_lost(outcome: Outcome) -> None:
    """The connection was lost, which is neither a timeout nor a response."""
    error = outcome.failure
    assert isinstance(error, LOST)
    assert not isinstance(error, (openai.APITimeoutError, anthropic.APITimeoutError))


def assert_recorded_as_broken(proxy: Daemon, session: str, reason: str) -> None:
    """The trace says how it ended and that it is not complete, after a status that was fine."""
    trace = trace_of(proxy, session)
    assert (trace["end_reason"], trace["error"]) == (reason, reason)
    assert trace["is_complete"] is False
    assert trace["status"] == 200


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("model", "reason"), BROKEN)
def test_broken_response_raises(way: Way, model: str, reason: str, proxy: Daemon) -> None:
    """The caller has what came before the break, then the SDK's error, and never an end."""
    outcome = way.ask(Question(base=route(proxy, way.sdk), model=model))
    assert_lost(outcome)
    expected = "You said: the" if way.stream else ""
    assert text_of(way.sdk, outcome.objects) == expected
    assert not looks_complete(way.sdk, outcome.objects)
    assert_recorded_as_broken(proxy, outcome.session, reason)


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_what_came_with_a_malformed_chunk_still_arrives(
    way: Way, directed: DirectedProvider
) -> None:
    """Whole chunks that are read together with a faulty one reach the caller before the break."""

    def send_in_one_piece(wire: Wire, request: Received) -> None:
        wire.send(stream_head(way.sdk), *chunked_events(way.sdk)[:-1], b"not-a-size\r\n")
        wire.wait_closed()

    directed.response = send_in_one_piece
    outcome = way.ask(Question(base=route(directed.proxy, way.sdk)))
    assert_lost(outcome)
    assert text_of(way.sdk, outcome.objects) == "Hello there"
    assert_recorded_as_broken(directed.proxy, outcome.session, "upstream_protocol")


@pytest.mark.parametrize("way", STREAMS, ids=str)
@pytest.mark.parametrize(("model", "reason"), BROKEN)
def test_break_is_reported_in_an_event_where_the_route_says_so(
    way: Way, model: str, reason: str, proxy: Daemon
) -> None:
    """The SDK raises its error for events inside a stream, with our words."""
    outcome = way.ask(Question(base=route(proxy, f"event-{way.sdk}"), model=model))
    error = outcome.failure
    assert text_of(way.sdk, outcome.objects) == "You said: the"
    assert not looks_complete(way.sdk, outcome.objects)
    assert "The provider" in str(error)
    if way.sdk == "openai":
        assert (type(error), error.code) == (openai.APIError, reason)
    elif way.sdk == "anthropic":
        assert isinstance(error, anthropic.APIStatusError)
        assert error.type == "api_error"
    else:
        assert type(error) is ollama.ResponseError
    assert_recorded_as_broken(proxy, outcome.session, reason)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("model", "reason"), BROKEN)
def test_break_of_responses_is_an_error_of_the_sdk(
    is_async: bool, model: str, reason: str, proxy: Daemon
) -> None:
    """It is raised, with our code and words, and not handed over as one more event."""
    way = Way("openai", is_async, stream=True, endpoint="responses")
    outcome = way.ask(Question(base=route(proxy, "event-openai"), model=model))
    error = outcome.failure
    assert (type(error), error.code, error.type) == (openai.APIError, reason, "server_error")
    assert "The provider" in error.message
    assert {item.type for item in outcome.objects}.isdisjoint({"error", "response.completed"})
    assert_recorded_as_broken(proxy, outcome.session, reason)


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_the_record_sees_a_last_event_as_the_sdk_does(way: Way, directed: DirectedProvider) -> None:
    """Without the line end behind it, Anthropic's SDK drops the last event; others do not."""

    def leave_it_out(wire: Wire, request: Received) -> None:
        *pieces, last = events(way.sdk)
        wire.send(stream_head(way.sdk), chunked(*pieces, last.rstrip()), LAST)

    directed.response = leave_it_out
    outcome = way.ask(Question(base=route(directed.proxy, way.sdk)))
    is_seen = looks_complete(way.sdk, outcome.response)
    if way.sdk == "anthropic":
        is_seen = any(item.type == "message_stop" for item in outcome.objects)
    assert is_seen is (way.sdk != "anthropic")
    reason = trace_of(directed.proxy, outcome.session)["end_reason"]
    assert reason == ("complete" if is_seen else "unfinished")


@pytest.mark.parametrize("way", [way for way in WAYS if not way.stream], ids=str)
def test_break_of_a_whole_response_gets_no_event(way: Way, proxy: Daemon) -> None:
    """error_event adds nothing to a broken JSON document."""
    outcome = way.ask(Question(base=route(proxy, f"event-{way.sdk}"), model="demo-break"))
    assert_lost(outcome)
    assert outcome.objects == []


@pytest.mark.parametrize("kit", KITS, ids=str)
@pytest.mark.parametrize("model", ["demo-break", "demo-malformed"])
def test_stream_helper_gives_no_final_object(kit: Kit, model: str, proxy: Daemon) -> None:
    """A helper that waits for the final object raises and does not hand out half of one."""

    def final(model: str) -> Any:
        with (
            kit.open(route(proxy, kit.name)) as client,
            kit.calls(client).stream(**kit.asked(model=model)) as stream,
        ):
            return kit.final_of(stream)

    assert final("demo-fast")
    with pytest.raises(LOST):
        final(model)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_client_is_of_use_after_a_break(way: Way, proxy: Daemon) -> None:
    """The next question of the same kind has a whole response, whatever broke before."""
    base = route(proxy, way.sdk)
    assert_lost(way.ask(Question(base=base, model="demo-break")))
    after = way.ask(Question(base=base))
    assert looks_complete(way.sdk, after.response)
