"""A gateway behind a site; the test plays its client, its provider and its sink of traces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from llmproxy.config import parse
from llmproxy.gateway.gateway import Gateway
from llmproxy.gateway.recorder import Recorder, log_access
from llmproxy.http1.grammar import parse_fields
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import Trace
from llmproxy.server.handler import Router
from llmproxy.server.site import Site
from tests.support.fake_transport import FakeTransport
from tests.support.sockets import request

KEY = "sha256:" + hashlib.sha256(b"key").hexdigest()
JSON = "Content-Type: application/json"
BODY = b'{"model": "m", "stream": true}'
LAST = b"0\r\n\r\n"
SSE = (b"content-type", b"text/event-stream")


class PlayedResponse:
    """A provider's response; the test pushes its body, or has it come whole with the head."""

    def __init__(self, code: int, fields: tuple[tuple[bytes, bytes], ...]) -> None:
        self.code = code
        self.fields = list(fields)
        self.first = dict(reversed(self.fields))
        self.transport = FakeTransport()
        self.aborts = 0
        self.is_kept = False
        self.body: Any = None
        self.whole: bytes | None = None

    def take_whole(self) -> bytes | None:
        return self.whole

    def deliverBody(self, protocol: Any) -> None:
        self.body = protocol
        self.transport.connect(protocol)

    def abort(self) -> None:
        self.aborts += 1

    def push(self, *chunks: bytes) -> None:
        """Let chunks come in."""
        for data in chunks:
            self.body.dataReceived(data)

    def end(self, error: Exception | None = None) -> None:
        """End the body: as a whole one, or with an error."""
        self.body.connectionLost(Failure(error or ResponseDone()))


class PlayedUpstream:
    """Takes requests for providers; the test gives the responses."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.cancelled = 0
        self.begins = True
        self.error: Exception | None = None

    def send(
        self, provider: Any, method: str, target: bytes, lines: list[bytes], body: Any, **kw: Any
    ) -> Any:
        if self.error is not None:
            raise self.error

        def cancel(_: Deferred[Any]) -> None:
            self.cancelled += 1

        response: Deferred[Any] = Deferred(cancel)
        if self.begins:
            kw["began"]()
        self.asked.append(
            SimpleNamespace(
                provider=provider.name,
                method=method,
                target=target,
                fields=parse_fields(b"\r\n".join(lines).split(b"\r\n")),
                body=body,
                response=response,
                **kw,
            )
        )
        return response


class KeptTraces:
    """Keeps traces."""

    name = "test"
    lost = 0

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    def close(self) -> None:
        """There is nothing to close."""


class PlayedGateway:
    """A gateway behind a site, one connection of a client, and a played provider."""

    def __init__(
        self,
        *,
        provider: str = "",
        route: str = "",
        more: str = "",
        client: str = "",
        candidates: str = "p",
        access: Callable[[Trace, str | None, str | None], None] = log_access,
    ) -> None:
        dialect = "" if "dialect" in provider else 'dialect = "openai"'
        config = parse(
            '[proxy]\nvia = "us"\n'
            f'[providers.p]\nurl = "https://p.example/base"\n{dialect}\n{provider}\n'
            f'[[routes]]\npath = "/p"\nproviders = {candidates.split()}\n{route}\n'
            f'{more}\n[clients.c]\nkeys = ["{KEY}"]\n{client}',
            environ={},
        )
        self.config, self.client = config, config.clients["c"]
        self.clock = Clock()
        self.clock.advance(1000)
        self.upstream, self.sink, self.metrics = PlayedUpstream(), KeptTraces(), Metrics("1")
        self.recorder = Recorder(
            self.metrics,
            self.sink,
            access=access,
            clock=self.clock.seconds,
            wall=lambda: 1_700_000_000.0,
            instance="7",
        )
        self.gateway = Gateway(
            config,
            self.upstream,  # type: ignore[arg-type]  # another kind of upstream
            self.recorder,
            self.metrics,
            reactor=self.clock,
            clock=self.clock.seconds,
        )
        self.site = Site(
            Router(self.gateway),
            self.clock,
            self.clock.seconds,
            config.timeouts,
            config.limits,
            wall=lambda: 1_700_000_000.0,
            abandoned=self.recorder.abandoned,
            malformed=self.recorder.malformed,
        )
        self.connect()

    def connect(self) -> None:
        """Open another connection."""
        self.transport = FakeTransport()
        self.channel = self.site.buildProtocol(None)
        self.transport.connect(self.channel)

    def send(self, data: bytes) -> None:
        """Let bytes of the client come in."""
        self.channel.dataReceived(data)

    def call(
        self, method: str = "POST", target: str = "/p/v1", *fields: str, body: bytes = BODY
    ) -> None:
        """Let a request of the known client come in."""
        kind = (JSON,) if body and not any("Content-Type" in field for field in fields) else ()
        self.send(request(method, target, "X-Api-Key: key", *kind, *fields, body=body))

    @property
    def asked(self) -> Any:
        """The last request to the provider."""
        return self.upstream.asked[-1]

    def response(self, code: int = 200, *fields: tuple[bytes, bytes]) -> PlayedResponse:
        """Let the head of the provider's response come in."""
        response = PlayedResponse(code, fields)
        self.asked.response.callback(response)
        return response

    def got(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Return status, fields and body of the bytes that the client got since the last call."""
        head, _, body = self.transport.take().partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        pairs = [line.partition(b": ") for line in lines]
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}, body

    def begun(self, *fields: tuple[bytes, bytes], **call: Any) -> PlayedResponse:
        """Let a request and the head of its response come in."""
        self.call(**call)
        return self.response(200, *fields)

    def refusal(self) -> tuple[int, str]:
        """Return status and reason of the error that the client got."""
        status, fields, _ = self.got()
        return status, fields[b"x-llmproxy-error"].decode()

    def trace(self) -> Trace:
        """Return the one trace, of a request that has left nothing behind."""
        self.clock.advance(0)  # a body that nobody waits for ends a turn later
        (trace,) = self.sink.traces
        assert self.recorder.running == 0
        assert self.site.memory.held == 0
        assert self.value("active_streams") == 0
        assert self.value("ended_total", reason=trace.end_reason) == 1
        assert not self.metrics.live
        assert trace.is_complete is (trace.end_reason == "complete")
        if not self.site.connections:
            assert not self.clock.getDelayedCalls()
        return trace

    def value(self, name: str, **labels: str) -> float | None:
        """Return a metric's value."""
        return self.metrics.registry.get_sample_value("llmproxy_" + name, labels)
