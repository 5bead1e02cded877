"""WebSockets through the daemon on raw sockets: the handshake, the bytes, and every end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, route_table
from tests.support.live_proxy import (
    Link,
    LiveProxy,
    assert_settles,
    live_fixture,
    response,
    trace_of,
    until,
)
from tests.support.parents import PlayedParent
from tests.support.scripts import KEPT, OK, Notes, Turn, keep_replying
from tests.support.sockets import WAIT, Received, Script, Wire, connect, request
from tests.support.websocket import (
    CLOSE,
    PING,
    ask,
    close,
    frame,
    handshake,
    read_frame,
    read_switch,
    switch,
)

MASK = b"\x01\x02\x03\x04"
CONNECTIONS = "llmproxy_upstream_connections"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\n"
UPGRADED = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
PROOF = b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"

CONFIG = """
[providers.p]
url = "URL"
dialect = "openai"
KEYS
[providers.q]
url = "URL/second"
dialect = "openai"
KEYS
""" + "".join(
    (
        route_table("/p", "p", "websocket = true"),
        route_table("/http", "p"),
        route_table("/two", 'p", "q', "websocket = true"),
        route_table("/reset", 'p", "q', 'websocket = true\nretry_on = ["reset"]'),
        route_table("/idle", "p", 'websocket = true\ntimeouts = { idle = "400ms" }'),
        route_table("/total", "p", 'websocket = true\ntimeouts = { total = "400ms" }'),
        route_table("/late", "p", 'websocket = true\ntimeouts = { first_byte = "200ms" }'),
        route_table("/stall", "p", 'websocket = true\ntimeouts = { client_stall = "500ms" }'),
    )
)

live = live_fixture(CONFIG, both_links=True)


def switching(then: Callable[[Wire], object], seen: Notes | None = None) -> Script:
    """Return a provider's script: it switches, and goes on as ``then`` says."""

    def script(wire: Wire) -> None:
        asked = wire.read_request()
        if seen is not None:
            seen.put(asked)
        wire.send(switch(asked))
        then(wire)

    return script


def echo(wire: Wire) -> None:
    """Send back what comes, byte by byte as it is."""
    while data := wire.buffer or wire.receive():
        wire.send(data)
        wire.buffer = b""


def fill(wire: Wire) -> None:
    """Send frames until nobody takes more."""
    wire.sock.settimeout(0.5)
    with suppress(TimeoutError):
        while True:
            wire.send(frame(b"x" * 60_000, 2, mask=MASK))


def shaken(live: LiveProxy, target: str = "/p", *fields: str) -> Wire:
    """Return a client's connection behind its 101."""
    wire = live.connect()
    wire.send(handshake(target, *fields))
    read_switch(wire)
    return wire


# --- the handshake --------------------------------------------------------------------------------


def test_a_handshake_crosses_and_comes_back(live: LiveProxy) -> None:
    """Key, version and extensions cross as they came, Connection and Upgrade on purpose."""
    seen = Notes()
    live.script = switching(echo, seen)
    with live.connect() as client:
        got = ask(client, handshake("/p/v1/x?y=1", "Sec-WebSocket-Extensions: permessage-deflate"))
        asked: Received = seen.read()
        assert (asked.method, asked.target) == (b"GET", b"/v1/x?y=1")
        for name, value in (
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
            (b"sec-websocket-version", b"13"),
            (b"sec-websocket-extensions", b"permessage-deflate"),
        ):
            assert asked.values(name) == [value]
        assert got.values(b"sec-websocket-accept") == [b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="]
        assert (got.values(b"upgrade"), got.values(b"connection")) == ([b"websocket"], [b"Upgrade"])
        assert got.values(b"x-llmproxy-request-id")
        assert not got.values(b"content-length") + got.values(b"transfer-encoding")
        client.send(frame(b"hello", mask=MASK))
        assert client.read(11) == frame(b"hello", mask=MASK)
        client.send(close(mask=MASK))
        assert read_frame(client).opcode == CLOSE


def test_a_route_without_the_key_answers_426(live: LiveProxy) -> None:
    """With what RFC 9110 asks, a JSON body and a close; the log says what the operator can do."""
    with live.connect() as client:
        client.send(handshake("/http"))
        first, fields = client.read_head()
        names = dict(fields)
        assert first.startswith(b"HTTP/1.1 426 ")
        assert names[b"upgrade"] == b"HTTP/1.1"
        assert [value for name, value in fields if name == b"connection"] == [b"upgrade", b"close"]
        assert names[b"content-type"] == b"application/json"
        assert b'"code":"websocket"' in client.read_body(fields)
        assert client.wait_closed() == "fin"
    sent = names[b"x-llmproxy-request-id"].decode()
    live.daemon.wait_log("rejected", id=sent, detail="no route here has `websocket = true`")


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        (handshake(version="8"), 426, "websocket_version"),
        (handshake(version="13, 8"), 426, "websocket_version"),
        (handshake(key="dGhl"), 400, "websocket"),
        (handshake(key="dGhlIHNhbXBsZSBub25jZR=="), 400, "websocket"),
        (handshake("/p", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="), 400, "websocket"),
        (handshake().replace(b"GET", b"PUT"), 400, "websocket"),
        (handshake("/p", "Content-Length: 1") + b"x", 400, "websocket"),
    ],
)
def test_a_faulty_handshake_is_refused(
    live: LiveProxy, sent: bytes, status: int, reason: str
) -> None:
    """As RFC 6455, section 4.2.1, has it; another version is told ours."""
    got = live.reject(sent)
    assert (got.status, got.error) == (status, reason)
    wanted = [b"13"] if status == 426 else []
    assert got.values(b"sec-websocket-version") == wanted


def test_a_page_of_another_site_needs_a_key(live: LiveProxy) -> None:
    """A browser lets any page open a WebSocket: nobody is anonymous there, as on any request."""
    got = live.reject(handshake("/p", "Origin: https://evil.example"))
    assert (got.status, got.error) == (403, "origin")
    live.script = switching(echo)
    for fields in (("Origin: http://proxy",), ("Origin: null", "Authorization: Bearer x")):
        with live.connect() as client:
            got = ask(client, handshake("/p", *fields))
        assert got.status == (101 if len(fields) == 1 else 401)


def test_an_upgrade_in_http_1_0_is_none(live: LiveProxy) -> None:
    """RFC 9110, section 7.8: the field is ignored, and does not cross."""
    asked, got = live.ask(handshake().replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (got.status, asked.values(b"upgrade")) == (200, [])


@pytest.mark.parametrize("status", [200, 302, 401, 404, 426, 429, 503])
def test_another_answer_is_handed_on(live: LiveProxy, status: int) -> None:
    """Status, fields and body of a provider that does not switch reach the client."""
    raw = response(status, "X-Mine: 1", "Upgrade: websocket", body=b"no")
    _asked, got = live.ask(handshake(), raw)
    assert (got.status, got.body, got.values(b"x-mine")) == (status, b"no", [b"1"])
    end = "complete" if status < 400 else "upstream_refused"
    assert live.trace(got)["end_reason"] == end


@pytest.mark.parametrize(
    "lines",
    [
        UPGRADED + b"Sec-WebSocket-Accept: xxxx\r\n",
        UPGRADED,
        UPGRADED.replace(b"websocket", b"h2c") + PROOF,
        b"Upgrade: websocket\r\n" + PROOF,
    ],
)
def test_a_wrong_101_is_no_response(live: LiveProxy, lines: bytes) -> None:
    """It is a 502, and the provider's connection is closed."""
    ended = live.hold(SWITCH + lines + b"\r\n")
    got = live.get(handshake())
    assert (got.status, got.error) == (502, "upstream_protocol")
    assert live.trace(got)["end_reason"] == "upstream_protocol"
    ended.read()
    assert_settles(live.daemon)


def test_a_101_that_nobody_asked_for_is_no_response(live: LiveProxy) -> None:
    """A plain request on the same route does not open the door."""
    live.reply(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
    assert live.get(request("GET", "/p/x")).error == "upstream_protocol"


@pytest.mark.parametrize(
    ("target", "first"),
    [
        ("/two", response(503, body=b"full")),
        ("/reset", b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"),
    ],
)
def test_the_next_candidate_is_asked_before_the_101(
    live: LiveProxy, target: str, first: bytes
) -> None:
    """After a refusal, and where the route says so after a response that is none."""

    def script(wire: Wire) -> None:
        asked = wire.read_request()
        if asked.target.startswith(b"/second"):
            wire.send(switch(asked))
            echo(wire)
        else:
            wire.send(first)

    live.script = script
    with shaken(live, target) as client:
        client.send(frame(b"on", mask=MASK))
        assert read_frame(client).payload == b"on"
    record = trace_of(live.daemon, path=target)
    assert [one["provider"] for one in record["attempts"]] == ["p", "q"]
    assert record["status"] == 101


def test_a_101_that_does_not_come_is_a_timeout(live: LiveProxy) -> None:
    """``first_byte`` counts for it."""
    ended = live.hold()
    assert live.get(handshake("/late")).error == "upstream_timeout"
    ended.read()


def test_a_connection_is_never_used_again(live: LiveProxy) -> None:
    """Also not where the provider refused the handshake and would keep it."""
    before = live.provider.accepted
    live.script = keep_replying
    for _ in range(2):
        live.get(handshake("/p", "Connection: close"))
    assert live.provider.accepted == before + 2
    assert_settles(live.daemon)
    metrics = live.daemon.metrics().items()
    assert not [name for name, value in metrics if value and name.startswith(CONNECTIONS)]


def test_tls_on_a_plain_port_is_named_in_the_log(live: LiveProxy) -> None:
    """At once, and once a minute for an address; the client gets no silence."""
    for _ in range(3):
        with live.connect() as client:
            client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"r" * 500)
            first, fields = client.read_head()
            assert first.startswith(b"HTTP/1.1 400 ")
            assert b"TLS" in client.read_body(fields)
            client.wait_closed()
    live.daemon.wait_log("speaks TLS")
    lines = [one for one in live.daemon.log if "speaks TLS" in one["message"]]
    assert len(lines) == 1
    assert lines[0]["level"] == "warn"
    assert "listen_tls" in lines[0]["message"]
    assert "HTTPS_PROXY" in lines[0]["message"]  # whose name leads newcomers to https://


def test_a_handshake_takes_no_connection_of_the_pool(live: LiveProxy) -> None:
    """One that was used before is not its own, and is left for others."""

    def script(wire: Wire) -> None:
        asked = wire.read_request()
        if asked.values(b"upgrade"):
            wire.send(switch(asked))
            echo(wire)
            return
        wire.send(KEPT)
        wire.read_request()
        wire.send(OK)  # which ends it, so that nobody waits for a third one

    live.script = script
    assert live.get(request("GET", "/p/x")).status == 200
    before = live.provider.accepted
    with shaken(live) as client:
        client.send(frame(b"on", mask=MASK))
        assert read_frame(client).payload == b"on"
    assert live.get(request("GET", "/p/x")).status == 200
    assert live.provider.accepted == before + 1


def test_a_client_that_leaves_before_the_101_ends_the_attempt(live: LiveProxy) -> None:
    """As with any request."""
    asked, left = Notes(), Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        asked.put(None)
        wire.wait_closed()
        left.put(None)

    live.script = script
    client = live.connect()
    client.send(handshake("/p/too-soon"))
    asked.read()
    client.reset()
    left.read()
    live.assert_ended("/p/too-soon", "client_gone", None)


def test_a_parent_proxy_leads_to_the_provider(tmp_path: Path, link: Link) -> None:
    """By CONNECT, and with TLS behind it where the provider has TLS."""
    with (
        link.provider(switching(echo)) as provider,
        PlayedParent(b"HTTP/1.1 200 OK\r\n\r\n") as parent,
        Daemon(
            tmp_path,
            link.config(
                provider, keys=f'parent_proxy = "{parent.url}"\n', route="websocket = true"
            ),
        ) as daemon,
        connect(daemon.port) as client,
    ):
        client.send(handshake("/p"))
        read_switch(client)
        client.send(frame(b"x" * 200_000, mask=MASK))
        assert read_frame(client).payload == b"x" * 200_000
        client.send(close(mask=MASK))
        assert read_frame(client).opcode == CLOSE
        assert parent.accepted == 1


# --- the bytes ------------------------------------------------------------------------------------


def test_the_101_and_the_first_frames_come_together(live: LiveProxy) -> None:
    """In one write where they came in one."""

    def script(wire: Wire) -> None:
        asked = wire.read_request()
        wire.send(switch(asked, behind=frame(b"first")))
        wire.wait_closed()

    live.script = script
    with live.connect() as client:
        client.send(handshake())
        assert client.receive().endswith(frame(b"first")), "the frame came by itself"


def test_frames_that_came_with_the_handshake_are_not_lost(live: LiveProxy) -> None:
    """A client may not send them so early; what it sent comes first all the same."""
    live.script = switching(echo)
    with live.connect() as client:
        client.send(handshake() + frame(b"early", mask=MASK))
        read_switch(client)
        assert read_frame(client).payload == b"early"


def test_all_that_a_frame_may_be_crosses_as_it_is(live: LiveProxy) -> None:
    """Fragments, control frames between them, reserved bits, unknown opcodes, empty frames."""
    live.script = switching(echo)
    pieces = [
        frame(b"one", fin=False, mask=MASK),
        frame(b"ping", PING, mask=MASK),
        frame(b"two", 0, mask=MASK),
        frame(b"", 2, mask=MASK),
        frame(b"x" * 70_000, 2, rsv=4, mask=b"\0\0\0\0"),
        frame(b"odd", 5, rsv=7),
        close(4321, b"words", mask=MASK),
    ]
    with shaken(live) as client:
        for piece in pieces:
            client.send(piece)
            assert client.read(len(piece)) == piece


def test_a_close_frame_of_either_side_ends_as_complete(live: LiveProxy) -> None:
    """The code and the words cross, and so does the other side's echo."""

    def closes(wire: Wire) -> None:
        wire.send(close(1000, b"done"))
        assert read_frame(wire).opcode == CLOSE
        wire.close_notify()

    live.script = switching(closes)
    with shaken(live, "/p/by-provider") as client:
        assert read_frame(client).payload == b"\x03\xe8done"
        client.send(close(mask=MASK))
        assert client.wait_closed() == "fin"
    live.assert_ended("/p/by-provider", "complete", 101)

    live.script = switching(echo)
    with shaken(live, "/p/by-client") as client:
        client.send(close(4999, mask=MASK))
        assert read_frame(client).opcode == CLOSE
    live.assert_ended("/p/by-client", "complete", 101)


def test_a_providers_code_of_failure_is_one(live: LiveProxy) -> None:
    """1011 says that the provider failed."""
    live.script = switching(lambda wire: wire.send(close(1011)))
    with shaken(live, "/p/failed") as client:
        assert read_frame(client).payload == b"\x03\xf3"
        client.wait_closed()
    live.assert_ended("/p/failed", "upstream_failed", 101)


def test_a_provider_may_end_with_its_101(live: LiveProxy) -> None:
    """Its close frame is seen, and reaches the client, although it has left already."""

    def script(wire: Wire) -> None:
        wire.send(switch(wire.read_request(), behind=frame(b"bye") + close(1011)))
        wire.close_notify()

    live.script = script
    with shaken(live, "/p/at-once") as client:
        assert read_frame(client).payload == b"bye"
        assert read_frame(client).payload == b"\x03\xf3"
        assert client.wait_closed() == "fin"
    live.assert_ended("/p/at-once", "upstream_failed", 101)


# --- ends without a close frame -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_client_that_leaves_ends_the_provider_s_side(live: LiveProxy, how: str) -> None:
    """What it sent before a FIN arrives; how soon is shown where a clock is turned."""
    left = Notes()

    def then(wire: Wire) -> None:
        assert read_frame(wire).payload == b"last"
        left.put(None)
        wire.wait_closed()
        left.put(None)

    live.script = switching(then)
    client = shaken(live, f"/p/left-{how}")
    client.send(frame(b"last", mask=MASK))
    left.read()
    client.close() if how == "fin" else client.reset()
    left.read()
    live.assert_ended(f"/p/left-{how}", "client_gone", 101)


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_provider_that_leaves_ends_the_client_s_side(live: LiveProxy, how: str) -> None:
    """What it sent before arrives."""
    turn = Turn()

    def then(wire: Wire) -> None:
        wire.send(frame(b"last"))
        turn.take()
        if how == "reset":
            wire.reset()

    live.script = switching(then)
    with shaken(live, f"/p/gone-{how}") as client:
        assert read_frame(client).payload == b"last"
        turn.give()
        assert client.wait_closed() == "fin"
    live.assert_ended(f"/p/gone-{how}", "upstream_broken", 101)


def test_a_client_that_leaves_while_the_provider_reads_nothing(live: LiveProxy) -> None:
    """Its leaving is seen although it is not read from."""
    filled, left = Notes(), Notes()

    def then(wire: Wire) -> None:
        filled.put(None)
        until(lambda: left.qsize(), "the client has left")
        wire.sock.settimeout(5)
        wire.wait_closed()
        left.put(None)

    live.script = switching(then)
    client = shaken(live, "/p/unread")
    filled.read()
    fill(client)
    client.reset()
    assert_settles(live.daemon, seconds=1)
    live.assert_ended("/p/unread", "client_gone", 101)
    left.put(None)


def test_silence_both_ways_is_idle(live: LiveProxy) -> None:
    """Both sides get a close frame with 1001; a ping in either direction is no silence."""
    heard = Notes()

    def then(wire: Wire) -> None:
        for _ in range(3):
            assert read_frame(wire).opcode == PING
        heard.put(read_frame(wire))
        wire.wait_closed()

    live.script = switching(then)
    with shaken(live, "/idle") as client:
        for _ in range(3):
            client.sock.settimeout(0.25)
            with pytest.raises(TimeoutError):
                client.receive()
            client.sock.settimeout(5)
            client.send(frame(b"", PING, mask=MASK))
        assert read_frame(client).payload == b"\x03\xe9"
        assert client.wait_closed() == "fin"
    got = heard.read()
    assert (got.payload, got.masked) == (b"\x03\xe9", True)
    live.assert_ended("/idle", "upstream_idle", 101)


def test_total_ends_one_that_is_never_silent(live: LiveProxy) -> None:
    """Both sides get a close frame with 1001, between two frames."""
    heard = Notes()

    def then(wire: Wire) -> None:
        wire.sock.settimeout(0.05)
        while True:
            wire.send(frame(b"x" * 1000))
            try:
                got = read_frame(wire)
            except TimeoutError:
                continue
            heard.put(got)
            return

    live.script = switching(then)
    with shaken(live, "/total") as client:
        while (got := read_frame(client)).opcode != CLOSE:
            assert got.payload == b"x" * 1000
        assert got.payload == b"\x03\xe9"
    assert heard.read().payload == b"\x03\xe9"
    live.assert_ended("/total", "upstream_timeout", 101)


def test_a_frame_that_is_never_finished_does_not_keep_it(live: LiveProxy) -> None:
    """A side that stands inside a frame gets no close frame of ours."""

    def then(wire: Wire) -> None:
        wire.send(frame(b"whole") + frame(b"half" * 10)[:20])
        wire.wait_closed()

    live.script = switching(then)
    with shaken(live, "/total/half") as client:
        assert read_frame(client).payload == b"whole"
        assert client.wait_closed() == "fin"
        assert client.buffer == frame(b"half" * 10)[:20]
    live.assert_ended("/total/half", "upstream_timeout", 101)


def test_a_client_that_takes_nothing_is_dropped(live: LiveProxy) -> None:
    """After ``client_stall``, and the provider's connection with it."""
    ended = Notes()

    def then(wire: Wire) -> None:
        try:
            while True:
                wire.send(frame(b"x" * 100_000, 2))
        except OSError:
            ended.put(None)

    live.script = switching(then)
    with live.connect(receive_buffer=4096) as client:
        client.send(handshake("/stall"))
        ended.read()
        live.assert_ended("/stall", "client_stalled", 101)


# --- a shutdown -----------------------------------------------------------------------------------


@pytest.mark.parametrize("signals", [1, 2])
def test_a_shutdown_closes_with_1001(tmp_path: Path, link: Link, signals: int) -> None:
    """At the drain's deadline, or at a second SIGTERM; both sides, and what runs is waited for."""
    heard, turn = Notes(), Turn()

    def then(wire: Wire) -> None:
        turn.take()
        wire.send(frame(b"still"))
        heard.put(read_frame(wire))
        wire.close_notify()

    timeout = "600ms" if signals == 1 else "60s"
    with (
        link.provider(switching(then)) as provider,
        Daemon(
            tmp_path,
            link.config(provider, route="websocket = true"),
            proxy=f'anonymous = true\ndrain_timeout = "{timeout}"',
        ) as daemon,
        connect(daemon.port) as client,
    ):
        client.send(handshake("/p"))
        read_switch(client)
        daemon.terminate()
        daemon.wait_log("draining")
        turn.give()
        assert read_frame(client).payload == b"still"
        for _ in range(signals - 1):
            daemon.terminate()
        assert read_frame(client).payload == b"\x03\xe9"
        assert client.wait_closed() == "fin"
        got = heard.read()
        assert (got.opcode, got.payload) == (CLOSE, b"\x03\xe9")
        assert daemon.process.wait(WAIT) == 0
        assert trace_of(daemon, path="/p")["end_reason"] == "drained"


def test_a_shutdown_waits_for_no_provider(tmp_path: Path, link: Link) -> None:
    """One that does not close its side is left behind; the record is written all the same."""
    over = Turn()

    def then(wire: Wire) -> None:
        read_frame(wire)
        over.take()

    with (
        link.provider(switching(then)) as provider,
        Daemon(tmp_path, link.config(provider, route="websocket = true")) as daemon,
    ):
        with connect(daemon.port) as client:
            client.send(handshake("/p"))
            read_switch(client)
            daemon.terminate()
            daemon.wait_log("draining")
            daemon.terminate()
            assert read_frame(client).payload == b"\x03\xe9"
        assert daemon.process.wait(WAIT) == 0
        over.give()
        assert trace_of(daemon, path="/p")["end_reason"] == "drained"
