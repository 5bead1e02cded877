"""Responses that break, one of each kind, and whole ones: what a provider sends and how it ends.

Where a response is framed (chunked towards HTTP/1.1, or by a length), a client sees a break in
an end short of the framing.  Where its end is the connection's, as towards HTTP/1.0, only a
reset shows it.
"""

from __future__ import annotations

import gzip
from typing import NamedTuple

from tests.support.kernel import unsent
from tests.support.live_proxy import until
from tests.support.scripts import LAST, event
from tests.support.sockets import Wire, chunked

ROUTES = {
    "relayed": "",
    "event": 'error_event = true\ntimeouts = { idle = "700ms" }',
    "idle": 'timeouts = { idle = "700ms" }',
    "total": 'timeouts = { total = "1500ms" }',
}
"""Further keys of the routes that the responses need."""

EVENTS = b"".join(event(number) for number in range(3))
BIG = b"".join(event(number) for number in range(60_000))
"""A good megabyte, no two pieces of which are the same."""
JSON = b'{"choices": [{"message": {"content": "half a sen'
LINES = b'{"response":"a"}\n{"response":"b"}\n'
GZIP = gzip.compress(EVENTS, mtime=0)[:-8]

_FRAMING = {"chunked": "Transfer-Encoding: chunked", "length": "Content-Length: {}", "close": ""}


class Sent(NamedTuple):
    """What a provider sends, and how it ends.

    Attributes:
        framing: ``chunked``, by ``length``, or by the connection's ``close``; without any, there is
            no head, and nothing is sent but the rest.
        end: ``fin``, ``reset``, ``silence``; or ``proper``, as one ends that is done: with TLS's
            close_notify.
        content: what of it is content.
        rest: raw bytes behind the content and its framing.
        inside: the last chunk announces more than there is.
        kind: the content type.
        coding: the content coding, if any.
        route: what it is asked for by, a key of ``ROUTES``.
        reason: the end reason that must be recorded.
    """

    framing: str
    end: str
    content: bytes = EVENTS
    rest: bytes = b""
    inside: bool = False
    kind: str = "text/event-stream"
    coding: str = ""
    route: str = "relayed"
    reason: str = "upstream_broken"

    @property
    def raw(self) -> bytes:
        """The response as it goes on the wire."""
        if not self.framing:
            return self.rest
        announced = len(self.content) + (0 if self.end == "proper" else 100)
        lines = [
            "HTTP/1.1 200 OK",
            f"Content-Type: {self.kind}",
            f"Content-Encoding: {self.coding}" if self.coding else "",
            "Connection: close",
            _FRAMING[self.framing].format(announced),
        ]
        head = "\r\n".join(filter(None, lines)).encode() + b"\r\n\r\n"
        if self.framing != "chunked":
            return head + self.content
        if self.inside:
            return head + b"%x\r\n" % announced + self.content
        pieces = (self.content[at : at + 16384] for at in range(0, len(self.content), 16384))
        return head + chunked(*pieces) + self.rest

    def tells_by_framing(self, version: str) -> bool:
        """Tell whether a client of this version sees the break in the framing."""
        return version == "1.1" or self.framing == "length"

    def play(self, wire: Wire, *, after: int = 0) -> None:
        """Send what comes after so many bytes, on a connection whose request was read; and end."""
        wire.send(self.raw[after:])
        if self.end == "silence":
            wire.wait_closed()
        elif self.end == "proper":
            wire.close_notify()
        elif self.end == "reset":
            # What a reset overtakes is lost for good.
            until(lambda: not unsent(wire.sock), "everything is acknowledged")
            wire.reset()


def _bad_size(content: bytes = EVENTS, rest: bytes = b"zz\r\n") -> Sent:
    return Sent("chunked", "silence", content, rest, reason="upstream_protocol")


def _idle(framing: str, content: bytes = EVENTS, *, inside: bool = False) -> Sent:
    return Sent(framing, "silence", content, inside=inside, route="idle", reason="upstream_idle")


def _total(framing: str, content: bytes = EVENTS) -> Sent:
    return Sent(framing, "silence", content, route="total", reason="upstream_timeout")


def _json(framing: str, end: str) -> Sent:
    return Sent(framing, end, JSON, kind="application/json")


BREAKS = {
    "chunked, fin between chunks": Sent("chunked", "fin"),
    "chunked, fin inside a chunk": Sent("chunked", "fin", inside=True),
    "chunked, fin inside a size": Sent("chunked", "fin", rest=b"1"),
    "chunked, fin inside the last chunk": Sent("chunked", "fin", rest=b"0\r\n"),
    "chunked, reset between chunks": Sent("chunked", "reset"),
    "chunked, reset inside a chunk": Sent("chunked", "reset", inside=True),
    "chunked, bad size": _bad_size(),
    "chunked, idle": _idle("chunked"),
    "chunked, idle inside a chunk": _idle("chunked", inside=True),
    "chunked, total": _total("chunked"),
    "length, fin": Sent("length", "fin"),
    "length, reset": Sent("length", "reset"),
    "length, idle": _idle("length"),
    "close, reset": Sent("close", "reset"),
    "close, idle": _idle("close"),
    "close, total": _total("close"),
    "no byte, chunked, fin": Sent("chunked", "fin", b""),
    "no byte, chunked, idle": _idle("chunked", b""),
    "no byte, close, reset": Sent("close", "reset", b""),
    "big, chunked, fin inside a chunk": Sent("chunked", "fin", BIG, inside=True),
    "big, chunked, reset": Sent("chunked", "reset", BIG),
    "big, chunked, idle": _idle("chunked", BIG),
    "big, length, reset": Sent("length", "reset", BIG),
    "big, close, reset": Sent("close", "reset", BIG),
    "JSON, chunked, fin": _json("chunked", "fin"),
    "gzip, chunked, fin": Sent("chunked", "fin", GZIP, coding="gzip"),
}
"""Broken for every client, however the provider is reached."""

HELD = {
    "chunked, fin": Sent("chunked", "fin", BIG[:400_000]),
    "chunked, reset": Sent("chunked", "reset", BIG[:400_000]),
    "length, fin": Sent("length", "fin", BIG[:400_000]),
    "close, reset": Sent("close", "reset", BIG[:400_000]),
}
"""The kernel takes all of it for a client that reads nothing; each begins with ``EVENTS``."""

BARE_FIN = {
    "close, fin": Sent("close", "fin"),
    "no byte, close, fin": Sent("close", "fin", b""),
    "big, close, fin": Sent("close", "fin", BIG),
}
"""A FIN alone ends the body: whole on a plain connection, broken where TLS should say so."""

WHOLE = {
    f"{name}, {framing}": Sent(
        framing, "proper", content, LAST if framing == "chunked" else b"", reason="complete"
    )
    for framing in _FRAMING
    for name, content in (("small", EVENTS), ("no byte", b""), ("big", BIG))
}

REPORTED = {
    "chunked, fin": Sent("chunked", "fin", route="event"),
    "chunked, reset": Sent("chunked", "reset", route="event"),
    "chunked, bad size": _bad_size()._replace(route="event"),
    "chunked, idle": _idle("chunked")._replace(route="event"),
    "close, reset": Sent("close", "reset", route="event"),
    "no byte, chunked, fin": Sent("chunked", "fin", b"", route="event"),
    "big, chunked, fin": Sent("chunked", "fin", BIG, route="event"),
    "big, close, reset": Sent("close", "reset", BIG, route="event"),
    "lines, chunked, fin": Sent(
        "chunked", "fin", LINES, kind="application/x-ndjson", route="event"
    ),
}
"""One event more is due behind what came."""

UNREPORTED = {
    "inside an event": Sent("chunked", "fin", EVENTS + b"data: {", route="event"),
    "with a length": Sent("length", "fin", route="event"),
    "encoded": Sent("chunked", "fin", GZIP, coding="gzip", route="event"),
    "JSON": _json("chunked", "fin")._replace(route="event"),
}
"""No event can be put behind what came, although the route asks for it."""
