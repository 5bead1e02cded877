"""A caller that leaves, or loses its patience, stops the provider and leaves nothing open."""

from __future__ import annotations

import threading
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.sdk.clients import KITS, Kit
from tests.sdk.directed_provider import DirectedProvider, chunked_events, stream_head
from tests.sdk.sdks import (
    SDKS,
    STREAMS,
    WAYS,
    Question,
    Way,
    access_line,
    looks_complete,
    route,
    text_of,
)
from tests.support.daemon import Daemon
from tests.support.live_proxy import until
from tests.support.sockets import WAIT, Received, Wire

IMPATIENT_S = 0.5


def counts(proxy: Daemon, sdk: str) -> tuple[float, float]:
    """Return how many requests are being served, and how many connections the provider has busy."""
    metrics = proxy.metrics()
    active = f'llmproxy_upstream_connections{{provider="{sdk}",state="active"}}'
    return metrics["llmproxy_active_streams"], metrics[active]


def assert_nothing_left(proxy: Daemon, sdk: str) -> None:
    """Nothing is being served any more."""
    until(lambda: counts(proxy, sdk) == (0, 0), "nothing is left")


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


@pytest.mark.parametrize("kit", KITS, ids=str)
def test_leaving_a_stream_helper_ends_everything(kit: Kit, proxy: Daemon) -> None:
    """The end of the helper's block is the end of the request, as if the caller had hung up."""
    before = proxy.metrics().get('llmproxy_ended_total{reason="client_gone"}', 0)
    with (
        kit.open(route(proxy, kit.name)) as client,
        kit.calls(client).stream(**kit.asked(model="demo-slow")) as stream,
    ):
        assert next(iter(stream)).type in ("chunk", "message_start")
    assert_nothing_left(proxy, kit.name)
    assert proxy.metrics()['llmproxy_ended_total{reason="client_gone"}'] == before + 1


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
    way: Way, directed: DirectedProvider
) -> None:
    """A caller that gives up before there is a response has the provider's connection closed."""
    closed = threading.Event()

    def never_respond(wire: Wire, request: Received) -> None:
        wire.wait_closed()
        closed.set()

    directed.response = never_respond
    outcome = way.ask(Question(base=route(directed.proxy, way.sdk), patience=IMPATIENT_S))
    assert_timed_out(outcome.failure)
    assert closed.wait(WAIT)
    line = access_line(directed.proxy, outcome.session)
    assert line["end_reason"] == "client_gone"
    assert "status" not in line
    assert_nothing_left(directed.proxy, way.sdk)


def assert_timed_out(error: Exception) -> None:
    """The SDK says that it waited for too long."""
    if not isinstance(error, (openai.APITimeoutError, anthropic.APITimeoutError)):
        assert type(error).__name__ == httpx.ReadTimeout.__name__


@pytest.mark.parametrize("sdk", SDKS[:2])
def test_leaving_at_the_end_marker_is_a_complete_request(
    sdk: str, directed: DirectedProvider
) -> None:
    """An SDK that closes at [DONE] or message_stop has had the whole response (design 7)."""

    def withhold_the_last_chunk(wire: Wire, request: Received) -> None:
        wire.send(stream_head(sdk), *chunked_events(sdk))
        wire.wait_closed()

    directed.response = withhold_the_last_chunk
    way = Way(sdk, is_async=False, stream=True)
    outcome = way.ask(
        Question(
            base=route(directed.proxy, sdk),
            each=lambda item: getattr(item, "type", "") == "message_stop",
        )
    )
    assert text_of(sdk, outcome.response) == "Hello there"
    assert looks_complete(sdk, outcome.objects)
    assert access_line(directed.proxy, outcome.session)["end_reason"] == "complete"
