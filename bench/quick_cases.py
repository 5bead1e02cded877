"""The cases of ``make bench-quick`` that need no socket: grammar, and an event's way.

An event's way is the whole one: a provider's ``Connection.dataReceived``, the chunked reader, the
relay, ``Request.write`` and the channel, between two transports that drop what is written.  With a
tap, what it reads of the event is on top of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.web.server import NOT_DONE_YET

from bench.quick import Case
from llmproxy.config import Limits, Timeouts
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.http1.framing import ChunkedReader
from llmproxy.http1.grammar import parse_fields
from llmproxy.record.metrics import Metrics
from llmproxy.server.handler import Handler, Router
from llmproxy.server.site import Site
from llmproxy.stream.relay import Batch, Relay
from llmproxy.stream.tap import StreamAccumulator
from llmproxy.upstream.http1 import Connection
from llmproxy.upstream.response import Response

EVENT = b"data: " + b"x" * 215 + b"\n\n"
"""As long as a usual one of OpenAI's: 223 bytes."""

CHUNK = (
    b'data: {"id":"chatcmpl-Cx7hK2mZq9T4bWn3","object":"chat.completion.chunk",'
    b'"created":1793577600,"model":"gpt-4o-2024-08-06","service_tier":"default","choices":['
    b'{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)
"""One token as OpenAI sends it, as long as the event above."""

LARGE = b"x" * 16382 + b"\n\n"

REQUEST = b"POST /x HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2\r\n\r\n{}"
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
FIELDS = [
    b"Host: api.openai.com",
    b"Accept: application/json",
    b"Accept-Encoding: gzip, deflate",
    b"Connection: keep-alive",
    b"Content-Type: application/json",
    b"User-Agent: OpenAI/Python 1.99.1",
    b"X-Stainless-Lang: python",
    b"X-Stainless-Package-Version: 1.99.1",
    b"X-Stainless-OS: Linux",
    b"X-Stainless-Runtime-Version: 3.11.7",
    b"Authorization: Bearer sk-proj-0123456789abcdefghijklmnopqrstuvwxyz",
    b"Content-Length: 512",
]


_REST_S = 60e-6
"""Seconds between two events, about as with 10,000 a second."""

Capture = Literal["usage", "content"]

_CAPTURES: tuple[Capture, ...] = ("usage", "content")


def chunk(data: bytes) -> bytes:
    """Return one chunk of the chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def every() -> Iterator[Case]:
    """Yield each case."""
    yield Case("grammar: parse_fields, 12 fields", 20_000, repeating(parse_fields, FIELDS))
    for name, data, count in (("223 B", EVENT, 100_000), ("16 KiB", LARGE, 20_000)):
        feed = ChunkedReader().feed
        yield Case(f"grammar: ChunkedReader.feed, {name}", count, repeating(feed, chunk(data)))
    for name, data, count in (("223 B", EVENT, 30_000), ("16 KiB", LARGE, 10_000)):
        deliver = relay_between_nothing()
        yield Case(f"event in memory, {name}", count, repeating(deliver, chunk(data)))
    for capture in _CAPTURES:
        deliver = relay_between_nothing(capture)
        yield Case(
            f"event in memory, 223 B, tap {capture}", 30_000, repeating(deliver, chunk(CHUNK))
        )
    deliver = relay_between_nothing("usage")
    yield Case(
        "event in memory, 223 B, tap usage, after a rest", 2000, rested(deliver, chunk(CHUNK))
    )


def repeating(call: Callable[[Any], object], argument: Any) -> Callable[[int], float]:
    """Return what calls ``call`` so many times, and says how long that took."""

    def run(count: int) -> float:
        began = time.process_time()
        for _ in range(count):
            call(argument)
        return time.process_time() - began

    return run


def rested(call: Callable[[Any], object], argument: Any) -> Callable[[int], float]:
    """Return what calls ``call`` so many times, after a rest each, and says how long that took.

    Meanwhile the processor forgets the code, as it does between two events of a quiet proxy.
    """

    def run(count: int) -> float:
        took = 0.0
        for _ in range(count):
            time.sleep(_REST_S)
            began = time.perf_counter()
            call(argument)
            took += time.perf_counter() - began
        return took

    return run


class Nowhere(StringTransport):
    """A transport that drops what is written; the rest is Twisted's own stand-in."""

    written = 0

    def __init__(self) -> None:
        super().__init__(lenient=True)
        self.dataBuffer = b""
        self.offset = 0
        self._tempDataLen = 0

    def write(self, data: bytes) -> None:
        """Drop it."""

    def abortConnection(self) -> None:
        """Nothing is left to drop."""


class Kept(Handler):
    """Keeps the request that it is asked to render."""

    request: Any

    def body_limit(self, request: Any) -> int:
        """Return as much as the case needs."""
        return 1000

    def render(self, request: Any) -> int:
        """Keep it."""
        self.request = request
        return NOT_DONE_YET


def tap(capture: Capture) -> StreamAccumulator:
    """Return a tap for a chat stream; its budget for a text lasts as long as any measurement."""
    row = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
    assert row is not None
    kind = b"text/event-stream; charset=utf-8"
    return StreamAccumulator(row, content_type=kind, capture=capture, accumulate=1024**3)


def relay_between_nothing(capture: Capture | None = None) -> Callable[[bytes], None]:
    """Begin an endless stream; return what takes the provider's bytes.

    Args:
        capture: what a tap keeps that reads the stream; without it there is none.
    """
    kept, clock = Kept(), Clock()
    limits, timeouts = Limits(), Timeouts()
    site = Site(Router(kept), clock, time.monotonic, timeouts, limits, wall=time.monotonic)
    channel = site.buildProtocol(None)
    channel.makeConnection(Nowhere())
    channel.dataReceived(REQUEST)
    provider = Connection(
        max_head=65536, became_idle=lambda _: None, closed=lambda _: None, secure=False
    )
    provider.makeConnection(Nowhere())
    responses: list[Response] = []
    provider.send(b"POST", b"POST / HTTP/1.1\r\n\r\n", None).addCallback(responses.append)
    provider.dataReceived(HEAD)
    (response,) = responses
    kept.request.start(response.code, response.fields[:2])
    metrics = Metrics("0")
    relay = Relay(
        response,
        kept.request,
        clock,
        time.monotonic,
        idle=300.0,
        batch=Batch(),
        gaps=metrics.gap.observe,
        delays=metrics.relay_delay.observe,
        copy=None if capture is None else tap(capture).feed,
    )
    relay.start()
    kept.request.flush()
    return provider.dataReceived
