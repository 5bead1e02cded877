"""The story of one request, step by step, with a provider that the test plays."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from llmproxy.config import parse
from llmproxy.errors import EndReason, ProxyError, upstream_broken, upstream_unreachable
from llmproxy.gateway.gateway import Gateway
from llmproxy.gateway.recorder import Recorder
from llmproxy.record.metrics import Metrics
from llmproxy.record.trace import NAMES, Trace
from llmproxy.server.handler import Router
from llmproxy.server.site import Site
from tests.support.fake_transport import FIN, RESET, FakeTransport
from tests.support.sockets import chunked, request

KEY = "sha256:" + hashlib.sha256(b"key").hexdigest()
JSON = "Content-Type: application/json"
BODY = b'{"model": "m", "stream": true}'
LAST = b"0\r\n\r\n"
SSE = (b"content-type", b"text/event-stream")


class Response:
    """A provider's response whose body the test pushes."""

    def __init__(self, code: int, fields: tuple[tuple[bytes, bytes], ...]) -> None:
        self.code = code
        self.fields = list(fields)
        self.first = dict(reversed(self.fields))
        self.transport = FakeTransport()
        self.aborts = 0
        self.body: Any = None

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
        """End the body, as whole unless there is an error."""
        self.body.connectionLost(Failure(error or ResponseDone()))


class Upstream:
    """Takes requests for providers and leaves the responses to the test."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.cancelled = 0
        self.begins = True
        self.error: Exception | None = None

    def send(
        self, provider: Any, method: str, target: bytes, fields: Any, body: Any, **kw: Any
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
                fields=fields,
                body=body,
                response=response,
                **kw,
            )
        )
        return response


class Sink:
    """Keeps traces."""

    name = "test"
    lost = 0

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def write(self, trace: Trace) -> None:
        self.traces.append(trace)

    def close(self) -> None:
        """There is nothing to close."""


class Stage:
    """A gateway behind a site, one client's connection, and a provider that the test plays."""

    def __init__(
        self, *, provider: str = "", route: str = "", more: str = "", client: str = ""
    ) -> None:
        dialect = "" if "dialect" in provider else 'dialect = "openai"'
        config = parse(
            '[proxy]\nvia = "us"\n'
            f'[providers.p]\nurl = "https://p.example/base"\n{dialect}\n{provider}\n'
            f'[[routes]]\npath = "/p"\nproviders = ["p"]\n{route}\n'
            f'{more}\n[clients.c]\nkeys = ["{KEY}"]\n{client}',
            environ={},
        )
        self.clock = Clock()
        self.clock.advance(1000)
        self.upstream, self.sink, self.metrics = Upstream(), Sink(), Metrics("1")
        self.recorder = Recorder(
            self.metrics,
            self.sink,
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
        """Let bytes of the client's come in."""
        self.channel.dataReceived(data)

    def call(
        self, method: str = "POST", target: str = "/p/v1", *fields: str, body: bytes = BODY
    ) -> None:
        """Let a request of the known client's come in."""
        kind = (JSON,) if body and not any("Content-Type" in field for field in fields) else ()
        self.send(request(method, target, "X-Api-Key: key", *kind, *fields, body=body))

    @property
    def asked(self) -> Any:
        """What the provider was asked last."""
        return self.upstream.asked[-1]

    def response(self, code: int = 200, *fields: tuple[bytes, bytes]) -> Response:
        """Let the provider's head come in."""
        response = Response(code, fields)
        self.asked.response.callback(response)
        return response

    def got(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """Return status, fields and the rest of what the client got since the last time."""
        head, _, body = self.transport.take().partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        pairs = [line.partition(b": ") for line in lines]
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}, body

    def trace(self) -> Trace:
        """Return the one trace, of a request that has left nothing behind."""
        self.clock.advance(0)  # a body that nobody waits for ends a turn later
        (trace,) = self.sink.traces
        assert self.recorder.running == 0
        assert self.site.held_bytes == 0
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


# --- a request that goes well ---------------------------------------------------------------------


def test_a_request_goes_to_its_provider() -> None:
    """Target, fields and body cross; the caller's key does not, and ours are added."""
    stage = Stage()
    stage.call("POST", '/p/v1/x?y="z', "X-A: 1", "User-Agent: ua")

    asked = stage.asked
    assert (asked.provider, asked.method, asked.target) == ("p", "POST", b'/base/v1/x?y="z')
    assert asked.body == BODY
    assert [name for name, _ in asked.fields] == [
        b"content-type",
        b"x-a",
        b"user-agent",
        b"via",
        b"x-request-id",
        b"accept",
        b"accept-encoding",
    ]
    assert dict(asked.fields)[b"via"] == b"1.1 us"
    assert dict(asked.fields)[b"accept"] == b"text/event-stream"
    assert not stage.transport.writes


def test_the_response_streams_back() -> None:
    """The head leaves before the body, each chunk when it comes, and the end as the end."""
    stage = Stage()
    stage.call()
    response = stage.response(200, SSE, (b"request-id", b"r"), (b"connection", b"x"))
    status, fields, body = stage.got()
    assert (status, body) == (200, b"")
    assert fields.pop(b"x-llmproxy-request-id") == dict(stage.asked.fields)[b"x-request-id"]
    assert fields == {
        b"content-type": b"text/event-stream",
        b"request-id": b"r",
        b"cache-control": b"no-cache, no-transform",
        b"x-accel-buffering": b"no",
        b"transfer-encoding": b"chunked",
    }
    assert stage.site.held_bytes == 0
    for data in (b"data: 1\n\n", b"data"):
        response.push(data)
        assert stage.transport.take() == b"%x\r\n%b\r\n" % (len(data), data)
    response.end()

    assert stage.transport.take() == LAST
    assert not stage.transport.count("lose")
    assert stage.trace().end_reason == "complete"


def test_a_record_tells_the_whole_story() -> None:
    """Who, what, where, how much and how long; and neither query nor key."""
    stage = Stage()
    stage.call(
        "POST", "/p/v1?token=s3cret", "User-Agent: ua", "X-Request-Id: theirs", "X-Session-Id: s"
    )
    stage.clock.advance(1)
    response = stage.response(200, SSE)
    stage.clock.advance(2)
    response.push(b"abc")
    stage.clock.advance(4)
    response.push(b"de")
    stage.clock.advance(1)
    response.end()
    trace = stage.trace()

    told = {name: getattr(trace, name) for name in NAMES}
    attempt = told.pop("attempts")[0]
    assert (attempt.provider, attempt.outcome, attempt.seconds) == ("p", "ok", 1.0)
    assert len(told.pop("id")) == 24
    assert {name: value for name, value in told.items() if value not in (None, [])} == {
        "time": "2023-11-14T22:13:20.000Z",
        "client_request_id": "theirs",
        "instance": "7",
        "peer": "192.168.1.1",
        "user_agent": "ua",
        "client": "c",
        "session": "s",
        "route": "p",
        "provider": "p",
        "dialect": "openai",
        "method": "POST",
        "path": "/p/v1",
        "model": "m",
        "stream": True,
        "status": 200,
        "end_reason": "complete",
        "is_complete": True,
        "bytes_in": len(BODY),
        "bytes_out": 5,
        "chunks": 2,
        "head_s": 1.0,
        "first_chunk_s": 3.0,
        "duration_s": 8.0,
        "longest_gap_s": 4.0,
        "paused_s": 0.0,
    }
    labels = {"route": "p", "provider": "p", "client": "c", "method": "POST", "status": "2xx"}
    assert stage.value("requests_total", **labels) == 1
    assert stage.value("upstream_attempts_total", provider="p", outcome="ok") == 1
    assert stage.value("bytes_total", direction="in") == len(BODY)
    assert stage.value("bytes_total", direction="out") == 5
    assert stage.value("chunks_total") == 2
    for name in ("head", "first_chunk", "chunk_gap", "stream", "overhead"):
        assert stage.value(f"{name}_seconds_count") == 1


@pytest.mark.parametrize(
    ("status", "end"),
    [(200, "complete"), (302, "complete"), (404, "upstream_refused"), (529, "upstream_refused")],
)
def test_the_providers_status_is_exact(status: int, end: str) -> None:
    """Redirects and refusals are forwarded; an error status is not a complete response."""
    stage = Stage()
    stage.call()
    response = stage.response(status, (b"content-length", b"2"), (b"location", b"/else"))
    response.push(b"no")
    response.end()
    got, fields, body = stage.got()

    assert (got, body, fields[b"content-length"]) == (status, b"no", b"2")
    assert b"x-llmproxy-error" not in fields
    assert (stage.trace().end_reason, stage.trace().status) == (end, status)


def test_an_override_changes_one_value() -> None:
    """The provider is asked for its model; every other byte is the client's."""
    stage = Stage(route='[routes.override]\np = { model = "prod" }')
    stage.call(body=b' {"model" :  "m", "x": {"model": "m"}}\n')

    assert stage.asked.body == b' {"model" :  "prod", "x": {"model": "m"}}\n'
    stage.response().end()
    assert stage.trace().model == "m"


def test_what_a_provider_adds() -> None:
    """Its own fields where the client sent none, and connections kept apart by its credential."""
    stage = Stage(provider='headers = { x-version = "1", x-a = "default" }')
    stage.call("POST", "/p", "X-A: theirs")

    fields = dict(stage.asked.fields)
    assert (fields[b"x-version"], fields[b"x-a"]) == (b"1", b"theirs")
    assert stage.asked.credential == b""


def test_the_callers_credential_may_cross() -> None:
    """With ``pass_credential`` it goes to the provider, on connections of its own."""
    stage = Stage(provider="pass_credential = true")
    keys = set()
    for key in ("one", "two"):
        head = request("GET", "/p", "X-Llmproxy-Key: key", f"Authorization: Bearer {key}")
        stage.send(head)
        assert dict(stage.asked.fields)[b"authorization"] == f"Bearer {key}".encode()
        assert b"x-llmproxy-key" not in dict(stage.asked.fields)
        keys.add(stage.asked.credential)
        stage.response().end()
    assert len(keys) == 2


def test_a_model_that_leads_to_a_passing_route_does_not_take_the_clients_key_along() -> None:
    """The first route by path takes our key; the one that the model leads to would send it on."""
    passing = """
[providers.q]
url = "https://q.example"
dialect = "openai"
pass_credential = true
[[routes]]
name = "q"
path = "/p"
providers = ["q"]
"""
    stage = Stage(route='models = ["other"]', more=passing)
    stage.call("POST", "/p", "X-Llmproxy-Key: key", body=b'{"model":"m"}')

    written = b"".join(stage.transport.writes)
    assert written.startswith(b"HTTP/1.1 401 ")
    assert b"x-llmproxy-error: misplaced_key" in written
    assert not stage.upstream.asked


# --- a request that is refused --------------------------------------------------------------------

REFUSALS: list[tuple[bytes, int, str]] = [
    (request("TRACE", "/p", "X-Api-Key: key"), 405, "method"),
    (request("get", "/p", "X-Api-Key: key"), 405, "method"),
    (request("CONNECT", "h:443", "X-Api-Key: key"), 405, "method"),
    (request("GET", "http://p.example/p", "X-Api-Key: key"), 400, "bad_target"),
    (request("OPTIONS", "*", "X-Api-Key: key"), 400, "bad_target"),
    (request("GET", "/p/../admin", "X-Api-Key: key"), 400, "bad_path"),
    (request("GET", "/p", "Connection: Upgrade", "Upgrade: WebSocket"), 501, "websocket"),
    (request("GET", "/p", "X-Api-Key: key", "Via: 1.1 a, 1.1 US"), 508, "loop"),
    (request("GET", "/p", "X-Api-Key: key", "X_Api_Key: key"), 400, "bad_header"),
    (request("GET", "/p"), 401, "no_key"),
    (request("GET", "/p", "X-Api-Key: wrong"), 401, "unknown_key"),
    (request("GET", "/else", "X-Api-Key: key"), 404, "no_route"),
    (request("POST", "/p", "X-Api-Key: key", JSON, body=b"{"), 400, "bad_body"),
    (request("POST", "/p", "X-Api-Key: key", JSON, body=b"x" * 2000), 413, "body_too_large"),
]


@pytest.mark.parametrize(("data", "status", "reason"), REFUSALS)
def test_refusals(data: bytes, status: int, reason: str) -> None:
    """Each refusal has its status and word, is recorded, and no provider hears of it."""
    stage = Stage(route='request_body = "1KiB"')
    stage.send(data)
    got, fields, body = stage.got()

    assert (got, fields[b"x-llmproxy-error"]) == (status, reason.encode())
    assert json.loads(body)["error"]["code"] == reason
    assert int(fields[b"content-length"]) == len(body)
    trace = stage.trace()
    assert (trace.end_reason, trace.error, trace.status) == ("rejected", reason, status)
    assert fields[b"x-llmproxy-request-id"] == fields[b"x-request-id"] == fields[b"request-id"]
    assert fields[b"x-request-id"] == trace.id.encode()
    assert fields[b"content-type"] == b"application/json"
    assert fields[b"date"] == b"Tue, 14 Nov 2023 22:13:20 GMT"
    assert b"server" not in fields
    assert b"x-should-retry" not in fields
    assert not stage.upstream.asked


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"nonsense\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/2.0\r\n\r\n", 505, "version"),
        (b"GET /" + b"x" * 40_000, 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\nx: " + b"x" * 40_000, 431, "head_too_large"),
    ],
)
def test_what_is_no_request_is_recorded_too(data: bytes, status: int, reason: str) -> None:
    """One trace, always; with the status and the word that the client was told."""
    stage = Stage()
    stage.send(data)
    got, fields, _ = stage.got()

    assert (got, fields[b"x-llmproxy-error"]) == (status, reason.encode())
    trace = stage.trace()
    assert (trace.end_reason, trace.error, trace.status) == ("rejected", reason, status)
    labels = {"route": "", "provider": "", "client": "", "method": "other", "status": "4xx"}
    if status < 500:
        assert stage.value("requests_total", **labels) == 1


def test_a_method_that_is_not_served_says_which_are() -> None:
    """405 carries ``allow``."""
    stage = Stage()
    stage.send(request("TRACE", "/p"))

    assert stage.got()[1][b"allow"] == b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"


@pytest.mark.parametrize(
    ("limits", "status", "reason"),
    [
        ('models = ["n"]', 403, "model_forbidden"),
        ('routes = ["q"]', 403, "route_forbidden"),
        ('models = ["m"]\nroutes = ["p", "q"]', 0, ""),
    ],
)
def test_a_client_may_be_kept_from_routes_and_models(limits: str, status: int, reason: str) -> None:
    """403, whether the path or the body names what is not allowed."""
    stage = Stage(more='[[routes]]\npath = "/q"\nproviders = ["p"]', client=limits)
    stage.call()
    if not status:
        assert stage.asked
        return
    got, fields, _ = stage.got()
    assert (got, fields[b"x-llmproxy-error"]) == (status, reason.encode())
    assert stage.trace().client == "c"


def test_an_encoded_body_is_refused_where_it_decides_something() -> None:
    """415 where the model matters; else it crosses as it is, and names nothing."""
    strict, easy = Stage(route='models = ["*"]\n[routes.override]\np = { model = "x" }'), Stage()
    for stage in (strict, easy):
        stage.call("POST", "/p", "Content-Encoding: gzip", body=b"\x1f\x8b")
    assert strict.got()[0] == 415
    assert strict.trace().error == "encoded_body"
    assert easy.asked.body == b"\x1f\x8b"
    easy.response().end()
    assert easy.trace().stream is None


@pytest.mark.parametrize(
    ("dialect", "shape"),
    [
        ("openai", {"error"}),
        ("anthropic", {"type", "error", "request_id"}),
        ("ollama", {"error"}),
        ("raw", {"error"}),
    ],
)
def test_errors_speak_the_dialect_of_the_route(dialect: str, shape: set[str]) -> None:
    """Also before anyone is identified."""
    stage = Stage(provider=f'dialect = "{dialect}"')
    stage.send(request("GET", "/p"))
    body = json.loads(stage.got()[2])

    assert set(body) == shape
    assert isinstance(body["error"], str) is (dialect == "ollama")


def test_a_name_that_spells_the_credentials_field_is_refused(tmp_path: Any) -> None:
    """A header of the provider's own choice cannot be imitated with ``_``."""
    tmp_path.chmod(0o700)
    (tmp_path / "k").write_text("s3cret")
    stage = Stage(
        provider='header = "x-team-key"\nformat = "{}"\ncredential = "k"',
        more=f'[credentials]\ndirectory = "{tmp_path}"',
    )
    stage.call("GET", "/p", "X_Team_Key: theirs", body=b"")
    assert stage.got()[0] == 400
    stage.connect()
    stage.call("GET", "/p", "X-Team-Key: theirs", body=b"")
    assert [value for name, value in stage.asked.fields if name == b"x-team-key"] == [b"s3cret"]
    assert stage.asked.credential == b"s3cret"


# --- a provider that fails ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (upstream_unreachable("10.0.0.1"), 502, None),
        (upstream_broken("10.0.0.1"), 502, b"false"),
    ],
)
def test_a_provider_that_fails_before_its_head(
    error: ProxyError, status: int, retry: bytes | None
) -> None:
    """The client is told, without addresses, and whether the work may have been done."""
    stage = Stage()
    stage.call()
    stage.asked.response.errback(error)
    got, fields, body = stage.got()

    assert (got, fields.get(b"x-should-retry")) == (status, retry)
    assert fields[b"x-llmproxy-error"] == error.reason.encode()
    assert b"10.0.0.1" not in body
    trace = stage.trace()
    assert (trace.end_reason, trace.attempts[0].outcome) == (error.end, error.end)
    assert not stage.transport.count("lose")


@pytest.mark.parametrize("length", [True, False])
def test_a_body_that_breaks_is_never_closed_as_if_whole(length: bool) -> None:
    """What came is there, and then the connection ends short of the response."""
    stage = Stage()
    stage.call()
    response = stage.response(200, *([(b"content-length", b"9")] if length else []))
    response.push(b"part")
    response.end(upstream_broken("reset"))
    _, _, body = stage.got()

    assert body == (b"part" if length else b"4\r\npart\r\n")
    assert stage.transport.count("lose") == 1
    trace = stage.trace()
    assert (trace.end_reason, trace.status, trace.bytes_out) == ("upstream_broken", 200, 4)
    assert trace.error == "upstream_broken"


@pytest.mark.parametrize(
    ("kind", "dialect", "before", "event"),
    [
        (b"text/event-stream", "openai", b"data: 1\n\n", b"data: {"),
        (b"text/event-stream; x=y", "anthropic", b"data: 1\r\n\r\n", b"event: error\ndata: {"),
        (b"application/x-ndjson", "ollama", b'{"a":1}\n', b'{"error":"'),
        (b"text/event-stream", "openai", b"data: 1\n", b""),
        (b"text/event-stream", "openai", b"data", b""),
        (b"application/x-ndjson", "ollama", b'{"a"', b""),
        (b"application/json", "openai", b"{}\n\n", b""),
        (b"text/event-stream", "openai", b"", b"data: {"),
    ],
)
def test_an_error_event_goes_before_the_break(
    kind: bytes, dialect: str, before: bytes, event: bytes
) -> None:
    """One event in the dialect's own shape, unless the break is inside an event or no stream."""
    stage = Stage(provider=f'dialect = "{dialect}"', route="error_event = true")
    stage.call()
    response = stage.response(200, (b"content-type", kind))
    stage.transport.take()
    if before:
        response.push(before)
    response.end(upstream_broken("reset"))
    pieces = [piece.partition(b"\r\n")[2][:-2] for piece in stage.transport.writes]

    assert pieces[0:1] == ([before] if before else pieces[0:1])
    assert len(pieces) == bool(before) + bool(event)
    if event:
        assert pieces[-1].startswith(event)
        assert b"broke off" in pieces[-1]
    assert stage.transport.count("lose") == 1


@pytest.mark.parametrize("name", [b"content-length", b"content-encoding"])
def test_no_event_is_added_where_it_would_not_fit(name: bytes) -> None:
    """Into a body of a known length, or one that is encoded, nothing is put."""
    stage = Stage(route="error_event = true")
    stage.call()
    response = stage.response(200, SSE, (name, b"99"))
    stage.transport.take()
    response.push(b"data: 1\n\n")
    response.end(upstream_broken("reset"))

    assert len(stage.transport.writes) == 1


def test_a_silent_provider_is_given_up() -> None:
    """The route's idle deadline ends the response, and the provider's connection is closed."""
    stage = Stage(route='timeouts = { idle = "5s" }')
    stage.call()
    response = stage.response()
    response.push(b"x")
    stage.clock.advance(5)

    assert response.aborts
    assert stage.transport.count("lose") == 1
    assert stage.trace().end_reason == "upstream_idle"


@pytest.mark.parametrize("phase", ["head", "body"])
def test_the_total_deadline_is_over_everything(phase: str) -> None:
    """504 while there is no byte of a response, a break afterwards."""
    stage = Stage(route='timeouts = { total = "5s" }')
    stage.call()
    response = stage.response() if phase == "body" else None
    stage.transport.take()
    stage.clock.advance(5)

    trace = stage.trace()
    assert (trace.end_reason, trace.error) == ("upstream_timeout", "upstream_timeout")
    assert trace.attempts[0].outcome in ("ok", *EndReason)
    if response is None:
        status, fields, _ = stage.got()
        assert (status, fields[b"x-should-retry"]) == (504, b"false")
        assert stage.upstream.cancelled == 1
        assert trace.attempts[0].outcome == "upstream_timeout"
    else:
        assert response.aborts
        assert stage.transport.count("lose") == 1


def test_the_total_deadline_ends_with_the_request() -> None:
    """A request that ended in time leaves no timer, and is told nothing later."""
    stage = Stage(route='timeouts = { total = "5s" }')
    stage.call()
    stage.response().end()
    stage.transport.take()
    stage.transport.end(FIN)
    assert not stage.clock.getDelayedCalls()

    assert not stage.transport.writes
    assert stage.trace().end_reason == "complete"


def test_a_mistake_behind_the_head_closes_the_provider(logged_failures: Any) -> None:
    """A response that nobody reads does not keep its connection."""
    stage = Stage()
    stage.call()
    response = stage.response(200, (b"content-length", b"not a number"))

    assert response.aborts
    assert response.body is None
    assert stage.trace().end_reason == "internal"
    assert len(logged_failures.flush(ValueError)) == 1


def test_a_mistake_of_ours_is_an_internal_error(logged_failures: Any) -> None:
    """The caller learns nothing of it, the log everything."""
    stage = Stage()
    stage.upstream.error = ZeroDivisionError("s3cret")
    stage.call()
    status, fields, body = stage.got()

    assert (status, fields[b"x-llmproxy-error"]) == (500, b"internal")
    assert b"s3cret" not in body
    assert stage.trace().end_reason == "internal"
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


# --- a client that leaves -------------------------------------------------------------------------

LEAVES: dict[str, tuple[Callable[[Stage], object], str]] = {
    "closes": (lambda stage: stage.transport.end(FIN), "client_gone"),
    "resets": (lambda stage: stage.transport.end(RESET), "client_gone"),
    "is cut": (lambda stage: stage.site.cut(), "drained"),
}


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("phase", ["upload", "head", "flowing", "paused"])
def test_a_client_that_leaves_ends_everything(how: str, phase: str) -> None:
    """In any phase the provider's side is closed at once, and nothing is left."""
    leave, end = LEAVES[how]
    stage = Stage()
    response = None
    if phase == "upload":
        stage.send(request("POST", "/p", "X-Api-Key: key", JSON, "Content-Length: 9") + b"{")
    else:
        stage.call()
        response = stage.response() if phase != "head" else None
    if response is not None:
        response.push(b"data")
    if phase == "paused":
        stage.transport.producer.pauseProducing()
        assert response is not None
        assert response.transport.is_paused()
    leave(stage)

    trace = stage.trace()
    assert trace.end_reason == end
    assert trace.error is None
    assert trace.status == (None if response is None else 200)
    assert stage.upstream.cancelled == (phase == "head")
    if response is not None:
        assert response.aborts
        assert stage.value("cancel_seconds_count") == 1
    if phase == "head":
        assert trace.attempts[0].outcome == end
        assert stage.value("cancel_seconds_count") == 1
    if stage.site.connections:
        stage.transport.end(RESET)
    assert len(stage.sink.traces) == 1
    assert not stage.clock.getDelayedCalls()


def test_every_provider_is_told_before_a_record_is_written() -> None:
    """Where many clients leave in one turn, none of their providers waits for the others' ends."""
    stage = Stage()
    left = []
    for number in range(3):
        if number:
            stage.connect()
        stage.call()
        left.append((stage.transport, stage.response()))
    for transport, response in left:
        response.push(b"data")
        transport.end(RESET)

    assert [response.aborts for _, response in left] == [1, 1, 1]
    assert stage.value("cancel_seconds_count") == 3
    assert (len(stage.sink.traces), stage.recorder.running) == (0, 3)
    stage.clock.advance(0)
    assert [trace.end_reason for trace in stage.sink.traces] == ["client_gone"] * 3
    assert stage.recorder.running == 0
    assert not stage.clock.getDelayedCalls()


def test_a_request_that_ends_otherwise_before_its_turn_has_one_record() -> None:
    """``total`` may ring between a client's leaving and the request's end."""
    stage = Stage(route='timeouts = { total = "3s" }')
    stage.call()
    stage.response().push(b"data")
    stage.transport.end(RESET)
    stage.clock.rightNow += 3
    stage.clock.advance(0)

    assert stage.trace().end_reason == "client_gone"


def test_the_end_of_the_process_waits_for_no_turn() -> None:
    """Whoever has left by then has a record."""
    stage = Stage()
    stage.call()
    stage.response().push(b"data")
    stage.transport.end(RESET)
    stage.recorder.close_all()

    assert [trace.end_reason for trace in stage.sink.traces] == ["client_gone"]
    assert stage.trace().end_reason == "client_gone"


def test_a_client_that_takes_nothing_is_stalled() -> None:
    """The route's ``client_stall`` ends it, and says so."""
    stage = Stage(route='timeouts = { client_stall = "3s", idle = "off" }')
    stage.call()
    response = stage.response()
    response.push(b"data")
    stage.transport.hold(3)
    stage.clock.pump([0.5] * 10)

    assert response.aborts
    assert stage.transport.count("abort") == 1
    assert stage.trace().end_reason == "client_stalled"


# --- bodies that stream ---------------------------------------------------------------------------


def upload(*fields: str) -> bytes:
    """Return the head of a request whose body is not looked into."""
    kind = "Content-Type: application/octet-stream"
    return request("POST", "/p/files", "X-Api-Key: key", kind, *fields)


def test_other_bodies_stream_upwards() -> None:
    """The provider is asked with the head, and gets the body as it comes, unread."""
    stage = Stage()
    stage.send(upload("Content-Length: 9") + b"abc")
    body = stage.asked.body
    assert body.length == 9
    taken = StringTransport()
    done = body.startProducing(taken)
    assert taken.value() == b"abc"
    stage.send(b"defghi")
    assert taken.value() == b"abcdefghi"
    assert done.called
    stage.response(200, (b"content-length", b"0")).end()

    assert stage.site.held_bytes == 0
    assert stage.trace().bytes_in == 9
    assert not stage.transport.count("half")


def test_a_streaming_body_is_bounded() -> None:
    """A body that grows over the limit fails on its way: 413, and the provider gets no end."""
    stage = Stage(route='request_body = "1KiB"')
    stage.send(upload("Transfer-Encoding: chunked"))
    taken = StringTransport()
    done = stage.asked.body.startProducing(taken)
    failures: list[Any] = []
    done.addErrback(failures.append)
    stage.send(chunked(bytes(1024)))
    assert not failures
    stage.send(chunked(b"x"))
    assert failures[0].value.status == 413
    stage.asked.response.errback(failures[0].value)

    assert stage.got()[0] == 413
    assert stage.trace().error == "body_too_large"


def test_a_routes_own_limit_bounds_streams_too() -> None:
    """The limit of the route that serves counts, not the largest of all that match the path."""
    stage = Stage(
        route='request_body = "1KiB"',
        more='[[routes]]\npath = "/"\nproviders = ["p"]\nrequest_body = "1MiB"',
    )
    stage.send(upload("Content-Length: 2000"))

    assert stage.got()[0] == 413
    assert not stage.upstream.asked


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_provider_that_is_full_stops_the_client(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Backpressure goes up to the client, and its leaving is noticed although nobody reads."""
    stage = Stage(route='timeouts = { first_byte = "off" }')
    stage.transport.socket, theirs = pair  # type: ignore[attr-defined]  # what is looked at
    stage.send(upload("Content-Length: 1000000"))
    taken = StringTransport()
    stage.asked.body.startProducing(taken)
    producer: Any = taken.producer
    producer.pauseProducing()
    assert stage.transport.is_paused()
    stage.clock.pump([1] * 200)  # the deadline of the body stands still, too
    producer.resumeProducing()
    assert not stage.transport.is_paused()
    producer.pauseProducing()
    theirs.sendall(b"more")
    stage.clock.advance(0.1)
    assert not stage.transport.count("abort")
    theirs.close()
    stage.clock.advance(0.1)
    assert stage.transport.count("abort") == 1
    stage.transport.end(RESET)

    assert stage.upstream.cancelled == 1
    assert stage.trace().end_reason == "client_gone"


def test_little_is_held_before_the_provider_takes_it(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Until there is a connection the client is read from for 64 KiB and not much more."""
    stage = Stage()
    stage.transport.socket = pair[0]  # type: ignore[attr-defined]  # what is looked at
    stage.send(upload("Content-Length: 1000000") + bytes(65535))
    paused = [stage.transport.is_paused()]
    stage.send(b"x")
    paused.append(stage.transport.is_paused())
    taken = StringTransport()
    stage.asked.body.startProducing(taken)
    paused.append(stage.transport.is_paused())

    assert paused == [False, True, False]
    assert len(taken.value()) == 65536


def test_a_provider_that_wants_no_more_lets_the_client_go_on(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """A paused client is read from again, and what it sends is dropped."""
    stage = Stage()
    stage.transport.socket = pair[0]  # type: ignore[attr-defined]  # what is looked at
    stage.send(upload("Content-Length: 1000000"))
    taken = StringTransport()
    stage.asked.body.startProducing(taken)
    stage.asked.body.pauseProducing()
    stage.asked.body.stopProducing()
    stage.send(b"more")

    assert not stage.transport.is_paused()
    assert not taken.value()
    assert taken.producer is None


def test_an_early_response_ends_the_upload() -> None:
    """The client is told while it still sends; what comes is dropped, and then it is closed."""
    stage = Stage()
    stage.send(upload("Content-Length: 1000000") + b"abc")
    body = stage.asked.body
    body.startProducing(StringTransport())
    response = stage.response(413, (b"content-length", b"2"))
    body.stopProducing()
    response.push(b"no")
    response.end()
    status, fields, got = stage.got()

    assert (status, got, fields[b"connection"]) == (413, b"no", b"close")
    assert stage.trace().end_reason == "upstream_refused"
    stage.send(bytes(100000))
    assert stage.transport.count("half") == 1


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (["X-Api-Key: wrong"], 401),
        ([], 401),
        (["X-Api-Key: key", "Via: 1.1 us"], 508),
    ],
)
def test_nobody_is_asked_for_a_body_that_is_refused_anyway(fields: list[str], status: int) -> None:
    """Keys are looked at before 100 Continue; the refusal is recorded like any other."""
    stage = Stage()
    expect = "Expect: 100-continue"
    stage.send(request("POST", "/p", JSON, expect, "Content-Length: 5", *fields))

    assert stage.got()[0] == status
    assert stage.trace().error is not None


def test_a_streaming_body_is_asked_for_when_the_provider_takes_it() -> None:
    """100 Continue goes out once there is somewhere to put the body."""
    stage = Stage()
    stage.send(upload("Expect: 100-continue", "Content-Length: 5"))
    assert not stage.transport.writes
    stage.asked.body.startProducing(StringTransport())

    assert stage.transport.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    stage.send(b"hello")
    stage.response().end()
    assert stage.trace().end_reason == "complete"
