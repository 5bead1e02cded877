"""The gateway: one request from its head to its record, with a played provider."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from twisted.internet.testing import StringTransport

from llmproxy.errors import EndReason, ProxyError, upstream_broken, upstream_unreachable
from llmproxy.record.trace import NAMES
from tests.gateway.played import BODY, JSON, LAST, SSE, PlayedGateway, PlayedResponse
from tests.support.fake_transport import FIN, RESET
from tests.support.sockets import chunked, request

# --- a request that goes well ---------------------------------------------------------------------


def test_a_request_is_forwarded() -> None:
    """The provider gets target, fields and body, without the client's key, and our own fields."""
    played = PlayedGateway()
    played.call("POST", '/p/v1/x?y="z', "X-A: 1", "User-Agent: ua")

    asked = played.asked
    assert (asked.provider, asked.method, asked.target) == ("p", "POST", b'/base/v1/x?y="z')
    assert asked.body == BODY
    names = b"content-type x-a user-agent via accept accept-encoding x-request-id"
    assert [name for name, _ in asked.fields] == names.split()
    assert dict(asked.fields)[b"via"] == b"1.1 us"
    assert dict(asked.fields)[b"accept"] == b"text/event-stream"
    assert not played.transport.writes


def test_the_response_streams_back() -> None:
    """Head, chunks and end are forwarded one by one, each when it comes."""
    played = PlayedGateway()
    response = played.begun(SSE, (b"request-id", b"r"), (b"connection", b"x"))
    status, fields, body = played.got()
    assert (status, body) == (200, b"")
    assert fields.pop(b"x-llmproxy-request-id") == dict(played.asked.fields)[b"x-request-id"]
    assert fields == {
        b"content-type": b"text/event-stream",
        b"request-id": b"r",
        b"cache-control": b"no-cache, no-transform",
        b"x-accel-buffering": b"no",
        b"transfer-encoding": b"chunked",
        b"x-llmproxy-provider": b"p",
        b"x-llmproxy-attempts": b"1",
    }
    assert played.site.memory.held == 0
    for data in (b"data: 1\n\n", b"data"):
        response.push(data)
        assert played.transport.take() == b"%x\r\n%b\r\n" % (len(data), data)
    response.end()

    assert played.transport.take() == LAST
    assert not played.transport.count("half")
    assert played.trace().end_reason == "complete"


@pytest.mark.parametrize("fields", [(), ((b"content-length", b"64"),)], ids=["chunked", "length"])
def test_a_body_that_came_whole_is_told_as_any_other(
    fields: tuple[tuple[bytes, bytes], ...],
) -> None:
    """The client gets the same bytes, and records and metrics say the same."""
    kind = (b"content-type", b"application/json")
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":4},"model":"m"}'.ljust(64)
    told: list[tuple[Any, ...]] = []
    for is_whole in (False, True):
        played = PlayedGateway()
        played.call(target="/p/v1/chat/completions")
        response = PlayedResponse(200, (kind, *fields))
        response.whole = body if is_whole else None
        played.asked.response.callback(response)
        if not is_whole:
            response.push(body)
            response.end()
        got, trace = played.transport.take(), played.trace()
        assert trace.output_tokens == 4
        counts = [played.value(name) for name in ("chunks_total", "stream_seconds_count")]
        counts += [played.value("bytes_total", direction="out"), response.aborts]
        told.append((got.replace(trace.id.encode(), b"ID"), replace(trace, id=""), counts))
    assert told[0] == told[1]
    assert told[0][0].endswith(body if fields else chunked(body) + LAST)


def test_a_whole_body_waits_for_nothing() -> None:
    """No timer runs for it, and a client that leaves behind it finds the request over."""
    played = PlayedGateway()
    played.call()
    before = len(played.clock.getDelayedCalls())
    response = PlayedResponse(200, (SSE,))
    response.whole = b"data: 1\n\n"
    played.asked.response.callback(response)
    assert len(played.clock.getDelayedCalls()) <= before
    assert (response.body, played.trace().end_reason) == (None, "complete")


@pytest.mark.parametrize("is_whole", [True, False], ids=["with the head", "later"])
def test_what_comes_with_the_end_leaves_with_it(is_whole: bool) -> None:
    """Head, content and end are one write, if one read brought them; so are content and end."""
    played = PlayedGateway()
    played.call()
    response = PlayedResponse(200, (SSE,))
    response.whole = b"data: 1\n\n" if is_whole else None
    played.asked.response.callback(response)
    if not is_whole:
        response.body.lastReceived(b"data: 1\n\n")
        response.end()
    writes = played.transport.writes
    assert len(writes) == (1 if is_whole else 2)
    assert writes[-1].endswith(chunked(b"data: 1\n\n") + LAST)
    assert played.trace().end_reason == "complete"


@pytest.mark.parametrize("key", ['padding = "1KiB"', 'heartbeat = "5s"'])
def test_a_whole_body_has_its_padding(key: str) -> None:
    """What stands in a stream besides its events is there, too."""
    played = PlayedGateway(route=key)
    played.call()
    response = PlayedResponse(200, (SSE,))
    response.whole = b"data: 1\n\n"
    played.asked.response.callback(response)
    assert response.body is not None
    assert (b":" in played.got()[2]) is key.startswith("padding")


def test_a_record_tells_the_whole_story() -> None:
    """The record has every fact of the request, but neither query nor key."""
    played = PlayedGateway()
    played.call(
        "POST", "/p/v1?token=s3cret", "User-Agent: ua", "X-Request-Id: theirs", "X-Session-Id: s"
    )
    played.clock.advance(1)
    response = played.response(200, SSE)
    played.clock.advance(2)
    response.push(b"abc")
    played.clock.advance(4)
    response.push(b"de")
    played.clock.advance(1)
    response.end()
    trace = played.trace()

    fields = {name: getattr(trace, name) for name in NAMES}
    attempt = fields.pop("attempts")[0]
    assert (attempt.provider, attempt.outcome, attempt.seconds) == ("p", "ok", 1.0)
    assert len(fields.pop("id")) == 24
    assert {name: value for name, value in fields.items() if value not in (None, [])} == {
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
        "model_from": "body",
        "queued_s": 0.0,
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
        "chunks_at_once": 0,
        "last_chunk_s": 7.0,
        "paused_s": 0.0,
    }
    labels = {"route": "p", "provider": "p", "client": "c", "method": "POST", "status": "2xx"}
    assert played.value("requests_total", **labels) == 1
    assert played.value("upstream_attempts_total", provider="p", outcome="ok") == 1
    assert played.value("bytes_total", direction="in") == len(BODY)
    assert played.value("bytes_total", direction="out") == 5
    assert played.value("chunks_total") == 2
    for name in ("head", "first_chunk", "chunk_gap", "stream", "overhead"):
        assert played.value(f"{name}_seconds_count") == 1


@pytest.mark.parametrize(
    ("status", "end"),
    [(200, "complete"), (302, "complete"), (404, "upstream_refused"), (529, "upstream_refused")],
)
def test_the_providers_status_is_forwarded(status: int, end: str) -> None:
    """A redirect is a complete response, and a refusal is not."""
    played = PlayedGateway()
    played.call()
    response = played.response(status, (b"content-length", b"2"), (b"location", b"/else"))
    response.push(b"no")
    response.end()
    got, fields, body = played.got()

    assert (got, body, fields[b"content-length"]) == (status, b"no", b"2")
    assert b"x-llmproxy-error" not in fields
    assert (played.trace().end_reason, played.trace().status) == (end, status)


def test_an_override_changes_only_the_model() -> None:
    """The provider gets its own model; every other byte is the client's."""
    played = PlayedGateway(route='[routes.override]\np = { model = "prod" }')
    played.call(body=b' {"model" :  "m", "x": {"model": "m"}}\n')

    assert played.asked.body == b' {"model" :  "prod", "x": {"model": "m"}}\n'
    played.response().end()
    assert played.trace().model == "m"


@pytest.mark.parametrize(
    ("target", "line", "path"),
    [
        ("/p/v1", "User-Agent: KEY", "/p/v1"),
        ("/p/v1", "X-Request-Id: KEY", "/p/v1"),
        ("/p/v1", "X-Session-Id: KEY", "/p/v1"),
        ("/p/v1?a=KEY", "X-A: 1", "/p/v1"),
        ("/p/KEY/v1", "X-A: 1", ""),
        ("/p/%6c%6CKEY/v1", "X-A: 1", ""),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_key_that_would_cross_is_in_no_record(
    target: str, line: str, path: str, early: bool
) -> None:
    """What the client wrote itself is left out of the record, wherever the key stood."""
    key = "llmp_" + "k" * 43
    digest = hashlib.sha256(key.encode()).hexdigest()
    played = PlayedGateway(more=f'[clients.made]\nkeys = ["sha256:{digest}"]')
    target = target.replace("%6c%6CKEY", "%6c%6C" + key[2:])
    fields = [line.replace("KEY", key), "User-Agent: ua"][:1]
    body = [JSON, EXPECT, "Content-Length: 5"] if early else []
    method = "POST" if early else "GET"
    played.send(request(method, target.replace("KEY", key), "X-Api-Key: key", *fields, *body))

    assert played.refusal() == (401, "misplaced_key")
    trace = played.trace()
    assert key[5:] not in repr(trace)
    assert trace.path == path


@pytest.mark.parametrize(
    ("method", "target", "key"),
    [
        ("TRACE", "/p/KEY", "key"),
        ("GET", "/p/../KEY", "key"),
        ("GET", "/p/KEY", "unknown"),
        ("GET", "/nowhere/KEY", "unknown"),
    ],
)
def test_a_key_is_in_no_record_of_a_request_that_is_refused_before(
    method: str, target: str, key: str
) -> None:
    """Nobody is identified yet: whatever looks like a key that we made is left out."""
    made = "llmp_" + "k" * 43
    played = PlayedGateway()
    fields = [f"X-Api-Key: {key}", f"User-Agent: {made}", f"X-Session-Id: {made}"]
    played.send(request(method, target.replace("KEY", made), *fields))
    assert played.refusal()[0] >= 400
    assert made not in repr(played.trace())


@pytest.mark.parametrize("via", ["1.1 other", "1.0 usa, 1.1 a (us)", "us", "1.1 a us"])
def test_hops_of_other_names_are_no_loop(via: str) -> None:
    """Our own name is a pseudonym of a hop, and no other word; we are the last hop."""
    played = PlayedGateway()
    played.send(request("GET", "/p", "X-Api-Key: key", f"Via: {via}"))

    assert dict(played.asked.fields)[b"via"] == f"{via}, 1.1 us".encode()


def test_a_provider_adds_its_fields() -> None:
    """A field of the client comes before the provider's default."""
    played = PlayedGateway(provider='headers = { x-version = "1", x-a = "default" }')
    played.call("POST", "/p", "X-A: theirs")

    fields = dict(played.asked.fields)
    assert (fields[b"x-version"], fields[b"x-a"]) == (b"1", b"theirs")
    assert played.asked.credential == b""


def test_a_caller_does_not_speak_for_the_proxy() -> None:
    """Fields that others believe of a proxy are dropped, and refused where they are disguised."""
    claims = ["True-Client-IP: 1.1.1.1", "X-Original-URL: /x", "X-HTTP-Method-Override: DELETE"]
    played = PlayedGateway()
    played.call("POST", "/p", *claims, "OpenAI-Project: theirs", "X-A: 1")
    names = [name for name, _ in played.asked.fields]
    assert {b"true-client-ip", b"x-original-url", b"x-http-method-override"}.isdisjoint(names)
    assert b"openai-project" in names  # no credential of ours acts for it
    played.response().end()
    played.call("POST", "/p", "X_Original_URL: /x")
    assert [trace.error for trace in played.sink.traces] == [None, "bad_header"]

    allowing = PlayedGateway(provider='drop_headers = ["openai-project"]')
    allowing.call("POST", "/p", *claims, "OpenAI-Project: theirs")
    fields = dict(allowing.asked.fields)
    assert fields[b"x-http-method-override"] == b"DELETE"
    assert b"openai-project" not in fields


def test_the_callers_credential_may_be_forwarded() -> None:
    """With ``pass_credential`` each credential has connections of its own."""
    played = PlayedGateway(provider="pass_credential = true")
    keys = set()
    for key in ("one", "two"):
        head = request("GET", "/p", "X-Llmproxy-Key: key", f"Authorization: Bearer {key}")
        played.send(head)
        assert dict(played.asked.fields)[b"authorization"] == f"Bearer {key}".encode()
        assert b"x-llmproxy-key" not in dict(played.asked.fields)
        keys.add(played.asked.credential)
        played.response().end()
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/p/v1?alt=sse&key=key&x=%7b", b"/base/v1?alt=sse&x=%7b"),
        ("/p/v1?key=key", b"/base/v1"),
        ("/p/v1?key=", b"/base/v1"),
        ("/p/v1?x={}&&", b"/base/v1?x={}&&"),
    ],
)
def test_a_key_in_the_query_is_read_and_cut(target: str, sent: bytes) -> None:
    """All else of the query is forwarded byte for byte."""
    played = PlayedGateway(provider="key_query = true")
    header = () if "=key" in target else ("X-Api-Key: key",)
    played.send(request("GET", target, *header))

    assert played.asked.target == sent
    played.response().end()
    assert played.trace().client == "c"


def test_a_key_in_the_query_is_not_forwarded_to_a_route_that_the_model_selects() -> None:
    """The path's first route reads the query; the model's route would forward it."""
    plain = """
[providers.q]
url = "https://q.example"
dialect = "openai"
[[routes]]
name = "q"
path = "/p"
providers = ["q"]
"""
    played = PlayedGateway(provider="key_query = true", route='models = ["o"]', more=plain)
    played.send(request("POST", "/p?key=key", JSON, body=b'{"model":"m"}'))
    assert played.refusal() == (401, "misplaced_key")
    played.send(request("POST", "/p?key=key", JSON, body=b'{"model":"o"}'))
    assert played.asked.target == b"/base"


def test_our_key_is_not_forwarded_to_a_route_that_the_model_selects() -> None:
    """The path's first route takes our key; the model's route would forward it."""
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
    played = PlayedGateway(route='models = ["other"]', more=passing)
    played.call("POST", "/p", "X-Llmproxy-Key: key", body=b'{"model":"m"}')

    assert played.refusal() == (401, "misplaced_key")
    assert not played.upstream.asked


# --- a request that is refused --------------------------------------------------------------------

EXPECT = "Expect: 100-continue"
REFUSALS: list[tuple[bytes, int, str]] = [
    (request("TRACE", "/p", "X-Api-Key: key"), 405, "method"),
    (request("get", "/p", "X-Api-Key: key"), 405, "method"),
    (request("CONNECT", "h:443", "X-Api-Key: key"), 405, "method"),
    (request("GET", "http://p.example/p", "X-Api-Key: key"), 400, "bad_target"),
    (request("OPTIONS", "*", "X-Api-Key: key"), 400, "bad_target"),
    (request("GET", "/p/../admin", "X-Api-Key: key"), 400, "bad_path"),
    (request("GET", "/p", "Connection: Upgrade", "Upgrade: WebSocket"), 426, "websocket"),
    (request("GET", "/p", "X-Api-Key: key", "Via: 1.1 a, 1.1 US"), 508, "loop"),
    (request("GET", "/p", "X-Api-Key: key", "X_Api_Key: key"), 400, "bad_header"),
    (request("GET", "/p"), 401, "no_key"),
    (request("GET", "/p", "X-Api-Key: wrong"), 401, "unknown_key"),
    (request("GET", "/else", "X-Api-Key: key"), 404, "no_route"),
    (request("POST", "/p", JSON, EXPECT, "Content-Length: 5"), 401, "no_key"),
    (
        request("POST", "/p", JSON, EXPECT, "Content-Length: 5", "X-Api-Key: wrong"),
        401,
        "unknown_key",
    ),
    (
        request("POST", "/p", "X-Api-Key: key", JSON, EXPECT, "Content-Length: 5", "Via: 1.1 us"),
        508,
        "loop",
    ),
    (
        request("POST", "/else", "X-Api-Key: key", JSON, EXPECT, "Content-Length: 5"),
        404,
        "no_route",
    ),
    (request("POST", "/p", "X-Api-Key: key", JSON, body=b"{"), 400, "bad_body"),
    (request("POST", "/p", "X-Api-Key: key", JSON, body=b"x" * 2000), 413, "body_too_large"),
]


@pytest.mark.parametrize(("data", "status", "reason"), REFUSALS)
def test_a_refusal_is_sent_and_recorded(data: bytes, status: int, reason: str) -> None:
    """Each refusal has its status and its reason, and is not forwarded; 405 has ``allow``."""
    played = PlayedGateway(route='request_body = "1KiB"')
    played.send(data)
    got, fields, body = played.got()

    assert (got, fields[b"x-llmproxy-error"]) == (status, reason.encode())
    assert json.loads(body)["error"]["code"] == reason
    assert int(fields[b"content-length"]) == len(body)
    trace = played.trace()
    assert (trace.end_reason, trace.error, trace.status) == ("rejected", reason, status)
    assert fields[b"x-llmproxy-request-id"] == fields[b"x-request-id"] == fields[b"request-id"]
    assert fields[b"x-request-id"] == trace.id.encode()
    assert fields[b"content-type"] == b"application/json"
    assert fields[b"date"] == b"Tue, 14 Nov 2023 22:13:20 GMT"
    assert b"server" not in fields
    methods = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
    assert fields.get(b"allow") == (methods if status == 405 else None)
    assert fields.get(b"x-should-retry") == (None if status in (408, 500, 503) else b"false")
    assert not played.upstream.asked


@pytest.mark.parametrize(
    "lines",
    [
        ["Connection: keep-alive, Upgrade", "Upgrade: websocket"],
        ["Connection: upgrade", "Upgrade: h2c, WebSocket/13"],
        ["Connection: upgrade", "Upgrade: h2c", "Upgrade: websocket"],
    ],
)
def test_a_websocket_handshake_is_answered_once(lines: list[str]) -> None:
    """The 426 names the protocol that is served, and closes: frames may follow the handshake."""
    played = PlayedGateway()
    played.send(request("GET", "/p", *lines) + request("GET", "/p"))
    head = played.transport.take().partition(b"\r\n\r\n")[0].split(b"\r\n")

    assert head[0].startswith(b"HTTP/1.1 426 ")
    assert b"upgrade: HTTP/1.1" in head
    assert [line for line in head if line.startswith(b"connection: ")] == [
        b"connection: upgrade",
        b"connection: close",
    ]
    assert played.transport.count("half") == 1
    assert played.trace().error == "websocket"


def test_an_upgrade_that_is_no_handshake_is_left_out() -> None:
    """Without its nomination, in HTTP/1.0, or to another protocol it is not ours to refuse."""
    for lines, version in (
        (["Upgrade: websocket"], "1.1"),
        (["Connection: upgrade", "Upgrade: h2c"], "1.1"),
        (["Connection: upgrade", "Upgrade: websocket"], "1.0"),
    ):
        played = PlayedGateway()
        played.send(request("GET", "/p", "X-Api-Key: key", *lines, version=version))
        assert b"upgrade" not in dict(played.asked.fields)
        played.response().end()


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"nonsense\r\n\r\n", 400, "malformed"),
        (b"GET / HTTP/2.0\r\n\r\n", 505, "version"),
        (b"GET /" + b"x" * 40_000, 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\nx: " + b"x" * 40_000, 431, "head_too_large"),
    ],
)
def test_a_malformed_request_is_recorded_too(data: bytes, status: int, reason: str) -> None:
    """The one record has the status and the reason that the client got."""
    played = PlayedGateway()
    played.send(data)

    assert played.refusal() == (status, reason)
    trace = played.trace()
    assert (trace.end_reason, trace.error, trace.status) == ("rejected", reason, status)
    labels = {"route": "", "provider": "", "client": "", "method": "other", "status": "4xx"}
    if status < 500:
        assert played.value("requests_total", **labels) == 1


@pytest.mark.parametrize(
    ("limits", "status", "reason"),
    [
        ('models = ["n"]', 403, "model_forbidden"),
        ('routes = ["q"]', 403, "route_forbidden"),
        ('models = ["m"]\nroutes = ["p", "q"]', 0, ""),
    ],
)
def test_a_client_may_be_kept_from_routes_and_models(limits: str, status: int, reason: str) -> None:
    """The response is 403, for a path and for a model in the body."""
    played = PlayedGateway(more='[[routes]]\npath = "/q"\nproviders = ["p"]', client=limits)
    played.call()
    if not status:
        assert played.asked
        return
    assert played.refusal() == (status, reason)
    assert played.trace().client == "c"


def test_an_encoded_body_is_refused_if_the_model_matters() -> None:
    """The response is 415; otherwise the body is forwarded unread."""
    strict, easy = (
        PlayedGateway(route='models = ["*"]\n[routes.override]\np = { model = "x" }'),
        PlayedGateway(),
    )
    for played in (strict, easy):
        played.call("POST", "/p", "Content-Encoding: gzip", body=b"\x1f\x8b")
        played.clock.advance(0)  # a coded body is read a turn later
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
    """An error before authentication has the right shape, too."""
    played = PlayedGateway(provider=f'dialect = "{dialect}"')
    played.send(request("GET", "/p"))
    body = json.loads(played.got()[2])

    assert set(body) == shape
    assert isinstance(body["error"], str) is (dialect == "ollama")


def test_a_name_that_spells_the_credentials_field_is_refused(tmp_path: Any) -> None:
    """The provider's credential header cannot be imitated with ``_``."""
    tmp_path.chmod(0o700)
    (tmp_path / "k").write_text("s3cret")
    played = PlayedGateway(
        provider='header = "x-team-key"\nformat = "{}"\ncredential = "k"',
        more=f'[credentials]\ndirectory = "{tmp_path}"',
    )
    played.call("GET", "/p", "X_Team_Key: theirs", body=b"")
    assert played.got()[0] == 400
    played.connect()
    played.call("GET", "/p", "X-Team-Key: theirs", body=b"")
    assert [value for name, value in played.asked.fields if name == b"x-team-key"] == [b"s3cret"]
    assert played.asked.credential == b"s3cret"


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
    """The error has no address, and says whether a retry may repeat the work."""
    played = PlayedGateway()
    played.call()
    played.asked.response.errback(error)
    got, fields, body = played.got()

    assert (got, fields.get(b"x-should-retry")) == (status, retry)
    assert fields[b"x-llmproxy-error"] == error.reason.encode()
    assert b"10.0.0.1" not in body
    trace = played.trace()
    assert (trace.end_reason, trace.attempts[0].outcome) == (error.end, error.end)
    assert not played.transport.count("half")


@pytest.mark.parametrize("length", [True, False])
def test_a_body_that_breaks_is_never_closed_as_if_whole(length: bool) -> None:
    """The client gets the bytes so far, and then the connection is closed early."""
    played = PlayedGateway()
    played.call()
    response = played.response(200, *([(b"content-length", b"9")] if length else []))
    response.push(b"part")
    response.end(upstream_broken("reset"))
    _, _, body = played.got()

    assert body == (b"part" if length else b"4\r\npart\r\n")
    assert played.transport.count("half") == 1
    trace = played.trace()
    assert (trace.end_reason, trace.status, trace.bytes_out) == ("upstream_broken", 200, 4)
    assert trace.error == "upstream_broken"


JSON_LINES = (b"content-type", b"application/x-ndjson")


@pytest.mark.parametrize(
    ("fields", "dialect", "before", "event"),
    [
        ([SSE], "openai", b"data: 1\n\n", b"data: {"),
        ([SSE], "openai", b"", b"data: {"),
        (
            [(b"content-type", b"text/event-stream; x=y")],
            "anthropic",
            b"data: 1\r\n\r\n",
            b"event: error\ndata: {",
        ),
        ([JSON_LINES], "ollama", b'{"a":1}\n', b'{"error":"'),
        ([SSE], "openai", b"data: 1\n", b""),
        ([SSE], "openai", b"data", b""),
        ([JSON_LINES], "ollama", b'{"a"', b""),
        ([(b"content-type", b"application/json")], "openai", b"{}\n\n", b""),
        ([SSE, (b"content-length", b"99")], "openai", b"data: 1\n\n", b""),
        ([SSE, (b"content-encoding", b"99")], "openai", b"data: 1\n\n", b""),
    ],
)
def test_an_error_event_is_sent_before_the_break(
    fields: list[tuple[bytes, bytes]], dialect: str, before: bytes, event: bytes
) -> None:
    """There is none inside an event, in a document, or in a body with a length or a coding."""
    played = PlayedGateway(provider=f'dialect = "{dialect}"', route="error_event = true")
    response = played.begun(*fields)
    played.transport.take()
    if before:
        response.push(before)
    response.end(upstream_broken("reset"))
    written = played.transport.writes

    assert len(written) == bool(before) + bool(event)
    assert not before or before in written[0]
    if event:
        error = written[-1].partition(b"\r\n")[2]
        assert error.startswith(event)
        assert b"broke off" in error
    assert played.transport.count("half") == 1


@pytest.mark.parametrize(
    ("held", "leave", "end"),
    [
        (0, "takes", "complete"),
        (0, "closes", "complete"),
        (3, "closes", "client_gone"),
        (3, "stalls", "client_stalled"),
        (3, "is cut", "drained"),
    ],
)
def test_the_record_waits_until_the_client_has_the_response(
    held: int, leave: str, end: str
) -> None:
    """The provider's end is not the client's; a marker that is not taken completes nothing."""
    played = PlayedGateway(route='timeouts = { client_stall = "3s", total = "5s" }')
    response = played.begun(SSE, target="/p/v1/chat/completions")
    played.transport.hold(10)
    response.push(b"data: [DONE]\n\n")
    response.end()
    played.clock.advance(2)
    assert not played.sink.traces
    played.transport.hold(held)
    if leave == "closes":
        played.transport.end(FIN)
    elif leave == "is cut":
        played.site.cut()
    else:
        played.clock.pump([0.5] * 20)

    trace = played.trace()
    assert (trace.end_reason, trace.is_complete) == (end, end == "complete")
    assert trace.duration_s >= 2


@pytest.mark.parametrize(
    ("timeouts", "call", "end"),
    [
        ('idle = "5s"', "half", "upstream_idle"),
        ('client_stall = "3s", idle = "off"', "abort", "client_stalled"),
    ],
)
def test_a_deadline_of_the_route_ends_the_response(timeouts: str, call: str, end: str) -> None:
    """A silent provider, or a client that takes nothing, closes both connections."""
    played = PlayedGateway(route=f"timeouts = {{ {timeouts} }}")
    response = played.begun()
    response.push(b"data")
    if end == "client_stalled":
        played.transport.hold(3)
    played.clock.pump([0.5] * 10)

    assert response.aborts
    assert played.transport.count(call) == 1
    assert played.trace().end_reason == end


@pytest.mark.parametrize("phase", ["head", "body"])
def test_the_total_deadline_holds_for_every_phase(phase: str) -> None:
    """Before the head the client gets 504; afterwards the connection is closed."""
    played = PlayedGateway(route='timeouts = { total = "5s" }')
    played.call()
    response = played.response() if phase == "body" else None
    played.transport.take()
    played.clock.advance(5)

    trace = played.trace()
    assert (trace.end_reason, trace.error) == ("upstream_timeout", "upstream_timeout")
    assert trace.attempts[0].outcome in ("ok", *EndReason)
    if response is None:
        status, fields, _ = played.got()
        assert (status, fields[b"x-should-retry"]) == (504, b"false")
        assert played.upstream.cancelled == 1
        assert trace.attempts[0].outcome == "upstream_timeout"
    else:
        assert response.aborts
        assert played.transport.count("half") == 1


def test_the_total_deadline_ends_with_the_request() -> None:
    """A request that ended in time leaves no timer and writes nothing later."""
    played = PlayedGateway(route='timeouts = { total = "5s" }')
    played.begun().end()
    played.transport.take()
    played.transport.end(FIN)
    assert not played.clock.getDelayedCalls()

    assert not played.transport.writes
    assert played.trace().end_reason == "complete"


def test_a_fault_after_the_head_closes_the_provider(logged_failures: Any) -> None:
    """An unread response does not keep its connection."""
    played = PlayedGateway()
    response = played.begun((b"content-length", b"not a number"))

    assert response.aborts
    assert response.body is None
    assert played.trace().end_reason == "internal"
    assert len(logged_failures.flush(ValueError)) == 1


def test_a_fault_of_ours_is_an_internal_error(logged_failures: Any) -> None:
    """The log has the fault, and the client does not learn it."""
    played = PlayedGateway()
    played.upstream.error = ZeroDivisionError("s3cret")
    played.call()

    assert b"s3cret" not in b"".join(played.transport.writes)
    assert played.refusal() == (500, "internal")
    assert played.trace().end_reason == "internal"
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


# --- a client that leaves -------------------------------------------------------------------------

LEAVES: dict[str, tuple[Callable[[PlayedGateway], object], str]] = {
    "closes": (lambda played: played.transport.end(FIN), "client_gone"),
    "resets": (lambda played: played.transport.end(RESET), "client_gone"),
    "is closed by the proxy": (lambda played: played.site.cut(), "drained"),
}


@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("phase", ["upload", "head", "flowing", "paused"])
def test_a_client_that_leaves_ends_everything(how: str, phase: str) -> None:
    """In each phase the provider's connection is closed at once, and nothing is left."""
    leave, end = LEAVES[how]
    played = PlayedGateway()
    response = None
    if phase == "upload":
        played.send(request("POST", "/p", "X-Api-Key: key", JSON, "Content-Length: 9") + b"{")
    else:
        played.call()
        response = played.response() if phase != "head" else None
    if response is not None:
        response.push(b"data")
    if phase == "paused":
        played.transport.producer.pauseProducing()
        assert response is not None
        assert response.transport.is_paused()
    leave(played)

    trace = played.trace()
    assert trace.end_reason == end
    assert trace.error is None
    assert trace.status == (None if response is None else 200)
    assert played.upstream.cancelled == (phase == "head")
    if response is not None:
        assert response.aborts
        assert played.value("cancel_seconds_count") == 1
    if phase == "head":
        assert trace.attempts[0].outcome == end
        assert played.value("cancel_seconds_count") == 1
    if played.site.connections:
        played.transport.end(RESET)
    assert len(played.sink.traces) == 1
    assert not played.clock.getDelayedCalls()


def test_every_provider_is_closed_before_a_record_is_written() -> None:
    """If many clients leave in one turn, no provider waits for the end of another request."""
    played = PlayedGateway()
    left = []
    for number in range(3):
        if number:
            played.connect()
        left.append((played.transport, played.begun()))
    for transport, response in left:
        response.push(b"data")
        transport.end(RESET)

    assert [response.aborts for _, response in left] == [1, 1, 1]
    assert played.value("cancel_seconds_count") == 3
    assert (len(played.sink.traces), played.recorder.running) == (0, 3)
    played.clock.advance(0)
    assert [trace.end_reason for trace in played.sink.traces] == ["client_gone"] * 3
    assert played.recorder.running == 0
    assert not played.clock.getDelayedCalls()


def test_a_request_that_ends_twice_in_one_turn_has_one_record() -> None:
    """The total deadline may pass after the client left and before the request ended."""
    played = PlayedGateway(route='timeouts = { total = "3s" }')
    played.begun().push(b"data")
    played.transport.end(RESET)
    played.clock.rightNow += 3
    played.clock.advance(0)

    assert played.trace().end_reason == "client_gone"


def test_the_end_of_the_process_writes_the_record_at_once() -> None:
    """A client that left in the same turn has its record."""
    played = PlayedGateway()
    played.begun().push(b"data")
    played.transport.end(RESET)
    played.recorder.close_all()

    assert [trace.end_reason for trace in played.sink.traces] == ["client_gone"]
    assert played.trace().end_reason == "client_gone"


# --- bodies that stream ---------------------------------------------------------------------------


def upload(*fields: str) -> bytes:
    """Return the head of a request whose body is streamed unread."""
    kind = "Content-Type: application/octet-stream"
    return request("POST", "/p/files", "X-Api-Key: key", kind, *fields)


def test_an_unread_body_is_streamed_to_the_provider() -> None:
    """The provider gets the head first, and each part of the body when it comes."""
    played = PlayedGateway()
    played.send(upload("Content-Length: 9") + b"abc")
    body = played.asked.body
    assert body.length == 9
    taken = StringTransport()
    done = body.startProducing(taken)
    assert taken.value() == b"abc"
    played.send(b"defghi")
    assert taken.value() == b"abcdefghi"
    assert done.called
    played.response(200, (b"content-length", b"0")).end()

    assert played.site.memory.held == 0
    assert played.trace().bytes_in == 9
    assert not played.transport.count("half")


def test_a_streaming_body_is_bounded() -> None:
    """A body over the limit fails with 413, and the provider does not get its end."""
    played = PlayedGateway(route='request_body = "1KiB"')
    played.send(upload("Transfer-Encoding: chunked"))
    taken = StringTransport()
    done = played.asked.body.startProducing(taken)
    failures: list[Any] = []
    done.addErrback(failures.append)
    played.send(chunked(bytes(1024)))
    assert not failures
    played.send(chunked(b"x"))
    assert failures[0].value.status == 413
    played.asked.response.errback(failures[0].value)

    assert played.refusal() == (413, "body_too_large")
    assert played.trace().error == "body_too_large"


def test_a_routes_own_limit_bounds_streams_too() -> None:
    """The limit of the selected route counts, not the largest one of the path."""
    played = PlayedGateway(
        route='request_body = "1KiB"',
        more='[[routes]]\npath = "/"\nproviders = ["p"]\nrequest_body = "1MiB"',
    )
    played.send(upload("Content-Length: 2000"))

    assert played.got()[0] == 413
    assert not played.upstream.asked


@pytest.fixture
def uploading() -> Iterator[tuple[PlayedGateway, socket.socket]]:
    """A gateway with an upload of 1 MB, and the client's end of its socket."""
    played = PlayedGateway(route='timeouts = { first_byte = "off" }')
    ours, theirs = socket.socketpair()
    with ours, theirs:
        played.transport.socket = ours  # type: ignore[attr-defined]  # the gateway peeks at it
        played.send(upload("Content-Length: 1000000"))
        yield played, theirs


def test_a_full_provider_pauses_the_client(
    uploading: tuple[PlayedGateway, socket.socket],
) -> None:
    """A paused client is not read, but its end is noticed."""
    played, theirs = uploading
    taken = StringTransport()
    played.asked.body.startProducing(taken)
    producer: Any = taken.producer
    producer.pauseProducing()
    assert played.transport.is_paused()
    played.clock.pump([1] * 200)  # the deadline of the body stands still, too
    producer.resumeProducing()
    assert not played.transport.is_paused()
    producer.pauseProducing()
    theirs.sendall(b"more")
    played.clock.advance(0.1)
    assert not played.transport.count("abort")
    theirs.close()
    played.clock.advance(0.1)
    assert played.transport.count("abort") == 1
    played.transport.end(RESET)

    assert played.upstream.cancelled == 1
    assert played.trace().end_reason == "client_gone"


def test_a_client_is_paused_until_its_provider_is_connected(
    uploading: tuple[PlayedGateway, socket.socket],
) -> None:
    """Before that, the gateway reads 64 KiB and not much more."""
    played, _ = uploading
    played.send(bytes(65535))
    paused = [played.transport.is_paused()]
    played.send(b"x")
    paused.append(played.transport.is_paused())
    taken = StringTransport()
    played.asked.body.startProducing(taken)
    paused.append(played.transport.is_paused())

    assert paused == [False, True, False]
    assert len(taken.value()) == 65536


def test_a_provider_that_wants_no_more_resumes_the_client(
    uploading: tuple[PlayedGateway, socket.socket],
) -> None:
    """The paused client is read again, and the rest of its body is dropped."""
    played, _ = uploading
    taken = StringTransport()
    played.asked.body.startProducing(taken)
    played.asked.body.pauseProducing()
    played.asked.body.stopProducing()
    played.send(b"more")

    assert not played.transport.is_paused()
    assert not taken.value()
    assert taken.producer is None


def test_an_early_response_ends_the_upload() -> None:
    """The client gets the response while it sends; the rest is dropped before the close."""
    played = PlayedGateway()
    played.send(upload("Content-Length: 1000000") + b"abc")
    body = played.asked.body
    body.startProducing(StringTransport())
    response = played.response(413, (b"content-length", b"2"))
    body.stopProducing()
    response.push(b"no")
    response.end()
    status, fields, got = played.got()

    assert (status, got, fields[b"connection"]) == (413, b"no", b"close")
    assert played.trace().end_reason == "upstream_refused"
    played.send(bytes(100000))
    assert played.transport.count("half") == 1


@pytest.mark.parametrize("provider_stops", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_an_upload_beyond_its_bounds_while_the_response_flows(
    provider_stops: bool, late: bool
) -> None:
    """If the provider wants no more of it, it is of no account; else its own reason is recorded."""
    played = PlayedGateway(route='request_body = "1KiB"')
    played.send(upload("Transfer-Encoding: chunked") + chunked(b"abc"))
    body = played.asked.body
    sending = body.startProducing(StringTransport())
    response = played.response(200, SSE)
    sending.addErrback(lambda failure: response.end(failure.value))
    response.push(b"data: 1\n\n")
    if provider_stops:
        body.stopProducing()
    if late:
        played.clock.pump([1.0] * 65)
    else:
        played.send(chunked(bytes(2000)))
    if provider_stops:
        response.push(b"data: [DONE]\n\n")
        response.end()
    trace = played.trace()

    assert trace.status == 200
    if provider_stops:
        assert (trace.end_reason, trace.error, trace.chunks) == ("complete", None, 2)
    else:
        error = "slow_request" if late else "body_too_large"
        assert (trace.end_reason, trace.error, trace.chunks) == ("rejected", error, 1)


def test_100_continue_is_sent_when_the_provider_takes_the_body() -> None:
    """The client sends a streamed body only to a connected provider."""
    played = PlayedGateway()
    played.send(upload("Expect: 100-continue", "Content-Length: 5"))
    assert not played.transport.writes
    played.asked.body.startProducing(StringTransport())

    assert played.transport.take() == b"HTTP/1.1 100 Continue\r\n\r\n"
    played.send(b"hello")
    played.response().end()
    assert played.trace().end_reason == "complete"
