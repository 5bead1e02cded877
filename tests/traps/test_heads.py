"""Heads of responses that are too long, malformed or endless."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import repeat

import pytest
from pytest_twisted import ensureDeferred

from tests.support.sockets import Provider, Wire, connect, request
from tests.traps.asking import ask
from tests.traps.calls import OK, Responding, outcome
from tests.traps.parts import Ports, Upstream
from tests.traps.waits import thread

PLAIN = b"HTTP/1.1 200 OK\r\n"
END = b"Content-Length: 2\r\n\r\nok"
PIECE = 1 << 16
PIECES = 320
"""Twenty megabytes in all."""


class Flood:
    """A provider's script that sends pieces until it is closed on, and then the end.

    Attributes:
        sent: bytes that the kernel took.
    """

    def __init__(self, start: bytes, pieces: Iterator[bytes], end: bytes) -> None:
        self._start, self._pieces, self._end = start, pieces, end
        self.sent = 0

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        wire.read_request()
        wire.send(self._start)
        for piece in self._pieces:
            wire.send(piece)
            self.sent += len(piece)
        wire.send(self._end)
        wire.wait_closed()


FIELD = b"x-filler: " + b"y" * 1012 + b"\r\n"


@pytest.mark.trap("U13")
@pytest.mark.parametrize(
    ("start", "piece", "end"),
    [
        (PLAIN, FIELD * (PIECE // len(FIELD)), END),
        (PLAIN + b"x: ", b"y" * PIECE, b"\r\n" + END),
        (b"HTTP/1.1 200 ", b"y" * PIECE, b"\r\n" + END),
        (b"", b"y" * PIECE, b"\r\n" + END),
        (PLAIN, b"y" * PIECE, b": \r\n" + END),
    ],
    ids=["fields", "one field", "the phrase", "no HTTP at all", "a name"],
)
@ensureDeferred
async def test_a_head_without_end_is_refused(
    upstream: Upstream, patience: float, start: bytes, piece: bytes, end: bytes
) -> None:
    """Of twenty megabytes little is taken and less is held, and the request fails."""
    flood = Flood(start, repeat(piece, PIECES), end)
    with Provider(flood, send_buffer=PIECE) as provider:
        sender = upstream(provider.url)
        tracemalloc.start()
        try:
            result = await outcome(sender.send("GET", "/x", []), patience + 10)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert result.refused
    assert flood.sent < PIECE * PIECES / 2
    assert peak < 2 << 20


BAD = {
    "2_00": b"HTTP/1.1 2_00 OK\r\n" + END,
    "-5": b"HTTP/1.1 -5 OK\r\n" + END,
    "099": b"HTTP/1.1 099 OK\r\n" + END,
    "600": b"HTTP/1.1 600 OK\r\n" + END,
    "20": b"HTTP/1.1 20 OK\r\n" + END,
    "HTTP/2": b"HTTP/2 200 OK\r\n" + END,
    "CR in the phrase": b"HTTP/1.1 200 O\rK: secret\r\n" + END,
    "NUL in the phrase": b"HTTP/1.1 200 O\0K\r\n" + END,
    "NUL in a value": PLAIN + b"x-value: sec\0ret\r\n" + END,
    "CR in a value": PLAIN + b"x-value: sec\rret\r\n" + END,
    "DEL in a value": PLAIN + b"x-value: sec\x7fret\r\n" + END,
    "bare LF": PLAIN + b"x-value: a\nset-cookie: secret\r\n" + END,
    "folded": PLAIN + b"x-value: a\r\n secret\r\n" + END,
    "space before the colon": PLAIN + b"x-value : secret\r\n" + END,
    "no name": PLAIN + b": secret\r\n" + END,
    "129 fields": PLAIN + b"x-value: secret\r\n" * 128 + END,
    "a line of 64 KiB": PLAIN + b"x-value: " + b"s" * 65536 + b"\r\n" + END,
}


@pytest.mark.trap("U13")
@pytest.mark.parametrize("response", BAD.values(), ids=BAD.keys())
@ensureDeferred
async def test_a_malformed_head_is_refused(
    upstream: Upstream, patience: float, response: bytes
) -> None:
    """It is a bad upstream, whatever could be read into it, and not used again."""
    with Provider(Responding(response)) as provider:
        result = await outcome(upstream(provider.url).send("GET", "/x", []), patience)
    assert result.refused


@pytest.mark.trap("U13")
@pytest.mark.parametrize("name", ["CR in the phrase", "NUL in a value", "CR in a value", "bare LF"])
@ensureDeferred
async def test_nothing_of_a_malformed_head_reaches_the_client(proxy: Ports, name: str) -> None:
    """A 502 of our own, and neither the phrase nor a value in it."""

    def everything(port: int) -> bytes:
        with connect(port) as wire:
            wire.send(request("GET", "/p/x", "Connection: close"))
            wire.wait_closed()
            return wire.buffer

    with Provider(Responding(BAD[name])) as provider:
        got = await thread(everything, proxy(provider.url))
    assert got.startswith(b"HTTP/1.1 502 ")
    assert b"sec" not in got
    assert b"\0" not in got


@pytest.mark.trap("U13")
@ensureDeferred
async def test_the_phrase_of_a_provider_is_not_forwarded(proxy: Ports) -> None:
    """The status crosses, and the words behind it do not."""

    def first_line(port: int) -> bytes:
        with connect(port) as wire:
            wire.send(request("GET", "/p/x"))
            return wire.read_head()[0]

    with Provider(Responding(b"HTTP/1.1 299 Sesame\r\n" + END)) as provider:
        first = await thread(first_line, proxy(provider.url))
    assert first.startswith(b"HTTP/1.1 299")
    assert b"Sesame" not in first


INTERIM = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"


@pytest.mark.trap("U14")
@pytest.mark.parametrize("apart", [True, False], ids=["one by one", "together"])
@ensureDeferred
async def test_interim_responses_without_end_are_refused(
    upstream: Upstream, patience: float, apart: bool
) -> None:
    """A provider that sends 1xx responses for ever is given up, and its connection closed."""
    pieces = repeat(INTERIM, 2000) if apart else repeat(INTERIM * 1000, 20)
    flood = Flood(b"", pieces, OK)
    with Provider(flood) as provider:
        result = await outcome(upstream(provider.url).send("GET", "/x", []), patience + 10)
    assert result.refused


@pytest.mark.trap("U14")
@ensureDeferred
async def test_a_few_interim_responses_are_skipped(upstream: Upstream, patience: float) -> None:
    """As many as honest servers send are no response, and no harm."""
    flood = Flood(b"HTTP/1.1 100 Continue\r\n\r\n", repeat(INTERIM, 3), OK)
    with Provider(flood) as provider:
        sender = upstream(provider.url)
        result = await outcome(sender.send("GET", "/x", []), patience)
        await sender.close()
    assert (result.code, result.data, result.whole) == (200, b"ok", True)


@pytest.mark.trap("U14")
@ensureDeferred
async def test_a_protocol_switch_without_a_request_for_it_is_refused(
    proxy: Ports, patience: float
) -> None:
    """The client gets a 502 of ours and no 101, whatever comes behind that."""
    switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
    with Provider(Responding(switch + OK)) as provider:
        got = await thread(ask, proxy(provider.url), patience, request("GET", "/p/x"))
    assert got.status == 502
