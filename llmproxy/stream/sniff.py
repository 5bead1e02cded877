"""Finds out how a response is framed: SSE, lines of JSON, an array of JSON, or one JSON document.

The content type says so, but not always rightly: servers call JSON ``text/plain``, a stream
``application/json`` and an error ``text/event-stream``, and some say nothing at all.  All that is
read here begins in a way of its own, so the first bytes decide; only where they do not, the content
type does.  A body that begins in no such way under another content type is not read.

Nothing here knows a dialect.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence

from llmproxy.http1.headers import media_type
from llmproxy.stream.document import Document
from llmproxy.stream.events import Event, Framing, Lines, ServerSentEvents
from llmproxy.stream.items import Items

_Maker = Callable[[int, Callable[[], None]], Framing]

_DECLARED: dict[bytes, _Maker] = {
    b"text/event-stream": ServerSentEvents,
    b"application/x-ndjson": Lines,
    b"application/jsonl": Lines,
    b"application/json": Document,
}

_USUAL: dict[_Maker | None, tuple[bytes, ...]] = {
    Document: (b"{",),
    ServerSentEvents: (b"data:", b"event:"),
}
"""How nearly all bodies of a content type begin; nothing else has to be looked at then."""

_SHORTEST = 7
"""Bytes that say whether a body begins with a field of SSE: the longest one is ``event``."""

_FIRST_LINE = 16 * 1024
"""Most bytes that are held until the first line of JSON ends; a line of a stream is shorter."""

_SSE_FIELD = re.compile(rb"(?:data|event|id|retry)?[:\r\n]").match

_BLANKS = b" \t\r\n"
_JSON = (b"{", b"[")


def is_usual_document(content_type: bytes | None, body: bytes, *, has_lines: bool) -> bool:
    """Return whether a whole body is one JSON object, by its type and its first byte.

    Args:
        has_lines: whether the endpoint's streams are lines of JSON, which are called the same.
    """
    declared = _DECLARED.get(media_type(content_type))
    return declared is Document and not has_lines and body.startswith(b"{")


class Sniffer:
    """Looks at the first bytes of a body; then another framing takes them, and all that follow.

    Args:
        content_type: the response's, or None.
        limit: the longest event, in bytes.
        overlong: called for each longer event.
        choose: called once with the framing that the bytes ask for, or None where there is none.
        has_lines: whether the endpoint's streams are lines of JSON.
        has_array: whether they may be one JSON array.
    """

    __slots__ = (
        *("_choose", "_chosen", "_declared", "_has_array", "_has_lines", "_held"),
        *("_is_known", "_limit", "_overlong", "_usual"),
    )

    def __init__(
        self,
        content_type: bytes | None,
        limit: int,
        overlong: Callable[[], None],
        choose: Callable[[Framing | None], None],
        *,
        has_lines: bool,
        has_array: bool = False,
    ) -> None:
        declared = self._declared = _DECLARED.get(media_type(content_type))
        self._usual = () if has_lines else _USUAL.get(declared, ())
        self._limit = limit
        self._overlong = overlong
        self._choose = choose
        self._has_lines = has_lines
        self._has_array = has_array
        self._held = b""
        self._is_known = False
        self._chosen: Framing | None = None

    @property
    def is_declared(self) -> bool:
        """Whether the content type is one of those that are read."""
        return self._declared is not None

    @property
    def expects_stream(self) -> bool:
        """Whether the content type speaks of a stream."""
        return self._declared in (ServerSentEvents, Lines)

    @property
    def work(self) -> int:
        """How long the last feed took besides its events."""
        return 0 if self._chosen is None else self._chosen.work

    @property
    def held_bytes(self) -> int:
        """How many bytes wait until the framing is known."""
        return len(self._held) if self._chosen is None else self._chosen.held_bytes

    def feed(self, data: bytes) -> Sequence[Event]:
        """Return the events that these bytes complete."""
        if self._is_known:
            return () if self._chosen is None else self._chosen.feed(data)
        if data.startswith(self._usual) and not self._held:
            return self._begin(self._declared, data)
        self._held += data
        start = self._start()
        if self._says(start):
            return self._go_on(start)
        if not start:  # blank lines keep a connection alive; there may be any number of them
            self._held = codecs.BOM_UTF8 if self._held.startswith(codecs.BOM_UTF8) else b""
        return ()

    def flush(self) -> Sequence[Event]:
        """Return the events that the end of the body completes."""
        events = [] if self._is_known else self._go_on(self._start())
        return [] if self._chosen is None else [*events, *self._chosen.flush()]

    def _start(self) -> bytes:
        return self._held.removeprefix(codecs.BOM_UTF8).lstrip(_BLANKS)

    def _says(self, start: bytes) -> bool:
        """Return whether these bytes are enough to tell the framing."""
        if not start.startswith(_JSON):
            return len(start) >= _SHORTEST or _SSE_FIELD(start) is not None
        return (
            not self._may_be_lines()
            or start.find(b"\n") >= 0
            or len(start) >= min(_FIRST_LINE, self._limit)
        )

    def _go_on(self, start: bytes) -> Sequence[Event]:
        held, self._held = self._held, b""
        return self._begin(self._maker(start), held)

    def _begin(self, maker: _Maker | None, data: bytes) -> Sequence[Event]:
        self._is_known = True
        self._chosen = framing = None if maker is None else maker(self._limit, self._overlong)
        self._choose(framing)
        return () if framing is None else framing.feed(data)

    def _maker(self, start: bytes) -> _Maker | None:
        if not start.startswith(_JSON):
            return ServerSentEvents if _SSE_FIELD(start) is not None else self._declared
        if self._has_array and start.startswith(b"["):
            return Items
        line, end, _ = start.partition(b"\n")
        is_line = end and line.rstrip(_BLANKS).endswith((b"}", b"]"))
        return Lines if is_line and self._may_be_lines() else Document

    def _may_be_lines(self) -> bool:
        return self._has_lines or self._declared is Lines
