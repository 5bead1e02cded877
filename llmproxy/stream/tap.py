"""The accumulator that reads a copy of a stream beside the relay (ADR-0024).

Who relays a chunk feeds it here after it was written to the client, at once or out of a backlog.
The copy passes through three stages, each bounded: ``inflate.py`` opens its coding, ``events.py``
cuts it into events, and the endpoint's row of ``dialects/`` reads them into ``gathered.py``.
Whatever goes wrong here marks the result, is logged and counted once, and ends at most the tap:
nothing is ever raised towards the relay, and no byte of the stream is touched.

This module knows no route, no trace and no metric, and nothing of who relays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Literal

import msgspec
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from llmproxy.dialects.accumulated import Accumulated, ProviderError, ToolCall, Usage
from llmproxy.dialects.endpoint import DONE, Endpoint, is_whole
from llmproxy.errors import EndReason
from llmproxy.http1.headers import media_type
from llmproxy.stream.decompress import BadCoding, Bomb, Decompressor
from llmproxy.stream.document import Document
from llmproxy.stream.events import Event, Framing, Lines, ServerSentEvents

_PIECE = 128 * 1024
"""Most bytes that are cut into events at once, so that a large feed is not copied as a whole."""

_log = Logger()

_FRAMINGS: dict[bytes, Callable[[int, Callable[[], None]], Framing]] = {
    b"text/event-stream": ServerSentEvents,
    b"application/x-ndjson": Lines,
    b"application/jsonl": Lines,
    b"application/json": Document,
}

_JUDGED = (EndReason.COMPLETE, EndReason.CLIENT_GONE, EndReason.UPSTREAM_BROKEN)
"""Ends behind which a provider's own error stands, if it sent one: SDKs leave when they see it."""


class Degraded(StrEnum):
    """What a result may lack, and why: a label of ``llmproxy_tap_degraded_total``.

    ``encoding``: the coding is not known here, or the bytes are not in it; ``bomb``: they grow out
    of all proportion; ``overlong``: an event, or a response in one piece, was longer than
    ``limits.event`` and was left out; ``unreadable``: one was not what the dialect sends;
    ``internal``: an error of ours, which ended the tap.
    """

    ENCODING = "encoding"
    BOMB = "bomb"
    OVERLONG = "overlong"
    UNREADABLE = "unreadable"
    INTERNAL = "internal"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream held.

    Attributes:
        end_reason: why it ended, the verdict on its content included.
        text: of the first choice, as far as it is held; empty without ``capture = "content"``.
        text_bytes: how long the whole text is in UTF-8; 0 without ``capture = "content"``.
        tool_calls: of the first choice, as far as they are held.
        is_cut: text or tool calls were longer than ``limits.accumulate``.
        events: how many events with data there were, about one for each token of a stream.
        error: the provider's own error, if its response held one.
        degraded: what the tap did not understand, so that all else may lack something.
    """

    end_reason: EndReason
    text: str = ""
    text_bytes: int = 0
    tool_calls: tuple[ToolCall, ...] = ()
    is_cut: bool = False
    events: int = 0
    finish_reason: str | None = None
    model: str | None = None
    response_id: str | None = None
    usage: Usage = Usage()
    error: ProviderError | None = None
    degraded: tuple[Degraded, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether the client got all that there was."""
        return self.end_reason is EndReason.COMPLETE


class StreamAccumulator:
    """Reads a copy of one response.

    Args:
        endpoint: the row that says how to read it.
        content_type: the response's; what is neither SSE, NDJSON nor JSON is not read.
        content_encoding: the response's, or None.
        capture: ``content`` holds text and tool calls, ``usage`` only counts events.
        accumulate: most bytes of text and tool calls that are held, in UTF-8.
        event: the longest event, or answer in one piece, that is read, in bytes.
        name: the request's id, for the log.
        degraded: called once for each reason.
        catch_up: feeds what still waits to be read; called before anything is told.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        content_type: bytes | None,
        content_encoding: bytes | None = None,
        capture: Literal["usage", "content"] = "usage",
        accumulate: int = 1024**2,
        event: int = 1024**2,
        name: str = "",
        degraded: Callable[[Degraded], None] = lambda _: None,
        catch_up: Callable[[], object] = lambda: None,
    ) -> None:
        self._endpoint = endpoint
        self._name = name
        self._tell = degraded
        self._catch_up = catch_up
        self._seen = Accumulated(keeps=capture == "content", budget=accumulate)
        self._idle = frozenset() if capture == "content" else endpoint.text_only
        self._result: Result | None = None
        self._waiting: list[Deferred[Result]] = []
        self._degraded: tuple[Degraded, ...] = ()
        self._events = 0
        framing = _FRAMINGS.get(media_type(content_type))
        self._framing = framing and framing(event, self._overlong)
        self._is_document = framing is Document
        self._is_stream = framing is not None and framing is not Document
        self._read = endpoint.document if self._is_document else endpoint.event
        self._decompressor = self._opened(content_encoding) if framing else None

    # -- what there is so far -------------------------------------------------------------------

    @property
    def is_reading(self) -> bool:
        """Whether further bytes can tell anything; feeding others costs nothing."""
        self._catch_up()
        return self._framing is not None

    @property
    def events(self) -> int:
        """How many events with data came so far."""
        self._catch_up()
        return self._events

    @property
    def degraded(self) -> tuple[Degraded, ...]:
        """The reasons so far, in the order of their class."""
        self._catch_up()
        return self._degraded

    @property
    def has_ended(self) -> bool:
        """Whether the dialect's end marker was seen."""
        self._catch_up()
        return self._seen.has_ended

    @property
    def error(self) -> ProviderError | None:
        """The error that the provider put into its response, so far."""
        self._catch_up()
        return self._seen.error

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        self._catch_up()
        seen = self._seen
        is_final = self._is_document or seen.has_ended or seen.finish_reason is not None
        return seen.usage(is_final=is_final)

    @property
    def held_bytes(self) -> int:
        """How many bytes are held, at most ``accumulate`` and ``event`` and a line end."""
        self._catch_up()
        framing = self._framing
        return self._seen.held_bytes + (0 if framing is None else framing.held_bytes)

    # -- the stream -----------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Read a copy of a chunk, split at any point; never raises."""
        framing = self._framing
        if framing is None:
            return
        try:
            if self._decompressor is None and len(data) <= _PIECE:
                self._take(framing.feed(data))
            else:
                self._feed_pieces(framing, data)
        except Exception:
            self._break()

    def finish(self, end: EndReason) -> Result:
        """Return what the stream held, now that it has ended; later calls return the same.

        It never raises.

        Args:
            end: why it ended, as the relay saw it.
        """
        if self._result is None:
            self._catch_up()
            try:
                self._flush(end)
            except Exception:
                self._break()
            self._framing = self._decompressor = None
            self._result = self._concluded(end)
            waiting, self._waiting = self._waiting, []
            for deferred in waiting:
                deferred.callback(self._result)
        return self._result

    def wait(self) -> Deferred[Result]:
        """Return a Deferred of the result; it never fails, and cancelling it ends only itself."""
        if self._result is not None:
            return succeed(self._result)
        deferred: Deferred[Result] = Deferred(self._waiting.remove)
        self._waiting.append(deferred)
        return deferred

    def _feed_pieces(self, framing: Framing, data: bytes) -> None:
        try:
            for opened in [data] if self._decompressor is None else self._decompressor.feed(data):
                for at in range(0, len(opened), _PIECE):
                    self._take(framing.feed(opened[at : at + _PIECE]))
        except BadCoding:
            self._give_up(Degraded.ENCODING)
        except Bomb:
            self._give_up(Degraded.BOMB)

    def _take(self, events: Iterable[Event]) -> None:
        read, idle, seen = self._read, self._idle, self._seen
        for name, event in events:
            self._events += 1
            if name not in idle:
                try:
                    read(event, seen)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                    self._take_odd(event)

    def _take_odd(self, event: bytes) -> None:
        """An event that cannot be decoded: the marker, which is no JSON, or nothing at all."""
        if event.startswith(DONE):
            if self._endpoint.end_marker == DONE.decode():
                self._seen.has_ended = True
        elif not event.isspace() and event:
            self._degrade(Degraded.UNREADABLE)

    def _flush(self, end: EndReason) -> None:
        """Read what the end completes: a body that broke may have stopped inside an event."""
        if self._framing is None:
            return
        is_long = isinstance(self._framing, Document) and self._framing.is_long
        events = self._framing.flush()
        if end is not EndReason.COMPLETE:
            events = [(name, event) for name, event in events if is_whole(event)]
        self._take(events)
        if is_long and self._seen.usage(is_final=True).provenance == "none":
            self._degrade(Degraded.OVERLONG)

    def _concluded(self, end: EndReason) -> Result:
        try:
            return self._told(end)
        except Exception:
            self._break()
            return Result(end_reason=end, degraded=self._degraded)

    def _told(self, end: EndReason) -> Result:
        seen = self._seen
        return Result(
            end_reason=self._verdict(end),
            text=seen.text,
            text_bytes=seen.text_bytes,
            tool_calls=seen.tool_calls,
            is_cut=seen.is_cut,
            events=self._events,
            finish_reason=seen.finish_reason,
            model=seen.model,
            response_id=seen.response_id,
            usage=self.usage,
            error=seen.error,
            degraded=self._degraded,
        )

    def _verdict(self, end: EndReason) -> EndReason:
        seen = self._seen
        if seen.error is not None:
            return EndReason.UPSTREAM_FAILED if end in _JUDGED else end
        if seen.has_ended:
            return EndReason.COMPLETE if end is EndReason.CLIENT_GONE else end
        must_end = self._is_stream and self._endpoint.end_marker is not None and not self._degraded
        return EndReason.UNFINISHED if end is EndReason.COMPLETE and must_end else end

    # -- what goes wrong ------------------------------------------------------------------------

    def _opened(self, coding: bytes | None) -> Decompressor | None:
        """Return what opens ``coding``; without one for it the tap is given up."""
        if coding is None or coding.strip(b" \t").lower() in (b"", b"identity"):
            return None
        try:
            return Decompressor(coding)
        except BadCoding:
            self._give_up(Degraded.ENCODING)
            return None

    def _overlong(self) -> None:
        # Of a long response in one piece the counts are found all the same.
        if self._is_stream or self._seen.keeps:
            self._degrade(Degraded.OVERLONG)

    def _degrade(self, reason: Degraded) -> None:
        if reason in self._degraded:
            return
        self._degraded = tuple(one for one in Degraded if one in (*self._degraded, reason))
        if reason is not Degraded.INTERNAL:
            _log.warn(
                "{name}: what the response holds is not known in full: {reason}",
                name=self._name,
                reason=reason.value,
            )
        try:
            self._tell(reason)
        except Exception:
            _log.failure("{name}: a degraded tap could not be counted", name=self._name)

    def _give_up(self, reason: Degraded) -> None:
        self._framing = self._decompressor = None
        self._degrade(reason)

    def _break(self) -> None:
        """An error of ours: log it, and read no further."""
        _log.failure("{name}: the tap broke; its stream goes on", name=self._name)
        self._give_up(Degraded.INTERNAL)
