"""``/-/pace`` behind a site, by a turned clock: who may, what is counted, and how it ends."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from llmproxy.gateway.pace import PATH, Marks, PacedStreams, PacePage
from llmproxy.gateway.pace_page import proxy_files
from llmproxy.policy.auth import Auth
from llmproxy.record.trace import Trace
from llmproxy.server.handler import Handler, Router
from tests.gateway.played import PlayedGateway
from tests.support.fake_transport import FIN
from tests.support.sockets import request

KEY = "X-Api-Key: key"
TWO = "/-/pace?n=2"


class Paced(PlayedGateway):
    """A gateway beside which ``/-/pace`` is served, as the setup does."""

    def __init__(self, client: str = "", *, anonymous: bool = False) -> None:
        super().__init__(client=client)
        self.gateway.limits.follow({"c": self.client})
        proxy = msgspec.structs.replace(self.config.proxy, anonymous=anonymous)
        auth = Auth(msgspec.structs.replace(self.config, proxy=proxy), self.recorder.now)
        paced = PacedStreams(
            self.config,
            msgspec.structs.replace(self.gateway.rules, auth=auth),
            self.recorder,
            self.metrics,
            Marks(),
            limits=self.gateway.limits,
            reactor=self.clock,
            clock=self.clock.seconds,
        )
        paths: dict[bytes, Handler] = {PATH: paced}
        for name, file in proxy_files().items():
            paths[PATH + b"/" + name] = PacePage(self.recorder, file)
        self.site.serve(Router(self.gateway, paths))

    def get(self, target: str = TWO, *fields: str, method: str = "GET", key: str = KEY) -> None:
        """Let a request come in."""
        self.send(request(method, target, *((key,) if key else ()), *fields))
        self.clock.advance(0)

    def json(self, target: str) -> Any:
        """Return the JSON that is at a path, on another connection."""
        self.connect()
        self.get(target)
        status, _, body = self.got()
        assert status == 200, body
        return json.loads(body)

    def last(self) -> Trace:
        """Return the last trace."""
        self.clock.advance(0)
        return self.sink.traces[-1]


def test_a_stream_is_recorded_and_counted_as_any_other() -> None:
    """It has no route and no provider; the times of providers' streams are left alone."""
    played = Paced()
    played.get()
    assert played.value("active_streams") == 1
    status, fields, body = played.got()
    assert status == 200
    assert fields[b"content-type"] == b"text/event-stream"
    assert fields[b"x-accel-buffering"] == b"no"
    assert fields[b"cache-control"] == b"no-cache, no-transform"
    assert len(fields[b"x-llmproxy-request-id"]) == 24
    assert b"content-length" not in fields
    size, _, rest = body.partition(b"\r\n")
    assert int(size, 16) == 200
    found = json.loads(rest[: int(size, 16)].removeprefix(b"data: "))
    assert (found["n"], found["sent"], found["ms"]) == (1, 1_700_000_000.0, 0.0)
    played.clock.advance(0.25)
    assert played.transport.take().endswith(b"\r\n0\r\n\r\n")
    trace = played.trace()
    assert (trace.client, trace.route, trace.provider, trace.dialect) == ("c", None, None, None)
    assert (trace.path, trace.status, trace.end_reason) == ("/-/pace", 200, "complete")
    assert (trace.stream, trace.chunks, trace.bytes_out, trace.attempts) == (True, 2, 400, [])
    assert trace.first_chunk_s == 0
    assert trace.longest_gap_s == 0.25
    labels = {"route": "", "provider": "", "client": "c", "method": "GET", "status": "2xx"}
    assert played.value("requests_total", **labels) == 1
    assert played.value("bytes_total", direction="out") == 400
    assert played.value("chunks_total") == 2
    assert played.value("chunk_gap_seconds_count") == 0


def test_the_head_leaves_before_the_first_event() -> None:
    """Each event is then a write of its own."""
    played = Paced()
    played.send(request("GET", TWO, KEY))
    assert played.transport.writes[-1].endswith(b"\r\n\r\n")
    played.clock.advance(0)
    assert played.transport.writes[-1].startswith(b"c8\r\ndata: {")


def test_lines_instead_of_events() -> None:
    """With the type that says so."""
    played = Paced()
    played.get("/-/pace?n=1&format=ndjson&bytes=100")
    _, fields, body = played.got()
    assert fields[b"content-type"] == b"application/x-ndjson"
    assert body.startswith(b'64\r\n{"n":1,')


@pytest.mark.parametrize(
    ("key", "status", "reason"),
    [
        ("", 401, "no_key"),
        ("X-Api-Key: other", 401, "unknown_key"),
        ("Authorization: Bearer key", 200, None),
        ("X-Llmproxy-Key: key", 200, None),
    ],
)
def test_only_known_clients_are_served(key: str, status: int, reason: str | None) -> None:
    """By a key in the usual places; a refusal is an error as usual, and recorded."""
    played = Paced()
    played.get("/-/pace?n=1", key=key)
    found, fields, body = played.got()
    assert found == status
    if reason is not None:
        assert json.loads(body)["error"]["code"] == fields[b"x-llmproxy-error"].decode() == reason
    trace = played.trace()
    assert (trace.status, trace.error) == (status, reason)


def test_a_key_in_the_query_is_refused() -> None:
    """It would stand in the logs of every hop."""
    played = Paced()
    played.get("/-/pace?n=1&mark=key", key=KEY)
    assert played.refusal() == (401, "misplaced_key")


@pytest.mark.parametrize(
    ("fields", "status"), [((), 200), (("Origin: https://evil.example",), 403)]
)
def test_who_needs_no_key_is_served_but_no_page_of_others(
    fields: tuple[str, ...], status: int
) -> None:
    """As at a route without ``allowed_origins``."""
    played = Paced(anonymous=True)
    played.get("/-/pace?n=1", *fields, key="")
    assert played.got()[0] == status
    assert played.trace().client == ("anonymous" if status == 200 else None)


@pytest.mark.parametrize(
    ("target", "method", "fields", "refusal"),
    [
        (TWO, "POST", (), (405, "method")),
        (TWO, "OPTIONS", (), (405, "method")),
        ("/-/pace?n=0", "GET", (), (400, "bad_query")),
        ("/-/pace?n=1&mark=a_b", "GET", (), (400, "bad_query")),
        ("/-/pace?n=1&mark=", "GET", (), (400, "bad_query")),
        ("/-/pace?ended=a&n=1", "GET", (), (400, "bad_query")),
        ("/-/pace?ended=a", "GET", (), (404, "unknown_mark")),
        (TWO, "GET", ("Via: 1.1 us",), (508, "loop")),
        (TWO, "GET", ("X_Api_Key: a",), (400, "bad_header")),
        ("/-/pace/other", "GET", (), (404, "no_route")),
        ("/-/pace/", "POST", (), (405, "method")),
    ],
)
def test_what_is_refused(
    target: str, method: str, fields: tuple[str, ...], refusal: tuple[int, str]
) -> None:
    """With an error as usual, and a record."""
    played = Paced()
    played.get(target, *fields, method=method)
    assert played.refusal() == refusal
    assert (played.trace().error, played.trace().end_reason) == (refusal[1], "rejected")


def test_a_body_is_refused() -> None:
    """Nothing would read it."""
    played = Paced()
    played.send(request("GET", TWO, KEY, body=b"x"))
    assert played.refusal() == (413, "body_too_large")


def test_a_head_alone() -> None:
    """HEAD is that of the stream, and ends with it."""
    played = Paced()
    played.get("/-/pace?n=2&break_after=1", method="HEAD")
    status, fields, body = played.got()
    assert (status, fields[b"content-type"], body) == (200, b"text/event-stream", b"")
    assert (played.trace().end_reason, played.trace().chunks) == ("complete", 0)


# -- limits ----------------------------------------------------------------------------------------


def test_streams_count_against_the_limits_of_their_client() -> None:
    """Of streams at once, until it ends, and of requests in a minute; no tokens count."""
    played = Paced("max_streams = 1\nrequests_per_minute = 3\ntokens_per_day = 1")
    played.get()
    played.got()
    first = played.transport
    played.connect()
    played.get()
    assert played.refusal() == (429, "limited")
    played.clock.advance(0.25)
    assert first.take()
    for status in (200, 200, 429):
        played.connect()
        played.get("/-/pace?n=1")
        assert played.got()[0] == status
    assert {trace.counted_tokens for trace in played.sink.traces} == {None}


# -- ends ------------------------------------------------------------------------------------------


def test_a_client_that_leaves_ends_it_at_once() -> None:
    """Nothing is made any more, and no timer is left."""
    played = Paced()
    played.get("/-/pace?n=9&mark=a")
    played.transport.end(FIN)
    trace = played.trace()
    assert (trace.end_reason, trace.chunks) == ("client_gone", 1)
    played.clock.advance(2)
    found = played.json("/-/pace?ended=a")
    assert (found["ended"], found["events"], found["seconds_ago"]) == ("client_gone", 1, 2.0)


def test_a_client_that_leaves_in_a_silence_ends_it_at_once() -> None:
    """It is the transport that tells, and no write."""
    played = Paced()
    played.get("/-/pace?n=9&silence_ms=600000")
    played.clock.advance(100)
    played.transport.end(FIN)
    assert (played.trace().end_reason, played.trace().duration_s) == ("client_gone", 100)


def test_a_full_wire_holds_it_up() -> None:
    """No event is made until the client takes bytes again; the record says how long that was."""
    played = Paced()
    played.get("/-/pace?n=3&mark=a")
    assert played.transport.producer is not None
    played.transport.producer.pauseProducing()
    assert played.value("paused_streams") == 1
    played.clock.advance(10)
    assert played.transport.count("abort") == 0
    played.transport.take()
    played.transport.producer.resumeProducing()
    played.clock.advance(0)
    assert b'"n":2' in played.transport.take()
    played.clock.advance(0.25)
    assert (played.trace().chunks, played.trace().paused_s) == (3, 10)


def test_the_end_of_a_drain_cuts_it() -> None:
    """As any other stream."""
    played = Paced()
    played.get("/-/pace?n=9&mark=a")
    played.site.cut()
    assert played.trace().end_reason == "drained"
    assert played.json("/-/pace?ended=a")["ended"] == "drained"


def test_it_breaks_off_where_that_is_asked_for() -> None:
    """The client sees a broken body, the record that all went as was asked."""
    played = Paced()
    played.get("/-/pace?n=9&break_after=2&mark=a")
    played.clock.advance(0.25)
    data = played.transport.take()
    assert b'"n":2' in data
    assert b"\r\n0\r\n\r\n" not in data
    assert played.transport.count("half") == 1
    played.transport.end(FIN)
    assert (played.trace().end_reason, played.trace().chunks) == ("complete", 2)
    found = played.json("/-/pace?ended=a")
    assert (found["ended"], found["events"]) == ("broken", 2)


# -- marks -----------------------------------------------------------------------------------------


def test_what_became_of_a_stream_can_be_asked() -> None:
    """While it runs, and afterwards; with what hops have added, and nothing of a key."""
    played = Paced()
    played.get(
        "/-/pace?n=2&mark=a-B-9",
        "Via: 1.0 first",
        "Via: 1.1 second",
        "X-Envoy-Expected-Rq-Timeout-Ms: 15000",
        "X-Forwarded-For: 192.0.2.1",
        "X-Forwarded-Port: 443",
        "X-Forwarded-Server: edge",
        "X-Other: 1",
        "Cookie: a=b",
        "Authorization: Bearer key",
        "X-Varnish: 1 2",
        f"X-Forwarded-Host: {'llmp_' + 'k' * 43}",
    )
    running = played.transport
    found = played.json("/-/pace?ended=a-B-9")
    assert found == {
        "ended": None,
        "events": 1,
        "seconds_ago": None,
        "request": {
            "version": "1.1",
            "via": "1.0 first, 1.1 second",
            "x-envoy-expected-rq-timeout-ms": "15000",
            "x-forwarded-for": "192.0.2.1",
            "x-forwarded-port": "443",
            "x-forwarded-server": "edge",
            "x-varnish": "1 2",
        },
    }
    played.clock.advance(0.25)
    assert running.take()
    found = played.json("/-/pace?ended=a-B-9")
    assert (found["ended"], found["events"], found["seconds_ago"]) == ("complete", 2, 0)


def test_a_name_is_its_clients_own() -> None:
    """Nobody sees what others measure."""
    marks = Marks()
    marks.keep("a", "word", object())  # type: ignore[arg-type]  # no fate is looked into
    with pytest.raises(Exception, match="remembered"):
        marks.find("b", "word")
    assert marks.find("a", "word") is not None


def test_the_last_names_are_remembered() -> None:
    """Some hundreds: memory is bounded, whoever asks how often."""
    marks = Marks()
    for number in (*range(1000), 800, 1000):  # that one is young again
        marks.keep("a", str(number), object())  # type: ignore[arg-type]  # never looked into
    assert marks.find("a", "800") is not None
    assert marks.find("a", "802") is not None
    with pytest.raises(Exception, match="remembered"):
        marks.find("a", "801")


# -- the page --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", b"text/html; charset=utf-8"),
        ("page.css", b"text/css; charset=utf-8"),
        ("page.mjs", b"text/javascript; charset=utf-8"),
        ("verdict.mjs", b"text/javascript; charset=utf-8"),
    ],
)
def test_the_page_needs_no_key_and_loads_nothing_else(name: str, kind: bytes) -> None:
    """A policy sees to it; the page is recorded as any request."""
    played = Paced()
    played.get(f"/-/pace/{name}?x", key="")
    status, fields, body = played.got()
    assert (status, fields[b"content-type"]) == (200, kind)
    assert int(fields[b"content-length"]) == len(body) > 500
    policy = fields[b"content-security-policy"].decode()
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
    assert fields[b"x-content-type-options"] == b"nosniff"
    trace = played.trace()
    assert (trace.path, trace.end_reason) == (f"/-/pace/{name}", "complete")
    assert (trace.client, trace.bytes_out) == (None, len(body))
