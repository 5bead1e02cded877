"""Requests that an operator ends: of each kind and in each phase, and what their clients see."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import (
    LiveProxy,
    assert_settles,
    begin,
    client_config,
    read_response,
    trace_of,
    until,
    write_credential,
)
from tests.support.sandbox import connect_head
from tests.support.scripts import SSE, Notes
from tests.support.sockets import Provider, Wire, chunked, connect, request
from tests.support.websocket import handshake, read_switch, switch

TOKEN = "admin-TOKEN"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
BODY = b'{"model":"m","stream":true}'
CHAT = "/v1/chat/completions"


class Killing(LiveProxy):
    """A daemon whose operator ends requests.

    Attributes:
        ends: how the daemon has ended its connections to the provider.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends = Notes()

    def change(self, name: str, token: str = TOKEN) -> int:
        """End a request; return the status of the response."""
        url = f"http://127.0.0.1:{self.daemon.admin_port}/streams/{name}"
        bearer = {"Authorization": f"Bearer {token}"}
        asked = urllib.request.Request(url, method="DELETE", headers=bearer)
        try:
            with urllib.request.urlopen(asked, timeout=20) as response:  # noqa: S310 - it is http
                status: int = response.status
        except urllib.error.HTTPError as error:
            return error.code
        return status

    def rows(self) -> list[dict[str, Any]]:
        """Return what is being served."""
        found: list[dict[str, Any]] = json.loads(self.daemon.admin("/streams"))["streams"]
        return found

    def only(self, phase: str) -> dict[str, Any]:
        """Wait until one request is being served, and in this phase; return its row."""

        def found() -> dict[str, Any] | None:
            rows = self.rows()
            return rows[0] if len(rows) == 1 and rows[0]["phase"] == phase else None

        row: dict[str, Any] = until(found, f"one request is {phase}")
        return row

    def kill(self, phase: str) -> str:
        """End the one request that is being served, once it is in this phase; return its id."""
        name: str = self.only(phase)["id"]
        assert self.change(name) == 200
        return name

    def assert_killed(self, name: str, status: int | None, to_client: str) -> dict[str, Any]:
        """All that is kept of the request says so, and nothing is left; return its record."""
        record = trace_of(self.daemon, id=name)
        assert (record["end_reason"], record["status"]) == ("killed", status)
        assert record["is_complete"] is False
        until(lambda: not self.rows(), "nothing runs")
        assert self.daemon.metrics()['llmproxy_ended_total{reason="killed"}'] == 1
        line = self.daemon.wait_log("killed", id=name, end_reason="killed")
        assert line["level"] in ("info", "warn")
        capsule = json.loads(self.daemon.admin(f"/streams/ended/{name}"))
        assert (capsule["end_reason"], capsule["to_client"]) == ("killed", to_client)
        assert_settles(self.daemon)
        assert self.change(name) == 404
        return record


def config(url: str) -> str:
    """Return providers and routes of every kind."""
    found = provider_table("p", url=url) + provider_table("q", url=url)
    found += provider_table("r", url=url, dialect="anthropic")
    found += provider_table(
        "one", 'max_streams = 1\nqueue = { size = 5, timeout = "60s" }', url=url
    )
    found += route_table("/p", "p") + route_table("/two", 'p", "q')
    found += route_table("/claude", "r") + route_table("/one", "one")
    found += route_table("/told", "p", "error_event = true")
    found += route_table("/socket", "p", "websocket = true")
    return found + route_table("/drain", "p", 'on_disconnect = "drain"')


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Killing]:
    """Such a daemon."""
    live = Killing()
    text = config(live.provider.url) + client_config("team", KEY)
    text += '[timeouts]\nclient_stall = "1s"\n' + write_credential(tmp_path, "admin-token", TOKEN)
    with live.provider, Daemon(tmp_path, text, admin='token = "admin-token"') as live.daemon:
        yield live


def silent(ends: Notes, *pieces: bytes) -> Callable[[Wire], None]:
    """Return a provider that reads a request, sends these bytes, and is silent then."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(*pieces)
        ends.put(wire.wait_closed())

    return script


def ask(live: Killing, path: str, body: bytes = BODY) -> Wire:
    """Send a request; the test reads what comes."""
    wire = live.connect()
    wire.send(request("POST", path, "Content-Type: application/json", body=body))
    return wire


@pytest.mark.parametrize(
    ("path", "shape"),
    [("/p" + CHAT, "openai"), ("/two" + CHAT, "openai"), ("/claude/v1/messages", "anthropic")],
)
def test_a_request_without_a_response_gets_an_error(live: Killing, path: str, shape: str) -> None:
    """In its dialect, after which SDKs do not try again; no other candidate is asked either."""
    asked = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        asked.put("asked")
        live.ends.put(wire.wait_closed())

    live.script = script
    with ask(live, path) as client:
        assert asked.read() == "asked"  # what comes sooner than the kill is read
        name = live.kill("waiting")
        got = read_response(client)
    assert (got.status, got.error) == (503, "killed")
    assert got.values(b"x-should-retry") == [b"false"]
    assert ("type" in got.json()) is (shape == "anthropic")
    assert "operator" in got.json()["error"]["message"]
    assert live.ends.read() in ("fin", "reset")
    record = live.assert_killed(name, 503, "error")
    assert [one["outcome"] for one in record["attempts"]] == ["killed"]
    assert live.provider.accepted == 1


def test_the_sdk_does_not_try_again(live: Killing) -> None:
    """OpenAI's would send a request again after a 503 of another kind."""
    live.script = silent(live.ends)
    base = f"http://127.0.0.1:{live.daemon.port}/p/v1"
    failed = Notes()

    def call() -> None:
        with openai.OpenAI(base_url=base, api_key=KEY, max_retries=3) as sdk:
            try:
                sdk.chat.completions.create(model="m", messages=[])
            except openai.InternalServerError as error:
                failed.put(str(error.status_code))

    caller = threading.Thread(target=call)
    caller.start()
    name = live.kill("waiting")
    caller.join(20)
    assert failed.read() == "503"
    assert live.provider.accepted == 1
    live.assert_killed(name, 503, "error")


def test_a_request_whose_body_comes_still(live: Killing) -> None:
    """It streams upwards: the provider is dropped, and the client told."""
    live.script = lambda wire: live.ends.put(wire.wait_closed())
    with live.connect() as client:
        head = "POST /p/v1/files HTTP/1.1\r\nHost: a\r\nContent-Type: application/octet-stream\r\n"
        client.send(f"{head}Content-Length: 1000\r\n\r\n0123456789".encode())
        name = live.kill("uploading")
        got = read_response(client)
    assert (got.status, got.error) == (503, "killed")
    assert got.values(b"x-should-retry") == [b"false"]
    assert live.ends.read() in ("fin", "reset")
    live.assert_killed(name, 503, "error")


def test_a_request_in_a_queue(live: Killing) -> None:
    """The one that holds the place goes on."""
    live.script = silent(live.ends, SSE, chunked(EVENT))
    with live.begin("/one" + CHAT, BODY) as first, ask(live, "/one" + CHAT) as second:
        assert first.read_chunk() == EVENT
        rows = until(lambda: len(live.rows()) == 2 and live.rows(), "both are served")
        (queued,) = [row for row in rows if row["phase"] == "queued"]
        assert live.change(queued["id"]) == 200
        got = read_response(second)
        assert (got.status, got.error) == (503, "killed")
        assert got.values(b"x-should-retry") == [b"false"]
        assert live.only("streaming")["id"] != queued["id"]
    assert trace_of(live.daemon, id=queued["id"])["attempts"] == []


@pytest.mark.parametrize("path", ["/p", "/told"])
def test_a_stream_is_broken_off(live: Killing, path: str) -> None:
    """It never looks whole; an error event goes before where the route has it."""
    live.script = silent(live.ends, SSE, chunked(EVENT))
    with live.begin(path + CHAT, BODY) as client:
        assert client.read_chunk() == EVENT
        name = live.kill("streaming")
        if path == "/told":
            event = json.loads(client.read_chunk().removeprefix(b"data: "))
            assert event["error"]["code"] == "killed"
        rest = client.buffer
        client.buffer = b""
        assert client.wait_closed() in ("fin", "reset")
        assert not rest.endswith(b"0\r\n\r\n")
    assert live.ends.read() in ("fin", "reset")
    live.assert_killed(name, 200, "error_event" if path == "/told" else "broken_off")


def test_a_stream_whose_client_does_not_read(live: Killing) -> None:
    """What it has not taken is dropped."""
    cut = live.flood()
    with live.begin("/p" + CHAT, BODY, receive_buffer=4096):
        name = live.kill("paused")
        assert cut.read() == "cut"
        live.assert_killed(name, 200, "broken_off")


def test_a_response_that_its_client_does_not_take(live: Killing) -> None:
    """The provider has sent all of it, and the proxy holds the rest."""
    size = 8_000_000

    def script(wire: Wire) -> None:
        wire.read_request()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        wire.send(head % size, b" " * size)

    live.script = script
    with live.begin("/p" + CHAT, b'{"model":"m"}', receive_buffer=4096):
        row = until(lambda: live.rows() and live.rows()[0], "it is served")
        assert live.change(row["id"]) == 200
        live.assert_killed(row["id"], 200, "broken_off")


def test_a_websocket_is_closed(live: Killing) -> None:
    """On both sides."""

    def script(wire: Wire) -> None:
        wire.send(switch(wire.read_request()))
        live.ends.put(wire.wait_closed())

    live.script = script
    with live.connect() as client:
        client.send(handshake("/socket/v1/realtime?model=m"))
        read_switch(client)
        name = live.kill("streaming")
        assert client.wait_closed() in ("fin", "reset")
    assert live.ends.read() in ("fin", "reset")
    live.assert_killed(name, 101, "broken_off")


def test_a_paced_stream_is_broken_off(live: Killing) -> None:
    """As any other."""
    with live.connect() as client:
        client.send(request("GET", "/-/pace?n=100&interval_ms=1000"))
        client.read_head()
        name = live.kill("streaming")
        assert client.wait_closed() in ("fin", "reset")
    live.assert_killed(name, 200, "broken_off")


def test_a_response_that_is_read_on_without_a_client(live: Killing) -> None:
    """Its client has left before: that stays why it ended, and the provider is dropped."""
    live.script = silent(live.ends, SSE, chunked(EVENT))
    client = begin(connect(live.daemon.port), "/drain" + CHAT, BODY)
    assert client.read_chunk() == EVENT
    client.sock.close()
    row = until(lambda: [row for row in live.rows() if row["detached"]], "it is read on")[0]
    assert live.change(row["id"]) == 200
    assert live.ends.read() in ("fin", "reset")
    until(lambda: not live.rows(), "nothing runs")
    assert trace_of(live.daemon, id=row["id"])["end_reason"] == "client_gone"
    capsule = json.loads(live.daemon.admin(f"/streams/ended/{row['id']}"))
    assert capsule["to_client"] == "left"
    assert_settles(live.daemon)


@pytest.mark.parametrize("token", ["", "wrong", TOKEN.lower()])
def test_without_the_token_nothing_ends(live: Killing, token: str) -> None:
    """And the log does not say otherwise."""
    live.script = silent(live.ends, SSE, chunked(EVENT))
    with live.begin("/p" + CHAT, BODY) as client:
        assert client.read_chunk() == EVENT
        name = live.only("streaming")["id"]
        assert live.change(name, token) == 401
        assert live.only("streaming")["id"] == name
    assert trace_of(live.daemon, id=name)["end_reason"] == "client_gone"


KEY = "key-of-the-team"
TUNNELS = """
[tunnel]
allow = ["127.0.0.1:*"]
allow_private = true
"""


@pytest.mark.parametrize("kind", ["tunnel", "forward"])
def test_what_goes_to_other_hosts_is_closed(tmp_path: Path, kind: str) -> None:
    """A tunnel, and a plain request for another host."""
    ends = Notes()

    def script(wire: Wire) -> None:
        if kind == "forward":
            wire.read_head()
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: one\n\n")
        ends.put(wire.wait_closed())

    text = provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
    text += client_config("team", KEY) + TUNNELS
    text += write_credential(tmp_path, "admin-token", TOKEN)
    live, admin = Killing(), 'token = "admin-token"'
    daemon = Daemon(tmp_path, text, proxy="", admin=admin)
    with live.provider, Provider(script) as host, daemon as live.daemon:
        with connect(live.daemon.port) as client:
            key = f"Proxy-Authorization: Bearer {KEY}"
            where = f"127.0.0.1:{host.port}"
            if kind == "tunnel":
                client.send(connect_head("127.0.0.1", port=host.port, key=KEY))
            else:
                client.send(request("GET", f"http://{where}/x", key))
            client.read_head()
            (row,) = until(live.rows, "it is served")
            assert live.change(row["id"]) == 200
            assert client.wait_closed() in ("fin", "reset")
        assert ends.read() in ("fin", "reset")
        live.assert_killed(row["id"], 200, "broken_off")
