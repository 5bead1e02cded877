"""A caller that leaves, or loses its patience, stops the provider and leaves nothing open."""

from __future__ import annotations

import threading
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.sdk.sdks import (
    KEY,
    SDKS,
    STREAMS,
    WAYS,
    Question,
    Way,
    access_line,
    eventually,
    looks_complete,
    route,
    text_of,
    trace_of,
    user,
)
from tests.sdk.stage import LAST_CHUNK, Stage, chunked_events, stream_head
from tests.support.daemon import Daemon
from tests.support.sockets import WAIT, Received, Wire

IMPATIENT_S = 0.5


def counts(proxy: Daemon, sdk: str) -> tuple[float, float]:
    """Return how many requests are being served, and how many connections the provider has busy."""
    metrics = proxy.metrics()
    active = f'llmproxy_upstream_connections{{provider="{sdk}",state="active"}}'
    return metrics["llmproxy_active_streams"], metrics[active]


def assert_nothing_left(proxy: Daemon, sdk: str) -> None:
    """Nothing is being served any more."""
    eventually(lambda: counts(proxy, sdk) == (0, 0))


@pytest.mark.parametrize("way", STREAMS, ids=str)
@pytest.mark.parametrize("model", ["demo-slow", "demo-20tps"])
def test_leaving_in_mid_stream_ends_everything(way: Way, model: str, proxy: Daemon) -> None:
    """While the caller reads, one stream is active at both ends; after a break, none is."""
    assert_nothing_left(proxy, way.sdk)
    during: list[tuple[float, float]] = []

    def leave_with_a_token(item: Any) -> bool:
        if not text_of(way.sdk, [item]):
            return False
        during.append(counts(proxy, way.sdk))
        return True

    outcome = way.ask(Question(base=route(proxy, way.sdk), model=model, each=leave_with_a_token))
    assert text_of(way.sdk, outcome.response) == "You"
    assert during == [(1, 1)]
    line = access_line(proxy, outcome.session)
    assert (line["end_reason"], line["is_complete"]) == ("client_gone", False)
    assert line["status"] == 200
    assert_nothing_left(proxy, way.sdk)


def leave_openai_helper(base: str) -> None:
    """Leave the helper's block in the middle."""
    with (
        openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, max_retries=0, timeout=WAIT) as client,
        client.chat.completions.stream(model="demo-slow", messages=user("hi")) as stream,
    ):
        assert next(iter(stream)).type == "chunk"


def leave_anthropic_helper(base: str) -> None:
    """Leave the helper's block in the middle."""
    with (
        anthropic.Anthropic(base_url=base, api_key=KEY, max_retries=0, timeout=WAIT) as client,
        client.messages.stream(model="demo-slow", max_tokens=99, messages=user("hi")) as stream,
    ):
        assert next(iter(stream)).type == "message_start"


@pytest.mark.parametrize(
    ("sdk", "leave"), [("openai", leave_openai_helper), ("anthropic", leave_anthropic_helper)]
)
def test_leaving_a_stream_helper_ends_everything(sdk: str, leave: Any, proxy: Daemon) -> None:
    """The end of the helper's block is the end of the request, as if the caller had hung up."""
    before = proxy.metrics().get('llmproxy_ended_total{reason="client_gone"}', 0)
    leave(route(proxy, sdk))
    assert_nothing_left(proxy, sdk)
    assert proxy.metrics()['llmproxy_ended_total{reason="client_gone"}'] == before + 1


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_provider_sees_the_caller_leave(way: Way, stage: Stage, stage_proxy: Daemon) -> None:
    """The provider's connection closes in mid-stream, so that it can stop its work."""
    closed = threading.Event()

    def stream_without_an_end(wire: Wire, request: Received) -> None:
        wire.send(stream_head(way.sdk), chunked_events(way.sdk)[0])
        wire.wait_closed()
        closed.set()

    stage.response = stream_without_an_end
    outcome = way.ask(Question(base=route(stage_proxy, way.sdk), each=lambda _: True))
    assert len(outcome.response) == 1
    assert closed.wait(WAIT)
    assert access_line(stage_proxy, outcome.session)["end_reason"] == "client_gone"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_running_out_of_patience_in_mid_body_is_leaving(way: Way, proxy: Daemon) -> None:
    """A provider that falls silent meets the SDK's own timeout, and the request ends with it."""
    outcome = way.ask(
        Question(base=route(proxy, way.sdk), model="demo-stall", patience=IMPATIENT_S)
    )
    assert_timed_out(outcome.failure)
    assert not looks_complete(way.sdk, outcome.objects)
    line = access_line(proxy, outcome.session)
    assert (line["end_reason"], line["status"]) == ("client_gone", 200)
    assert_nothing_left(proxy, way.sdk)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_running_out_of_patience_before_the_head_is_leaving(
    way: Way, stage: Stage, stage_proxy: Daemon
) -> None:
    """A caller that gives up before there is a response has the provider's connection closed."""
    closed = threading.Event()

    def never_answer(wire: Wire, request: Received) -> None:
        wire.wait_closed()
        closed.set()

    stage.response = never_answer
    outcome = way.ask(Question(base=route(stage_proxy, way.sdk), patience=IMPATIENT_S))
    assert_timed_out(outcome.failure)
    assert closed.wait(WAIT)
    line = access_line(stage_proxy, outcome.session)
    assert line["end_reason"] == "client_gone"
    assert "status" not in line
    assert_nothing_left(stage_proxy, way.sdk)


def assert_timed_out(error: Exception) -> None:
    """The SDK says that it waited for too long."""
    if not isinstance(error, (openai.APITimeoutError, anthropic.APITimeoutError)):
        assert type(error).__name__ == httpx.ReadTimeout.__name__


@pytest.mark.parametrize("sdk", SDKS[:2])
def test_leaving_at_the_end_marker_is_a_complete_request(
    sdk: str, stage: Stage, stage_proxy: Daemon
) -> None:
    """An SDK that closes at [DONE] or message_stop has had the whole response (design 7)."""

    def withhold_the_last_chunk(wire: Wire, request: Received) -> None:
        wire.send(stream_head(sdk), *chunked_events(sdk))
        wire.wait_closed()

    stage.response = withhold_the_last_chunk
    way = Way(sdk, is_async=False, stream=True)
    outcome = way.ask(
        Question(
            base=route(stage_proxy, sdk),
            each=lambda item: getattr(item, "type", "") == "message_stop",
        )
    )
    assert text_of(sdk, outcome.response) == "Hello there"
    assert looks_complete(sdk, outcome.objects)
    assert access_line(stage_proxy, outcome.session)["end_reason"] == "complete"


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_stream_that_was_read_to_its_end_is_complete(
    way: Way, stage: Stage, stage_proxy: Daemon
) -> None:
    """Where the end of the body comes with the end marker, the request ended as it should."""

    def send_all_at_once(wire: Wire, request: Received) -> None:
        wire.send(stream_head(way.sdk), *chunked_events(way.sdk), LAST_CHUNK)

    stage.response = send_all_at_once
    outcome = way.ask(Question(base=route(stage_proxy, way.sdk)))
    assert looks_complete(way.sdk, outcome.response)
    trace = trace_of(stage_proxy, outcome.session)
    assert (trace["end_reason"], trace["is_complete"]) == ("complete", True)
