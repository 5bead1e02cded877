"""What must hold for any bytes at all, as functions for a fuzzer to call.

The first two bytes of an input say how it is read, the others are what comes in.  No exception may
leave a reader but by its documented way; what it keeps is bounded; how the input is split and what
follows a message change nothing; what is read, h11 and llhttp read alike.
"""

from __future__ import annotations

from llmproxy.http1.framing import ChunkedReader
from llmproxy.http1.grammar import MAX_LINE
from llmproxy.server.connection import ClientConnection
from llmproxy.upstream.http1 import Connection
from tests.differential.judges import (
    h11_request,
    h11_response,
    llhttp_request,
    llhttp_response,
    our_request,
    our_response,
)
from tests.differential.strictness import THEIR_OWN
from tests.differential.verdict import FRAMING, Verdict, framing_error

MAX_HEAD = 512
"""Most bytes of a head here, so that a small input reaches the bound."""

_CRLFCR = 3
"""Bytes behind a head of the most bytes that are not yet its end."""

TAIL = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"


class Broken(AssertionError):
    """Something that must hold does not."""


def must(holds: object, what: str) -> None:
    """Raise unless it holds; ``assert`` could be switched off."""
    if not holds:
        raise Broken(what)


def split_places(control: int, size: int) -> tuple[int, ...]:
    """Return where the input is split: at any one point, or at every point."""
    return tuple(range(1, size)) if control % 16 == 0 else (control * size // 256,)


def watch_connection(connection: Connection) -> None:
    """Check that a response's reader keeps no more than it may."""
    if not connection.aborted:
        must(len(connection._buffer) <= MAX_HEAD + _CRLFCR, "a head is bounded")
    _watch_reader(getattr(connection, "_reader", None))


def watch_channel(channel: ClientConnection) -> None:
    """Check that a request's reader keeps no more than it may."""
    if not channel._discarding:
        must(len(channel._buffer) <= MAX_HEAD + _CRLFCR, "what is not read yet is bounded")
    _watch_reader(channel._reader)


def _watch_reader(reader: object) -> None:
    if isinstance(reader, ChunkedReader) and reader.error is None:
        must(len(reader._line) <= MAX_LINE + 1, "a line of the coding is bounded")


def _same(one: Verdict, two: Verdict, what: str) -> None:
    must(one._replace(leftover=b"", why="") == two._replace(leftover=b"", why=""), what)


def _framed_once(verdict: Verdict) -> None:
    names = [name for name, _ in verdict.fields if name in FRAMING]
    must(not verdict.whole or len(names) <= 1, "a body is framed once")


def response(data: bytes) -> None:
    """Read a response in several ways.

    Raises:
        Broken: something does not hold.
    """
    control, wire = data[:2].ljust(2, b"\0"), data[2:]
    method = (b"GET", b"HEAD")[control[0] % 2]
    ours = our_response(wire, method, max_head=MAX_HEAD)
    must(not (ours.keep and ours.leftover), "nothing is kept for the next response")
    _framed_once(ours)
    splits = split_places(control[1], len(wire))
    split = our_response(wire, method, splits=splits, max_head=MAX_HEAD, watch=watch_connection)
    _same(split, ours, "a split changes nothing")
    if not ours.whole:
        return
    if ours.leftover or ours.keep:
        end = len(wire) - len(ours.leftover)
        after = our_response(wire[:end] + TAIL, method, max_head=MAX_HEAD)
        _same(after, ours._replace(keep=False), "what follows changes nothing but the connection")
    for other in (h11_response(wire, method), llhttp_response(wire, method)):
        fault = framing_error(ours, other, THEIR_OWN)
        must(not fault, fault)


def request(data: bytes) -> None:
    """Read a request in several ways.

    Raises:
        Broken: something does not hold.
    """
    control, wire = data[:2].ljust(2, b"\0"), data[2:]
    ours = our_request(wire, max_head=MAX_HEAD, watch=watch_channel)
    _framed_once(ours)
    splits = split_places(control[1], len(wire))
    split = our_request(wire, splits=splits, max_head=MAX_HEAD, watch=watch_channel)
    _same(split, ours, "a split changes nothing")
    if not ours.whole or len(wire) > MAX_HEAD:
        return
    end = len(wire) - len(ours.leftover)
    after = our_request(wire[:end] + TAIL, max_head=MAX_HEAD)
    _same(after, ours, "what follows changes nothing")
    must(after.leftover == TAIL, "what follows is left as it came")
    for other in (h11_request(wire), llhttp_request(wire)):
        fault = framing_error(ours, other, THEIR_OWN)
        must(not fault, fault)
