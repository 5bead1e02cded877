"""The flight recorder, and its capsules played again: the same fault is seen a second time."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmproxy.record.flight import KEPT
from tests.support.daemon import provider_table, route_table
from tests.support.demo import Demo
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    client_config,
    open_live_proxy,
    post,
    read_response,
    read_stepwise,
    response,
    trace_of,
)
from tests.support.programs import free_port
from tests.support.scripts import DONE, OK, SSE
from tests.support.sockets import Wire, chunked, connect, request

PAUSE_S = 0.1
"""Seconds between two pieces, which are to be read one by one also where the machine is busy."""

LONG_PAUSE_S = 0.3
EVENTS = [b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % (b"x" * n) for n in (40, 400, 90)]
FAILED = b'data: {"error":{"message":"it gave up","type":"server_error"}}\n\n'
JSON = response(200, "Content-Type: application/json", body=b'{"choices":[' + b" " * 500 + b"]}")
REFUSED = b'{"error":{"message":"%s"}}' % (b"slow " * 40)
REFUSAL = response(429, "Content-Type: application/json", "Connection: close", body=REFUSED)
SAID = [{"role": "user", "content": "Hello"}]
BODY = json.dumps({"model": "m", "stream": True, "messages": SAID}).encode()
SOON = 'timeouts = { idle = "1s", first_byte = "1s" }'
"""Of the routes on which a silence is waited out; on the others nothing is late."""


class Fault(NamedTuple):
    """How a provider fails, and what the record says of it.

    Args:
        end: the end reason.
        pieces: what is sent, each behind a pause; a float is a longer pause.
        ending: ``fin``, ``reset`` or ``held``, until the proxy ends the connection.
        cause: what tells it apart from others of the same reason.
    """

    end: str
    pieces: tuple[bytes | float, ...]
    ending: str = "fin"
    cause: str | None = None

    @property
    def is_silent(self) -> bool:
        """Whether the proxy is to lose its patience."""
        return self.ending == "held"

    def play(self, wire: Wire) -> None:
        """Be the provider."""
        wire.read_request()
        for piece in self.pieces:
            if isinstance(piece, float):
                time.sleep(piece)
                continue
            wire.send(piece)
            time.sleep(PAUSE_S)
        if self.ending == "reset":
            wire.reset()
        elif self.ending == "held":
            wire.wait_closed()


HEAD = SSE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
PACED = (HEAD, chunked(EVENTS[0]), chunked(EVENTS[1]), LONG_PAUSE_S, chunked(EVENTS[2]))
FAULTS = {
    "reset between two events": Fault("upstream_broken", PACED, "reset", "reset"),
    "closed within an event": Fault(
        "upstream_broken", (*PACED, chunked(b"data: {")), "fin", "closed"
    ),
    "no chunk": Fault("upstream_protocol", (*PACED, b"no chunk\r\n")),
    "silence": Fault("upstream_idle", PACED, "held"),
    "no marker": Fault("unfinished", (*PACED, chunked(b""))),
    "an error event": Fault("upstream_failed", (*PACED, chunked(FAILED), chunked(b""))),
    "a refusal": Fault("upstream_refused", (REFUSAL,)),
    "half of a whole response": Fault("upstream_broken", (JSON[:400],), "fin", "closed"),
    "no head": Fault("upstream_timeout", (), "held", "first_byte"),
    "a reset without a head": Fault("upstream_broken", (0.2,), "reset"),
    "a head that is none": Fault("upstream_protocol", (b"not HTTP\r\n\r\n",)),
}


class Stand(NamedTuple):
    """A daemon between a provider that fails, and a port for one that plays it again."""

    live: LiveProxy
    port: int

    def ended(self, name: str) -> dict[str, Any]:
        """Return the capsule of a request."""
        capsule: dict[str, Any] = json.loads(self.live.daemon.admin(f"/streams/ended/{name}"))
        return capsule

    def fail(self, path: str, model: str) -> dict[str, Any]:
        """Send a request, read whatever comes, and return the capsule of its end."""
        body = BODY.replace(b'"m"', f'"{model}"'.encode())
        mark = f"{path}-{model}-{time.monotonic_ns()}"
        fields = (f"X-Request-Id: {mark}", "Connection: close")
        with self.live.connect() as client:
            client.send(post(f"{path}/v1/chat/completions", body, *fields))
            client.wait_closed()
        return self.ended(trace_of(self.live.daemon, client_request_id=mark)["id"])


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """One for all tests."""
    port = free_port()
    tables = [
        ONE_ROUTE,
        provider_table("q", url=f"http://127.0.0.1:{port}"),
        route_table("/soon/p", "p", SOON),
        route_table("/q", "q"),
        route_table("/soon/q", "q", SOON),
        client_config("team", "team-key"),
    ]
    folder = tmp_path_factory.mktemp("capsules")
    with open_live_proxy(folder, "".join(tables)) as live:
        yield Stand(live, port)


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_provider_did_is_kept_and_can_be_played_again(stand: Stand, name: str) -> None:
    """The second time the same is seen: how it ended, its sizes, and where it paused."""
    fault = FAULTS[name]
    stand.live.script = fault.play
    soon = "/soon" if fault.is_silent else ""
    first = stand.fail(f"{soon}/p", "m")
    assert (first["end_reason"], first["cause"]) == (fault.end, fault.cause)
    with Demo(port=stand.port, capsule=json.dumps(first)):
        second = stand.fail(f"{soon}/q", "demo-replay")
    for key in ("end_reason", "error", "cause", "status", "stream"):
        assert second[key] == first[key], key
    came, again = first["response"], second["response"]
    if came is None:
        assert again is None
        return
    sizes = [size for _, size in came["last_chunks"]]
    assert sum(sizes) == came["bytes"]
    for key in ("status", "content_encoding", "length", "bytes", "ends_between_events"):
        assert again[key] == came[key], key
    # A busy machine may read two chunks as one, and late; it never splits one, or is early.
    assert set(accumulate(size for _, size in again["last_chunks"])) <= set(accumulate(sizes))
    assert again["last_chunk_s"] > came["last_chunk_s"] - first["head_s"] - 0.01


def test_a_client_that_leaves_is_kept_too(stand: Stand) -> None:
    """What had come until then is played, and then silence."""
    turn = stand.live.stream(*EVENTS, DONE)
    with stand.live.begin("/p/v1/chat/completions", BODY, "X-Request-Id: leaves") as client:
        read_stepwise(client, turn, *EVENTS[:2])
    first = stand.ended(trace_of(stand.live.daemon, client_request_id="leaves")["id"])
    turn.give(3)  # a piece that came before the daemon saw the client leave would be counted
    assert (first["end_reason"], first["response"]["chunks"]) == ("client_gone", 2)
    with Demo(port=stand.port, capsule=json.dumps(first)):
        second = stand.fail("/soon/q", "demo-replay")
    assert second["end_reason"] == "upstream_idle"
    assert second["response"]["bytes"] == first["response"]["bytes"]


def test_the_list_has_the_newest_first_and_nothing_that_a_caller_wrote(stand: Stand) -> None:
    """A refusal is there, too; a request that ended well is not."""
    stand.live.reply(OK)
    secret = "sk-never-kept"
    assert stand.live.get(request("GET", "/p/v1/models", "Connection: close")).status == 200
    lines = (f"Authorization: Bearer {secret}", "X-Session-Id: my-session", "User-Agent: mine/1")
    got = stand.live.get(post(f"/p/v1/chat/completions?mark={secret}", BODY, *lines))
    assert got.status == 401
    text = stand.live.daemon.admin("/streams/ended")
    rows = json.loads(text)
    assert [row["time"] for row in rows] == sorted((row["time"] for row in rows), reverse=True)
    assert "complete" not in {row["end_reason"] for row in rows}
    (row,) = [row for row in rows if row["id"] == got.values(b"x-llmproxy-request-id")[0].decode()]
    assert (row["end_reason"], row["status"], row["response"]) == ("rejected", 401, None)
    for written in (secret, "my-session", "mine/1", "Hello", "/v1/chat"):
        assert written not in text
    assert row == stand.ended(row["id"])
    assert_settles(stand.live.daemon)


def test_of_each_end_reason_the_newest_are_kept(stand: Stand) -> None:
    """Requests that are refused, however many, push out no fault of a provider's."""
    stand.live.script = FAULTS["a refusal"].play
    fault = stand.fail("/p", "m")
    for _ in range(KEPT + 3):
        assert stand.live.get(request("GET", "/nowhere")).status == 404
    rows = json.loads(stand.live.daemon.admin("/streams/ended"))
    assert sum(row["end_reason"] == "rejected" for row in rows) == KEPT
    assert fault in rows


@pytest.mark.parametrize("name", ["0", "x/y", "%2e", ""])
def test_another_id_is_a_404_in_words(stand: Stand, name: str) -> None:
    """And the list is only read."""
    with connect(stand.live.daemon.admin_port) as client:
        client.send(request("GET", f"/streams/ended/{name}"))
        got = read_response(client)
        assert (got.status, "is kept" in got.json()["error"]["message"]) == (404, True)
        client.send(request("DELETE", "/streams/ended"))
        assert read_response(client).status == 405


@pytest.mark.parametrize("path", ["/streams/ended", "/streams/ended/0"])
def test_a_page_of_somebody_else_reads_none(stand: Stand, path: str) -> None:
    """A browser may be told that its host's name is here (DNS rebinding)."""
    with connect(stand.live.daemon.admin_port) as client:
        client.send(request("GET", path, host="rebound.example"))
        assert read_response(client).status == 421


# --- what is beside the chunks --------------------------------------------------------------------

HEAD = b"".join(
    (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n",
        b"Server: edge/1\r\nVia: 1.1 hop\r\nCF-Ray: ray-1\r\nX-Request-Id: req_1\r\n",
        b"Set-Cookie: session=secret\r\nX-Account: secret\r\nX-RateLimit-Remaining: 7\r\n\r\n",
    )
)
KEEPING = ONE_ROUTE + route_table("/kept", "p", 'capture = "content"')


def capsule_of(live: LiveProxy, got: Any) -> dict[str, Any]:
    """Return the capsule of the request that got this head."""
    (name,) = got.values(b"x-llmproxy-request-id")
    trace_of(live.daemon, id=name.decode())
    found: dict[str, Any] = json.loads(live.daemon.admin(f"/streams/ended/{name.decode()}"))
    return found


@pytest.mark.parametrize("path", ["/p", "/kept"])
def test_a_broken_stream_has_its_fields(tmp_path: Path, path: str) -> None:
    """Those that name requests and hops; the end of the body where the route keeps content."""
    sent = b"data: " + b"x" * 6000 + b"\n\n"

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(HEAD, chunked(sent))
        time.sleep(PAUSE_S)
        wire.reset()

    with open_live_proxy(tmp_path, KEEPING) as live:
        live.script = script
        with connect(live.daemon.port) as client:
            client.send(post(f"{path}/v1/chat/completions", BODY))
            got = read_response(client, bodiless=True)
            assert client.read_chunk()
            client.wait_closed()
        found = capsule_of(live, got)
        assert (found["end_reason"], found["to_client"]) == ("upstream_broken", "broken_off")
        body = found["response"]
        assert body["fields"] == [
            *(["transfer-encoding", "chunked"], ["server", "edge/1"], ["via", "1.1 hop"]),
            *(["cf-ray", "ray-1"], ["x-request-id", "req_1"]),
        ]
        assert "secret" not in json.dumps(found)
        if path == "/kept":
            assert base64.b64decode(body["last_bytes"]) == sent[-4096:]
        else:
            assert body["last_bytes"] is None


def test_a_refusal_has_all_fields(tmp_path: Path) -> None:
    """Of those that could be secrets, the length of the value."""
    head = HEAD.replace(b"200 OK", b"500 No").replace(b"Transfer-Encoding: chunked", b"Allow: GET")
    head = head.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n")
    with open_live_proxy(tmp_path, KEEPING) as live:
        live.reply(head + b"no")
        got = live.get(post("/p/v1/chat/completions", BODY))
        assert got.status == 500
        found = capsule_of(live, got)
        assert (found["end_reason"], found["to_client"]) == ("upstream_refused", "whole")
        fields = dict(found["response"]["fields"])
        assert fields["set-cookie"] == "(14 bytes)"
        assert fields["x-account"] == "(6 bytes)"
        assert (fields["x-ratelimit-remaining"], fields["allow"]) == ("7", "GET")
        assert "secret" not in json.dumps(found)


def test_a_capsule_says_what_the_client_got(tmp_path: Path) -> None:
    """An error of ours, or nothing because it left."""
    with open_live_proxy(tmp_path, KEEPING) as live:
        got = live.get(post("/nowhere", BODY))
        assert capsule_of(live, got)["to_client"] == "error"
        live.hold(SSE, chunked(EVENTS[0]))
        with connect(live.daemon.port) as client:
            client.send(post("/p/v1/chat/completions", BODY))
            got = read_response(client, bodiless=True)
            assert client.read_chunk()
        found = capsule_of(live, got)
        assert (found["end_reason"], found["to_client"]) == ("client_gone", "left")
