"""What the provider sends is with the SDK at once: head before body, each event by itself."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from tests.sdk.clients import KITS, OPENAI, Kit
from tests.sdk.directed_provider import (
    DirectedProvider,
    asks_for_stream,
    chunked_events,
    sdk_of,
    send_json,
    stream_head,
    whole,
)
from tests.sdk.sdks import STREAMS, WHOLES, Question, Way, route, text_of
from tests.support.scripts import LAST, Turn
from tests.support.sockets import Received, Wire


@pytest.fixture
def turn(directed: DirectedProvider) -> Turn:
    """The body of every whole response, and each event of a stream, takes a turn."""
    turn = Turn()

    def response(wire: Wire, request: Received) -> None:
        sdk = sdk_of(request)
        if not asks_for_stream(request):
            body = whole(sdk)
            wire.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            wire.send(b"content-length: %d\r\n\r\n" % len(body))
            turn.take()
            wire.send(body)
            return
        wire.send(stream_head(sdk))
        for event in chunked_events(sdk):
            turn.take()
            wire.send(event)
        wire.send(LAST)

    directed.response = response
    return turn


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_each_event_arrives_before_the_next_is_sent(
    way: Way, turn: Turn, directed: DirectedProvider
) -> None:
    """The provider sends an event only once the SDK has given out the one before."""

    def see(item: Any) -> bool:
        turn.give()
        return False

    turn.give()
    outcome = way.ask(Question(base=route(directed.proxy, way.sdk), each=see))
    assert text_of(way.sdk, outcome.response) == "Hello there"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kit", KITS, ids=str)
def test_head_arrives_before_there_is_a_body(
    kit: Kit, stream: bool, turn: Turn, directed: DirectedProvider
) -> None:
    """The SDK shows status and fields while the provider has sent no byte of the body yet."""
    with kit.open(route(directed.proxy, kit.name)) as client:
        create = kit.calls(client).with_streaming_response.create
        with create(**kit.asked(), stream=stream) as response:
            assert response.status_code == 200
            assert response.headers["x-llmproxy-request-id"]
            turn.give(9)
            assert b"Hello" in response.read()


def test_head_arrives_before_there_is_a_body_async(turn: Turn, directed: DirectedProvider) -> None:
    """The async view of a response begins with the head, too."""

    async def scene(client: Any) -> bytes:
        create = OPENAI.calls(client).with_streaming_response.create
        async with create(**OPENAI.asked(), stream=True) as response:
            assert response.headers["content-type"] == "text/event-stream"
            turn.give(9)
            body: bytes = await response.read()
            return body

    assert b"Hello" in OPENAI.run_async(route(directed.proxy, "openai"), scene)


@pytest.mark.parametrize("way", WHOLES, ids=str)
def test_encoded_response_is_decoded_by_the_sdk(way: Way, directed: DirectedProvider) -> None:
    """The SDK's own Accept-Encoding crosses for a whole response, and gzip comes back."""

    def compress(wire: Wire, request: Received) -> None:
        (accepted,) = request.values(b"accept-encoding")
        assert b"gzip" in accepted
        send_json(wire, gzip.compress(whole(way.sdk)), encoding=b"gzip")

    directed.response = compress
    outcome = way.ask(Question(base=route(directed.proxy, way.sdk)))
    assert text_of(way.sdk, outcome.response) == "Hello there"


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_stream_is_asked_for_unencoded(way: Way, directed: DirectedProvider) -> None:
    """The SDKs accept gzip; for a stream the provider is asked for none, as it would delay it."""
    way.ask(Question(base=route(directed.proxy, way.sdk)))
    (request,) = directed.received
    assert request.values(b"accept-encoding") == [b"identity"]
