"""What the provider sends is with the SDK at once: head before body, each event by itself."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.sdk.sdks import (
    KEY,
    STREAMS,
    WHOLES,
    Question,
    Way,
    route,
    text_of,
    user,
)
from tests.sdk.stage import (
    LAST_CHUNK,
    Stage,
    asks_for_stream,
    chunked_events,
    sdk_of,
    send_json,
    stream_head,
    whole,
)
from tests.support.daemon import Daemon
from tests.support.sockets import WAIT, Received, Wire


class Gate:
    """Holds a provider back until the caller says what it has seen."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)

    def open(self) -> None:
        """Let one more thing be sent."""
        self._passes.release()

    def wait(self) -> None:
        """Wait until one more thing may be sent."""
        if not self._passes.acquire(timeout=WAIT / 2):
            raise TimeoutError("the caller did not see what was sent before")


@pytest.fixture
def gate(stage: Stage) -> Gate:
    """A gate before the body of every response, and before each event of a stream."""
    gate = Gate()

    def response(wire: Wire, request: Received) -> None:
        sdk = sdk_of(request)
        if not asks_for_stream(request):
            body = whole(sdk)
            wire.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
            wire.send(b"content-length: %d\r\n\r\n" % len(body))
            gate.wait()
            wire.send(body)
            return
        wire.send(stream_head(sdk))
        for event in chunked_events(sdk):
            gate.wait()
            wire.send(event)
        wire.send(LAST_CHUNK)

    stage.response = response
    return gate


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_each_event_arrives_before_the_next_is_sent(
    way: Way, gate: Gate, stage_proxy: Daemon
) -> None:
    """In lock-step: the provider sends an event only once the SDK has given out the one before."""

    def see(item: Any) -> bool:
        gate.open()
        return False

    gate.open()
    outcome = way.ask(Question(base=route(stage_proxy, way.sdk), each=see))
    assert text_of(way.sdk, outcome.response) == "Hello there"


@pytest.fixture
def openai_client(stage_proxy: Daemon) -> Iterator[openai.OpenAI]:
    """The OpenAI SDK's client."""
    base = f"{route(stage_proxy, 'openai')}/v1"
    with openai.OpenAI(base_url=base, api_key=KEY, max_retries=0, timeout=WAIT) as client:
        yield client


@pytest.fixture
def anthropic_client(stage_proxy: Daemon) -> Iterator[anthropic.Anthropic]:
    """The Anthropic SDK's client."""
    base = route(stage_proxy, "anthropic")
    with anthropic.Anthropic(base_url=base, api_key=KEY, max_retries=0, timeout=WAIT) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_head_arrives_before_there_is_a_body_openai(
    stream: bool, gate: Gate, openai_client: openai.OpenAI
) -> None:
    """The SDK shows status and fields while the provider has sent no byte of the body yet."""
    create: Any = openai_client.chat.completions.with_streaming_response.create
    with create(model="m", messages=user("hi"), stream=stream) as response:
        assert response.status_code == 200
        assert response.headers["x-llmproxy-request-id"]
        for _ in range(9):
            gate.open()
        assert b"Hello" in response.read()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_head_arrives_before_there_is_a_body_anthropic(
    stream: bool, gate: Gate, anthropic_client: anthropic.Anthropic
) -> None:
    """The SDK shows status and fields while the provider has sent no byte of the body yet."""
    create: Any = anthropic_client.messages.with_streaming_response.create
    asked = {"model": "m", "max_tokens": 9, "messages": user("hi"), "stream": stream}
    with create(**asked) as response:
        assert response.status_code == 200
        assert response.headers["x-llmproxy-request-id"]
        for _ in range(9):
            gate.open()
        assert b"Hello" in response.read()


def test_head_arrives_before_there_is_a_body_async(gate: Gate, stage_proxy: Daemon) -> None:
    """The async view of a response begins with the head, too."""
    base = f"{route(stage_proxy, 'openai')}/v1"

    async def scene() -> bytes:
        async with openai.AsyncOpenAI(
            base_url=base, api_key=KEY, max_retries=0, timeout=WAIT
        ) as client:
            create: Any = client.chat.completions.with_streaming_response.create
            async with create(model="m", messages=user("hi"), stream=True) as response:
                assert response.headers["content-type"] == "text/event-stream"
                for _ in range(9):
                    gate.open()
                body: bytes = await response.read()
                return body

    assert b"Hello" in asyncio.run(scene())


@pytest.mark.parametrize("way", WHOLES, ids=str)
def test_encoded_response_is_decoded_by_the_sdk(
    way: Way, stage: Stage, stage_proxy: Daemon
) -> None:
    """Where no stream is asked for, the SDK's own Accept-Encoding crosses, and gzip comes back."""

    def compress(wire: Wire, request: Received) -> None:
        (accepted,) = request.values(b"accept-encoding")
        assert b"gzip" in accepted
        send_json(wire, gzip.compress(whole(way.sdk)), encoding=b"gzip")

    stage.response = compress
    outcome = way.ask(Question(base=route(stage_proxy, way.sdk)))
    assert text_of(way.sdk, outcome.response) == "Hello there"


@pytest.mark.parametrize("way", STREAMS, ids=str)
def test_stream_is_asked_for_unencoded(way: Way, stage: Stage, stage_proxy: Daemon) -> None:
    """The SDKs accept gzip; for a stream, which it would hold up, the provider hears of none."""
    way.ask(Question(base=route(stage_proxy, way.sdk)))
    (request,) = stage.received
    assert request.values(b"accept-encoding") == [b"identity"]
