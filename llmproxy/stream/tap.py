"""The tap: it reads a copy of a response beside the relay, and says what was in it.

A chunk comes here after it was written to the client, at once or out of the relay's batch.  The
copy passes three stages: ``decompress.py`` opens its coding, ``events.py`` or ``document.py`` finds
the events (``sniff.py`` says which of them), and the row of the endpoint reads each event into
``dialects/accumulated.py``.  At the end, the tap makes a :class:`Result` of that.  Each stage is
bounded in memory, and in the time that it takes for one read of a connection (ADR-0024, ADR-0017).

A fault in here marks the result as degraded, is logged and counted once, and at most ends the tap.
Nothing is ever raised to the relay, and no byte of the stream is changed.

Nothing here knows a route, a trace, a metric or the relay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from functools import cache
from typing import Literal

import msgspec
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger

from llmproxy.dialects.accumulated import Accumulated, ProviderError, ToolCall, Usage
from llmproxy.dialects.endpoint import DONE, Endpoint, is_whole
from llmproxy.dialects.failures import read_error_event
from llmproxy.dialects.lenient import FAULTS
from llmproxy.errors import EndReason
from llmproxy.stream.decompress import BadCoding, Bomb, Decompressor
from llmproxy.stream.document import Document, ends_of
from llmproxy.stream.events import Event, Framing, ServerSentEvents
from llmproxy.stream.items import Items
from llmproxy.stream.sniff import Sniffer, is_usual_document

_PIECE = 128 * 1024
"""Most bytes that a framing gets at once, so that a large feed is not copied as a whole."""

_log = Logger()

_EVENT_COST = 400
"""Bytes of decompressed output that take as long as reading one event of which nothing is known."""

_ENDS = 32 * 1024
"""Most bytes of either end of a document that is odd, but too long to be read tolerantly."""

_ERROR = b"error"
_ONLY_ERROR = frozenset((_ERROR,))
"""The name of an event that tells of a failure, whatever its data are."""

_JUDGED = (EndReason.COMPLETE, EndReason.CLIENT_GONE, EndReason.UPSTREAM_BROKEN)
"""Ends that a provider's own error explains, if it sent one: SDKs leave when they see it."""


class Degraded(StrEnum):
    """Why a result may lack something: a label of ``llmproxy_tap_degraded_total``.

    ``encoding``: the coding is not known here, or the bytes are not in it, or they end within it.
    ``bomb``: decompressing and reading the copy took too much of the reactor; it was given up.
    ``overlong``: an event, or a response in one piece, was longer than ``limits.event``, and was
    left out.
    ``unreadable``: an event, or a response in one piece, was not what the dialect sends; what could
    not be read of it was left out.
    ``internal``: an error of ours ended the tap.
    """

    ENCODING = "encoding"
    BOMB = "bomb"
    OVERLONG = "overlong"
    UNREADABLE = "unreadable"
    INTERNAL = "internal"


class Result(msgspec.Struct, frozen=True):
    """What was in a response.

    Attributes:
        end_reason: why the request ended, now that the content of the response is known.
        text: the text of the first choice, as far as it is held; empty without
            ``capture = "content"``.
        text_bytes: how long the whole text is in UTF-8; 0 without ``capture = "content"``.
        tool_calls: the tool calls of the first choice, as far as they are held.
        is_cut: whether text or tool calls were longer than ``limits.accumulate``.
        events: how many events with data there were, about one for each token of a stream.
        error: the provider's own error, if there was one in its response.
        degraded: why the other attributes may lack something.
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
        """Whether the client got the whole response."""
        return self.end_reason is EndReason.COMPLETE


@cache
def _with_error(names: frozenset[bytes]) -> frozenset[bytes]:
    return names | _ONLY_ERROR


class StreamAccumulator:
    """Reads a copy of one response.

    Args:
        endpoint: the row that says how to read the response.
        content_type: the response's, or None.  Only SSE, NDJSON and JSON are read, whatever they
            are called.
        content_encoding: the response's, or None.
        capture: ``content`` holds text and tool calls, ``usage`` only counts events.
        accumulate: most bytes of text and tool calls that are held, in UTF-8.
        event: the longest event, or response in one piece, that is read, in bytes.
        name: the request's id, for the log.
        degraded: called once for each reason.
        clock: monotonic seconds; by default no time passes.
        catch_up: feeds the chunks that still wait; called before anything is reported.
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
        clock: Callable[[], float] = lambda: 0.0,
        catch_up: Callable[[], object] = lambda: None,
    ) -> None:
        self._endpoint = endpoint
        self._name = name
        self._report = degraded
        self._catch_up = catch_up
        self._seen = Accumulated(keeps=capture == "content", budget=accumulate)
        self._special = _ONLY_ERROR if capture == "content" else _with_error(endpoint.text_only)
        self._result: Result | None = None
        self._waiting: list[Deferred[Result]] | None = None
        self._degraded: tuple[Degraded, ...] = ()
        self._events = 0
        self._may_have_ended = False
        self._decompressor: Decompressor | None = None
        self._framing: Framing | None
        self._framing = sniffer = Sniffer(
            content_type,
            event,
            self._overlong,
            self._choose,
            has_lines=endpoint.has_lines,
            has_array=endpoint.has_array,
        )
        self._is_stream = sniffer.expects_stream
        self._is_document = False
        self._read = endpoint.event
        self._decompressor = self._decompressor_of(content_encoding, clock)

    # -- what there is so far -------------------------------------------------------------------

    @property
    def is_reading(self) -> bool:
        """Whether further bytes are read; if not, feeding them costs nothing."""
        self._catch_up()
        return self._framing is not None

    @property
    def is_promising(self) -> bool:
        """Whether further bytes are read, by what the content type or the first bytes say."""
        self._catch_up()
        framing = self._framing
        return framing.is_declared if isinstance(framing, Sniffer) else framing is not None

    @property
    def events(self) -> int:
        """How many events with data came so far."""
        self._catch_up()
        return self._events

    @property
    def degraded(self) -> tuple[Degraded, ...]:
        """The reasons so far, in the order of :class:`Degraded`."""
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
        """How many bytes are held: at most ``accumulate``, ``event`` and a line end together."""
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
        """Return the result, now that the response has ended; later calls return the same.

        This never raises.

        Args:
            end: why the request ended, as the relay saw it.
        """
        if self._result is None:
            self._catch_up()
            try:
                self._flush(end)
            except Exception:
                self._break()
            self._framing = self._decompressor = None
            self._result = self._final_result(end)
            waiting, self._waiting = self._waiting, None
            for deferred in waiting or ():
                deferred.callback(self._result)
        return self._result

    def wait(self) -> Deferred[Result]:
        """Return a Deferred of the result.  It never fails; cancelling it ends nothing else."""
        if self._result is not None:
            return succeed(self._result)
        if self._waiting is None:
            self._waiting = []
        deferred: Deferred[Result] = Deferred(self._waiting.remove)
        self._waiting.append(deferred)
        return deferred

    def _choose(self, framing: Framing | None) -> None:
        """Go on with this framing, which the first bytes ask for; without one, read no more."""
        self._framing = framing
        self._is_document = isinstance(framing, Document)
        self._is_stream = framing is not None and not self._is_document
        self._read = self._endpoint.document if self._is_document else self._endpoint.event

    def _feed_pieces(self, framing: Framing, data: bytes) -> None:
        decompressor = self._decompressor
        if decompressor is None:
            for at in range(0, len(data), _PIECE):
                self._take(framing.feed(data[at : at + _PIECE]))
            return
        try:
            for opened in decompressor.feed(data):
                if self._framing is None:
                    return
                events = framing.feed(opened)
                decompressor.spend(len(events) * _EVENT_COST + framing.work)
                self._take(events)
        except BadCoding:
            self._give_up(Degraded.ENCODING)
        except Bomb:
            self._give_up(Degraded.BOMB)

    def _take(self, events: Iterable[Event]) -> None:
        read, special, seen = self._read, self._special, self._seen
        for name, event in events:
            self._events += 1
            if name not in special:
                try:
                    read(event, seen)
                except FAULTS:
                    self._take_odd(event)
            elif name == _ERROR:
                self._take_error(event)
        if seen.is_odd:
            self._degrade(Degraded.UNREADABLE)

    def _take_odd(self, event: bytes) -> None:
        """Take an event that cannot be decoded: the end marker, an empty event, or a fault."""
        text = event.strip()
        if text.startswith(DONE):
            if self._endpoint.end_marker == DONE.decode():
                self._seen.has_ended = True
        elif text:
            self._degrade(Degraded.UNREADABLE)
            if self._endpoint.may_end.search(event) is not None:
                self._may_have_ended = True
            if self._is_document and len(event) > _ENDS:
                self._read_ends(event)

    def _read_ends(self, document: bytes) -> None:
        with suppress(*FAULTS):
            self._read(ends_of(document[:_ENDS], document[-_ENDS:]), self._seen)

    def _take_error(self, event: bytes) -> None:
        """Take an event that says by its name that the provider failed."""
        with suppress(*FAULTS):
            self._read(event, self._seen)
        if self._seen.error is None:
            read_error_event(event, self._seen)

    def _flush(self, end: EndReason) -> None:
        """Read the events that the end completes.

        A body that broke, or whose coding is cut, may have stopped inside an event: then only
        whole ones are read.  What SDKs do not see of such an event, its end marker, does not count.
        """
        framing = self._framing
        if framing is None:
            return
        is_long = isinstance(framing, Document) and framing.is_long
        had_ended = self._seen.has_ended, self._may_have_ended
        events = framing.flush()
        is_cut = self._decompressor is not None and not self._decompressor.is_whole
        if is_cut or end is not EndReason.COMPLETE:
            events = [(name, event) for name, event in events if is_whole(event)]
        if is_cut and end is EndReason.COMPLETE:
            self._degrade(Degraded.ENCODING)
        self._take(events)
        if self._endpoint.needs_blank_line and isinstance(framing, ServerSentEvents):
            self._seen.has_ended, self._may_have_ended = had_ended
        elif isinstance(framing, Items) and not framing.is_closed:
            self._seen.has_ended = False
        if is_long and not self._seen.has_counts:
            self._degrade(Degraded.OVERLONG)

    def _final_result(self, end: EndReason) -> Result:
        try:
            return self._found(end)
        except Exception:
            self._break()
            return Result(end_reason=end, degraded=self._degraded)

    def _found(self, end: EndReason) -> Result:
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
        if (told := _told_end(self._seen, end)) is not None:
            return told
        has_marker = self._is_stream and self._endpoint.end_marker is not None
        must_end = has_marker and not self._may_have_ended
        return EndReason.UNFINISHED if end is EndReason.COMPLETE and must_end else end

    # -- what goes wrong ------------------------------------------------------------------------

    def _decompressor_of(
        self, coding: bytes | None, clock: Callable[[], float]
    ) -> Decompressor | None:
        """Return what decompresses ``coding``; if nothing does, end the tap."""
        if coding is None or coding.strip(b" \t").lower() in (b"", b"identity"):
            return None
        try:
            return Decompressor(coding, clock)
        except BadCoding:
            self._give_up(Degraded.ENCODING)
            return None

    def _overlong(self) -> None:
        # The counts of a long response in one piece are found nevertheless.
        if self._is_stream or self._seen.keeps:
            self._degrade(Degraded.OVERLONG)
        if self._endpoint.has_long_marker:
            self._may_have_ended = True

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
            self._report(reason)
        except Exception:
            _log.failure("{name}: a degraded tap could not be counted", name=self._name)

    def _give_up(self, reason: Degraded) -> None:
        self._framing = self._decompressor = None
        self._may_have_ended = True
        self._degrade(reason)

    def _break(self) -> None:
        """Log an error of ours, and end the tap."""
        _log.failure("{name}: the tap broke; its stream goes on", name=self._name)
        self._give_up(Degraded.INTERNAL)


def _told_end(seen: Accumulated, end: EndReason) -> EndReason | None:
    """Return why the request ended, where the response itself says that; else None."""
    if seen.error is not None:
        return EndReason.UPSTREAM_FAILED if end in _JUDGED else end
    if seen.has_ended:
        return EndReason.COMPLETE if end is EndReason.CLIENT_GONE else end
    return None


class DocumentTap:
    """What was in a response that came whole and is one usual JSON document, as most short ones.

    Nothing had to be held, and nothing is left to be fed.  The attributes are those of
    :class:`StreamAccumulator`.
    """

    __slots__ = ("_seen",)
    is_promising = True
    events = 1

    def __init__(self, seen: Accumulated) -> None:
        self._seen = seen

    @property
    def has_ended(self) -> bool:
        """Whether the dialect's end marker was seen."""
        return self._seen.has_ended

    @property
    def error(self) -> ProviderError | None:
        """The error that the provider put into its response."""
        return self._seen.error

    @property
    def usage(self) -> Usage:
        """The counts."""
        return self._seen.usage(is_final=True)

    def finish(self, end: EndReason) -> Result:
        """Return the result; see :meth:`StreamAccumulator.finish`."""
        seen = self._seen
        end = _told_end(seen, end) or end
        usage = seen.usage(is_final=True)
        names = seen.finish_reason, seen.model, seen.response_id
        if not seen.keeps:
            return Result(end, "", 0, (), False, 1, *names, usage, seen.error)
        text, calls = seen.text, seen.tool_calls
        return Result(end, text, seen.text_bytes, calls, seen.is_cut, 1, *names, usage, seen.error)


def read_document(
    endpoint: Endpoint,
    body: bytes,
    *,
    content_type: bytes | None,
    content_encoding: bytes | None,
    capture: Literal["usage", "content"],
    accumulate: int,
    event: int,
) -> DocumentTap | None:
    """Read a whole body, if it is a usual document without a fault; else return None.

    The arguments are those of :class:`StreamAccumulator`, which reads all others.
    """
    if content_encoding is not None or len(body) > event:
        return None
    if not is_usual_document(content_type, body, has_lines=endpoint.has_lines):
        return None
    seen = Accumulated(keeps=capture == "content", budget=accumulate)
    try:
        endpoint.document(body, seen)
    except FAULTS:
        return None
    return None if seen.is_odd else DocumentTap(seen)
