"""The tap of a WebSocket: it reads copies of both directions, and says what responses there were.

A copy comes here after its bytes were forwarded.  wsproto finds the frames, and
permessage-deflate's context goes from message to message; whole text messages are read as events
of the API (``dialects/websocket.py``).  All of it is bounded, which wsproto does not do: a message
to ``event`` bytes, whatever it inflates to, and inflating by a credit of work that time brings
(ADR-0017).

Whatever goes wrong in here marks the result as degraded, is logged and counted once, and at most
ends the tap.  Nothing is ever raised to the relay, and no byte is changed.  Nothing here knows a
route, a trace, a metric or the relay.
"""

from __future__ import annotations

import re
import zlib
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

from twisted.logger import Logger
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import (
    CloseReason,
    Frame,
    FrameDecoder,
    FrameProtocol,
    Opcode,
    ParseFailed,
    RsvBits,
)

from llmproxy.dialects.accumulated import Accumulated
from llmproxy.dialects.lenient import FAULTS
from llmproxy.dialects.websocket import (
    ClientEvent,
    ProviderEvent,
    read_client_event,
    read_provider_event,
)
from llmproxy.errors import EndReason
from llmproxy.stream.decompress import Bomb, Credit
from llmproxy.stream.tap import Degraded, Result

_OUT = 64 * 1024
"""Most bytes of output of one step of inflating."""

_TAIL = b"\x00\x00\xff\xff"
"""What a sender leaves out at the end of a message (RFC 7692, section 7.2.1)."""

_EVENT_COST = 400
"""Bytes of inflated output that take as long as reading one event of which nothing is known."""

_HEAD = 4096
"""Bytes of a message that is too long in which its type is looked for."""

_may_end = re.compile(rb'"response\.(?:completed|incomplete|failed|done)"').search

_log = Logger()


class _Inflater(PerMessageDeflate):
    """permessage-deflate for reading alone, with a bound on what a message may become.

    Args:
        most: bytes of a message that are kept; the rest is inflated for the context's sake alone.
        credit: pays for the work.
        forgets: the sender's context does not go from message to message.
    """

    def __init__(self, most: int, credit: Credit, *, forgets: bool) -> None:
        super().__init__()
        self._enabled = True
        self._most = most
        self._credit = credit
        self._forgets = forgets
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        self._size = 0
        self._keeps = False

    def frame_inbound_header(
        self, proto: FrameDecoder | FrameProtocol, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        """Note whether a message is a text, of which the output is kept."""
        if opcode in (Opcode.TEXT, Opcode.BINARY):
            self._keeps = opcode is Opcode.TEXT
        return super().frame_inbound_header(proto, opcode, rsv, payload_length)

    def frame_inbound_payload_data(
        self, proto: FrameDecoder | FrameProtocol, data: bytes
    ) -> bytes | CloseReason:
        """Inflate a part of a message."""
        if self._inbound_compressed and self._inbound_is_compressible:
            return self._inflated(data)
        return data

    def frame_inbound_complete(
        self, proto: FrameDecoder | FrameProtocol, fin: bool
    ) -> bytes | CloseReason | None:
        """Inflate what is left of a message."""
        if not self._inbound_is_compressible or not fin:
            if fin and self._inbound_compressed is False:
                self._inbound_compressed = None
            return None
        rest = self._inflated(_TAIL) if self._inbound_compressed else b""
        self._inbound_compressed, self._size = None, 0
        if self._forgets:
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        return rest

    def _inflated(self, data: bytes) -> bytes:
        pieces = []
        while True:
            piece = self._inflate.decompress(data, _OUT)
            self._credit.spend(len(piece))
            if self._keeps and self._size <= self._most:
                pieces.append(piece)
            self._size += len(piece)
            data = self._inflate.unconsumed_tail
            if self._inflate.eof:  # a block that says that it is the last one: begin anew
                data, self._inflate = self._inflate.unused_data, zlib.decompressobj(-zlib.MAX_WBITS)
            if not data and len(piece) < _OUT:
                return b"".join(pieces)


class Messages:
    """The text messages of one direction.

    Args:
        from_server: frames are the provider's, and not masked.
        extensions: the value of the 101's ``Sec-WebSocket-Extensions``, or None.
        most: bytes of the longest message that is read.
        clock: monotonic seconds.
        take: called with each message.
        too_long: called with the beginning of one that is longer.
        degraded: called with why something is not read.
    """

    def __init__(
        self,
        *,
        from_server: bool,
        extensions: bytes | None,
        most: int,
        clock: Callable[[], float],
        take: Callable[[bytes], object],
        degraded: Callable[[Degraded], object],
        too_long: Callable[[bytes], object] = lambda head: None,
    ) -> None:
        self._most = most
        self._take = take
        self._too_long = too_long
        self._degraded = degraded
        self._credit = Credit(clock)
        self._parts: list[bytes] = []
        self._size = 0
        self._is_text = False
        self._decoder: FrameDecoder | None = None
        words = _words(extensions or b"")
        if not words:
            self._decoder = FrameDecoder(from_server, [])
        elif len(words) == 1 and words[0][:1] == [b"permessage-deflate"]:
            side = b"server" if from_server else b"client"
            forgets = side + b"_no_context_takeover" in words[0]
            inflater = _Inflater(most, self._credit, forgets=forgets)
            self._decoder = FrameDecoder(from_server, [inflater])
        else:
            degraded(Degraded.ENCODING)

    @property
    def is_reading(self) -> bool:
        """Whether further messages are read."""
        return self._decoder is not None

    def feed(self, data: bytes) -> None:
        """Read a copy of bytes, split at any point; never raises."""
        decoder = self._decoder
        if decoder is None:
            return
        try:
            self._credit.earn()
            decoder.receive_bytes(data)
            while self._decoder is not None and (part := decoder.process_buffer()) is not None:
                self._take_part(part)
        except (ParseFailed, zlib.error):
            self._give_up(Degraded.ENCODING)
        except Bomb:
            self._give_up(Degraded.BOMB)
        except Exception:
            _log.failure("a WebSocket's messages could not be read")
            self._give_up(Degraded.INTERNAL)

    def _take_part(self, part: Frame) -> None:
        opcode, payload = part.opcode, part.payload
        if opcode.iscontrol():
            if opcode is Opcode.CLOSE:
                self._decoder = None  # nothing comes behind it
            return
        if opcode is not Opcode.CONTINUATION:
            self._is_text = opcode is Opcode.TEXT
        if not self._is_text or not isinstance(payload, bytes):
            return
        self._size += len(payload)
        if self._size <= self._most:
            self._parts.append(payload)
        elif not self._parts:
            self._parts.append(payload[:_HEAD])
        if not (part.frame_finished and part.message_finished):
            return
        message, size = b"".join(self._parts), self._size
        self._parts, self._size = [], 0
        self._credit.spend(_EVENT_COST)
        if size > self._most:
            self._degraded(Degraded.OVERLONG)
            self._too_long(message[:_HEAD])
        else:
            self._take(message)

    def _give_up(self, why: Degraded) -> None:
        self._decoder, self._parts = None, []
        self._degraded(why)


def _words(extensions: bytes) -> list[list[bytes]]:
    """Return each extension of a list: its name, and its parameters."""
    members = [member for member in extensions.split(b",") if member.strip()]
    return [[word.strip().lower() for word in member.split(b";")] for member in members]


class SocketResponse:
    """One response on a WebSocket.

    Attributes:
        model: the one that was asked for.
        is_wanted: it counts; else it only warmed something up.
        asked_at: when the client asked for it, or where it did not when it began.
        first_at: when its second event came, which holds something of it.
        events: how many there were.
        seen: what they said.
        lease: whatever the asking holds of a client's limits.
    """

    __slots__ = ("asked_at", "events", "first_at", "is_wanted", "lease", "model", "seen")

    def __init__(
        self, model: str | None, asked_at: float, seen: Accumulated, *, is_wanted: bool
    ) -> None:
        self.model = model
        self.asked_at = asked_at
        self.seen = seen
        self.is_wanted = is_wanted
        self.first_at: float | None = None
        self.events = 0
        self.lease: object = None

    def result(self, end: EndReason) -> Result:
        """Return what was in it, now that it has ended.

        Args:
            end: why, as far as the connection knows; a response that is whole says itself.
        """
        seen = self.seen
        if seen.has_ended:
            end = EndReason.COMPLETE
        if seen.error is not None:
            end = EndReason.UPSTREAM_FAILED
        return Result(
            end_reason=end,
            text=seen.text,
            text_bytes=seen.text_bytes,
            tool_calls=seen.tool_calls,
            is_cut=seen.is_cut,
            events=self.events,
            finish_reason=seen.finish_reason,
            model=seen.model,
            response_id=seen.response_id,
            usage=seen.usage(is_final=seen.has_ended),
            error=seen.error,
        )


class WebSocketTap:
    """Reads the copies of one WebSocket.

    Args:
        extensions: the value of the 101's ``Sec-WebSocket-Extensions``, or None.
        model: the one that the handshake named, or None.
        capture: ``content`` holds text and tool calls.
        accumulate: most bytes of these that are held for a response.
        event: the longest message that is read, in bytes.
        clock: monotonic seconds.
        name: the connection's id, for the log.
        ended: called with each response that has ended.
        degraded: called once for each reason.

    Attributes:
        degraded: why something may be missing.
        model: the session's.
        most_running: responses that may be under way at once, as far as they are followed.
    """

    most_running: Final = 256

    def __init__(
        self,
        *,
        extensions: bytes | None,
        model: str | None,
        capture: Literal["usage", "content"],
        accumulate: int,
        event: int,
        clock: Callable[[], float],
        name: str,
        ended: Callable[[SocketResponse], object],
        degraded: Callable[[Degraded], object],
    ) -> None:
        self.model = model
        self.degraded: list[Degraded] = []
        self._keeps = capture == "content"
        self._accumulate = accumulate
        self._clock = clock
        self._name = name
        self._ended = ended
        self._report = degraded
        self._asked: deque[SocketResponse] = deque()
        self._running: dict[str, SocketResponse] = {}
        self._client = Messages(
            from_server=False,
            extensions=extensions,
            most=event,
            clock=clock,
            take=self._client_said,
            degraded=self._degrade,
        )
        self._provider = Messages(
            from_server=True,
            extensions=extensions,
            most=event,
            clock=clock,
            take=self._provider_said,
            degraded=self._degrade,
            too_long=self._provider_said_much,
        )
        self.feed_client, self.feed_provider = self._client.feed, self._provider.feed

    @property
    def is_busy(self) -> bool:
        """Whether a response is asked for or under way, as far as is known."""
        return bool(self._asked or self._running)

    @property
    def knows_all(self) -> bool:
        """Whether it can be told if a response is under way."""
        return not self.degraded or (self._client.is_reading and self._provider.is_reading)

    @property
    def is_full(self) -> bool:
        """Whether no further response that is asked for would be followed."""
        return len(self._asked) >= self.most_running

    def finish(self) -> list[SocketResponse]:
        """Return the responses that are still under way, now that the connection has ended."""
        left = [*self._running.values(), *self._asked]
        self._running.clear()
        self._asked.clear()
        return left

    def expect(self, event: ClientEvent) -> SocketResponse:
        """A client asks for a response."""
        asked = self._response(event.named or self.model, is_wanted=event.is_wanted)
        if not self.is_full:
            self._asked.append(asked)
        return asked

    # -- what was said ----------------------------------------------------------------------------

    def _client_said(self, message: bytes) -> None:
        try:
            event = read_client_event(message)
        except FAULTS:
            return  # it is the provider's to say what it makes of that
        if event.asks:
            self.expect(event)
        elif event.session is not None and event.session.model:
            self.model = event.session.model

    def _provider_said(self, message: bytes) -> None:
        try:
            event = read_provider_event(message)
        except FAULTS:
            self._degrade(Degraded.UNREADABLE)
            return
        if event.session is not None and event.session.model:
            self.model = event.session.model
        if event.begins and event.id:
            self._begin(event.id)
        if event.type == "error":
            self._fail(event)
        elif (response := self._of(event)) is not None:
            self._read(event, response)

    def _provider_said_much(self, head: bytes) -> None:
        """Let the only response end where a message that is too long says so; it has no counts."""
        if len(self._running) == 1 and _may_end(head):
            _, response = self._running.popitem()
            response.seen.has_ended = True
            self._ended(response)

    def _begin(self, name: str) -> None:
        if name in self._running and not self._asked:
            return  # it is said twice
        response = self._asked.popleft() if self._asked else self._response(self.model)
        before, running = self._running.pop(name, None), self._running
        if before is None and len(running) >= self.most_running:
            before = running.pop(next(iter(running)))
        running[name] = response
        if before is not None:  # it may hold a place of its client's
            before.seen.fail("never_ended", None)
            self._ended(before)

    def _of(self, event: ProviderEvent) -> SocketResponse | None:
        """Return the response that an event belongs to."""
        if event.id is not None:
            return self._running.get(event.id)
        if not event.type.startswith("response.") or len(self._running) != 1:
            return None
        return next(iter(self._running.values()))  # Responses names it at its ends alone

    def _read(self, event: ProviderEvent, response: SocketResponse) -> None:
        response.events += 1
        if response.first_at is None and response.events > 1:
            response.first_at = self._clock()
        event.read_into(response.seen)
        if event.ends:
            self._running = {k: v for k, v in self._running.items() if v is not response}
            self._ended(response)

    def _fail(self, event: ProviderEvent) -> None:
        """An error ends what was asked for last and has not begun, or what runs alone."""
        if self._asked:
            response = self._asked.pop()
        elif len(self._running) == 1:
            _, response = self._running.popitem()
        else:
            return
        event.read_into(response.seen)
        self._ended(response)

    def _response(self, model: str | None, *, is_wanted: bool = True) -> SocketResponse:
        seen = Accumulated(keeps=self._keeps, budget=self._accumulate)
        return SocketResponse(model, self._clock(), seen, is_wanted=is_wanted)

    def _degrade(self, reason: Degraded) -> None:
        if reason in self.degraded:
            return
        self.degraded.append(reason)
        if reason is not Degraded.INTERNAL:
            _log.warn(
                "{name}: what the WebSocket holds is not known in full: {reason}",
                name=self._name,
                reason=reason.value,
            )
        self._report(reason)
