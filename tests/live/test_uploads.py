"""Bodies that are not JSON stream to the provider, unread and unheld, at its pace (design 4)."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

import pytest

from tests.support.daemon import route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    client_config,
    live_fixture,
    read_response,
    response,
    trace_of,
)
from tests.support.scripts import LAST, OK, SSE, Notes, Turn
from tests.support.sockets import Wire, chunked, request

OCTETS = "Content-Type: application/octet-stream"
live = live_fixture(
    ONE_ROUTE
    + route_table("/models", "p", 'models = ["-"]')
    + route_table("/small", "p", 'request_body = "2MiB"')
    + '[limits]\nrequest_memory = "64KiB"\n'  # a body that is held would show
    + client_config("team", "team-key"),
    both_links=True,
)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_each_piece_reaches_the_provider_before_the_next_is_sent(
    live: LiveProxy, framing: str
) -> None:
    """The request begins before its body is whole, and nothing of that is held."""
    pieces = [b"one-", b"two-", b"three"]
    total = sum(map(len, pieces))
    arrived = Notes()

    def script(wire: Wire) -> None:
        _, fields = wire.read_head()
        names = dict(fields)
        arrived.put(names.get(b"content-length") or names.get(b"transfer-encoding"))
        for piece in pieces:
            if framing == "length":
                arrived.put(wire.read(len(piece)))
            else:
                arrived.put(wire.read_chunk())
        if framing == "chunked":
            assert wire.read_chunk() == b""
        wire.send(OK)

    live.script = script
    how = f"Content-Length: {total}" if framing == "length" else "Transfer-Encoding: chunked"
    with live.connect() as client:
        client.send(request("POST", "/p/x", OCTETS, how))
        assert arrived.read() == (b"%d" % total if framing == "length" else b"chunked")
        for piece in pieces:
            client.send(piece if framing == "length" else chunked(piece))
            assert arrived.read() == piece
            assert live.gauge("request_bytes_held") == 0
        client.send(b"" if framing == "length" else LAST)
        got = read_response(client)
        assert got.body == b"ok"
    assert live.trace(got)["bytes_in"] == total


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_large_upload_is_exact(live: LiveProxy, framing: str) -> None:
    """20 MB of any bytes cross a memory of 64 KiB."""
    body = os.urandom(20_000_000)
    if framing == "length":
        sent = request("POST", "/p/x", OCTETS, body=body)
    else:
        pieces = [body[start : start + 70_001] for start in range(0, len(body), 70_001)]
        head = request("POST", "/p/x", OCTETS, "Transfer-Encoding: chunked")
        sent = head + chunked(*pieces) + LAST
    received, got = live.ask(sent)
    assert received.body == body
    assert got.body == b"ok"


def test_a_provider_that_reads_nothing_stops_the_upload(live: LiveProxy) -> None:
    """Backpressure: of 30 MB only what kernels hold is taken, until the provider reads."""
    size, taken = 30_000_000, 0
    read_on = Turn()

    def script(wire: Wire) -> None:
        wire.read_head()
        read_on.take()
        for _ in range(30):
            wire.read(size // 30)
        wire.send(OK)

    live.script = script
    with live.connect() as client:
        client.send(request("POST", "/p/x", OCTETS, f"Content-Length: {size}"))
        client.sock.settimeout(1)
        piece = bytes(1_000_000)
        with suppress(TimeoutError):
            while taken < size:
                taken += client.sock.send(piece)
        assert 0 < taken < size
        read_on.give()
        client.sock.settimeout(20)
        while taken < size:
            taken += client.sock.send(piece[: size - taken])
        assert read_response(client).status == 200


@pytest.mark.parametrize("what", ["a response", "a reset"])
def test_a_provider_that_ends_the_upload_in_the_middle_is_reported(
    live: LiveProxy, what: str
) -> None:
    """The client reads the provider's response, or a 502, although it sends on."""

    def script(wire: Wire) -> None:
        wire.read_until(b"\r\n\r\n")
        if what == "a reset":
            wire.reset()
        else:
            wire.send(response(413, body=b"too much"))
            wire.wait_closed()

    live.script = script
    with live.connect() as client:
        client.send(request("POST", "/p/x", OCTETS, "Content-Length: 5000000"))
        sending = threading.Thread(target=_send_all, args=(client, bytes(5_000_000)))
        sending.start()
        got = read_response(client)
        sending.join(20)
    if what == "a reset":
        assert (got.status, got.error) == (502, "upstream_broken")
    else:
        assert (got.status, got.body) == (413, b"too much")
        assert got.values(b"connection") == [b"close"]
        assert live.trace(got)["end_reason"] == "upstream_refused"
    assert_settles(live.daemon)


def test_a_100_is_sent_once_the_provider_is_there(live: LiveProxy) -> None:
    """An unknown key gets its 401 in place of the 100, a known one the 100."""
    lines = (OCTETS, "Expect: 100-continue", "Content-Length: 3")
    with live.connect() as client:
        client.send(request("POST", "/p/x", *lines, "x-api-key: wrong"))
        assert read_response(client).status == 401
    live.reply(OK)
    with live.connect() as client:
        client.send(request("POST", "/p/x", *lines, "x-api-key: team-key"))
        assert client.read_head()[0].startswith(b"HTTP/1.1 100")
        client.send(b"abc")
        assert read_response(client).body == b"ok"


def test_a_chunked_upload_over_the_limit_is_cut(live: LiveProxy) -> None:
    """The client gets a 413, and the provider's part does not look whole."""
    seen = Notes()

    def script(wire: Wire) -> None:
        wire.read_until(b"\r\n\r\n")
        wire.wait_closed()
        seen.put(wire.buffer.endswith(LAST))

    live.script = script
    with live.connect() as client:
        client.send(request("POST", "/small/x", OCTETS, "Transfer-Encoding: chunked"))
        sending = threading.Thread(
            target=_send_all, args=(client, *[chunked(bytes(1_000_000))] * 10, LAST)
        )
        sending.start()
        got = read_response(client)
        sending.join(20)
    assert got.status == 413
    assert seen.read() is False
    assert_settles(live.daemon)


def _send_all(client: Wire, *pieces: bytes) -> None:
    with suppress(OSError):  # the proxy may close before it has read everything
        for piece in pieces:
            client.send(piece)


def test_an_upload_over_the_limit_ends_a_flowing_response_for_that_reason(live: LiveProxy) -> None:
    """The response breaks off; the record says why, and does not blame the provider."""
    flows = Turn()

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(SSE, chunked(b"data: 1\n\n"))
        flows.give()
        while wire.receive():
            pass

    live.script = script
    with live.connect() as client:
        client.send(request("POST", "/small/x", OCTETS, "Transfer-Encoding: chunked"))
        client.send(chunked(b"x"))
        flows.take()
        assert client.read_head()
        assert client.read_chunk() == b"data: 1\n\n"
        sending = threading.Thread(
            target=_send_all, args=(client, *[chunked(bytes(1_000_000))] * 10, LAST)
        )
        sending.start()
        assert client.sock.recv(1000) == b""  # no last chunk
        sending.join(20)
    record = trace_of(live.daemon, status=200, error="body_too_large")
    assert (record["end_reason"], record["bytes_out"]) == ("rejected", 9)
    assert record["is_complete"] is False
    assert_settles(live.daemon)
