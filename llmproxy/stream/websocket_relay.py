"""The pump of one WebSocket: bytes both ways as they are, each side held up by the other.

A :class:`WebSocketRelay` stands between a client's socket, which it gets when the 101 is sent, and
the provider's response, whose body is the other protocol.  Each read of one side is one write to
the other.  A side that takes nothing pauses the reading of the other, so that what is held stays
within the two transports' queues.

    side that ends        what the other side gets
    --------------        ------------------------
    a provider's FIN      all that came before it, then a FIN
    a provider's reset    the same: without a close frame no end looks whole (close code 1006)
    a client's FIN        all that came before it, then a FIN; a reset where that takes too long
    a client's reset      a reset
    neither (we end it)   a close frame with 1001 at the next end of a frame, then a FIN

Frames are followed only to know where one of ours may stand (``frames.py``).  Frames of ours are
never compressed, which permessage-deflate always allows (RFC 7692, section 6).  What messages mean
is read elsewhere, from copies.  Nothing here knows a provider, a trace or a metric.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.errors import ClientGone, ClientStalled, Cut, upstream_idle
from llmproxy.net.transport import has_peer_left, pending_bytes, unacknowledged_bytes
from llmproxy.stream.frames import Frames, close_frame
from llmproxy.stream.relay import Batch, StreamStatistics

GOING_AWAY = 1001

_LAST_WORDS_S = 1.0
"""How long a side may take to let us end: to finish its frame, and to take what was written."""

_ABORT_S = 0.05
"""How long a provider may take what a client has sent before it left."""

_WATCH_S = 0.05
"""Seconds between looks at a client that is not read from."""

_STALL_LOOKS = 4
"""Looks at what a client takes within ``stall``."""

Side = Literal["client", "provider", "proxy"]


class Ending(msgspec.Struct):
    """How a WebSocket ended.

    Attributes:
        by: whose TCP connection ended first; ``proxy`` where we ended both.
        closed_by: who sent the first close frame, or None.
        code: of that frame.
        why: what ended it, where that is an error.
    """

    by: Side
    closed_by: Side | None = None
    code: int | None = None
    why: Exception | None = None


@implementer(IPushProducer)
class _Valve:
    """Lets one side hold up the other: a producer for one transport that stands for another."""

    __slots__ = ("_closes", "_opens")

    def __init__(self, closes: Callable[[], object], opens: Callable[[], object]) -> None:
        self._closes = closes
        self._opens = opens

    def pauseProducing(self) -> None:
        """The side takes no more for now."""
        self._closes()

    def resumeProducing(self) -> None:
        """The side takes bytes again."""
        self._opens()

    def stopProducing(self) -> None:
        """The side is gone, which its protocol is told as well."""


class _End(TwistedProtocol):
    """One side's protocol.

    Args:
        made: called with the side's transport.
        came: called with each read.
        lost: called with why the connection ended.
    """

    def __init__(
        self,
        made: Callable[[Any], object],
        came: Callable[[bytes], object],
        lost: Callable[[Failure], object],
    ) -> None:
        self._made = made
        self._came = came
        self._lost = lost

    def makeConnection(self, transport: Any) -> None:
        """Take the transport, without the bookkeeping of Twisted's own."""
        self._made(transport)

    def dataReceived(self, data: bytes) -> None:
        """Take one read."""
        self._came(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is over."""
        self._lost(reason)


class _ClientEnd(_End):
    """The client's, which is told of a drain, too (``server/hand_over.py``)."""

    def __init__(self, relay: WebSocketRelay) -> None:
        super().__init__(relay.client_came, relay.from_client, relay.client_left)
        self._relay = relay

    def end_soon(self) -> None:
        """End as soon as no response is under way."""
        self._relay.end_soon()

    def end_now(self) -> bool:
        """End now, within a second; return False where that is under way already."""
        return self._relay.end_now()


class WebSocketRelay:
    """Forwards one WebSocket's bytes both ways.

    Args:
        reactor: runs timers.
        clock: monotonic seconds.
        idle: seconds without a byte in either direction after which both sides are closed, or None.
        stall: seconds without progress after which a client that takes nothing is dropped, or None.
        is_busy: returns whether a response is under way, which a drain lets end.
        client_copy: called with what the client sent, after that was forwarded.
        provider_copy: called with what the provider sent, likewise.
        gate: takes what the client sends, and returns what of it to forward; by default all.

    Attributes:
        provider: gets the provider's side (``Response.deliverBody``); do that first.
        client: gets the client's side (``Request.hand_over``).
        statistics: of what the provider sent.
        ending: how it ended, once it does.
        frames_out: frames that the provider sent; ``frames_in`` those of the client.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        *,
        idle: float | None,
        stall: float | None,
        is_busy: Callable[[], bool] = lambda: True,
        client_copy: Callable[[bytes], object] = lambda data: None,
        provider_copy: Callable[[bytes], object] = lambda data: None,
        gate: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self._reactor = reactor
        self._clock = clock
        self._idle = idle
        self._stall = stall
        self._is_busy = is_busy
        self._client_copy = client_copy
        self._provider_copy = provider_copy
        self._gate = gate
        self._client: Any = None
        self._provider: Any = None
        self._early: list[bytes] = []  # of the provider, before the client is there
        self._client_gone = self._provider_gone = False
        self._to_client, self._to_provider = Frames(), Frames()
        self._first_close: tuple[Side, int] | None = None
        self._messages: list[bytes] = []  # of ours, for the client
        self._is_closing = False  # close frames of ours are sent, or will be
        self._parted: set[str] = set()  # sides that get no more from us
        self._paused_at: float | None = None  # the client's side
        self._paused_before = 0.0
        self._timers: dict[str, Any] = {}
        self._waiting: Deferred[Ending] | None = None
        self._drains = self._was_cut = False
        self._heard_at = clock()
        self._written = 0
        self.ending: Ending | None = None
        self.statistics = StreamStatistics(Batch(), self._heard_at, lambda gap: None, None)
        self.provider = _End(self._provider_came, self.from_provider, self._provider_left)
        self.client = _ClientEnd(self)

    # -- for whoever started it -------------------------------------------------------------------

    def take_early(self) -> bytes:
        """Return what the provider sent behind its 101; the client gets it with that."""
        early, self._early = b"".join(self._early), []
        return early

    def over(self) -> Deferred[Ending]:
        """Return how it ended, once both sides are closed; cancelling it ends nothing."""

        def forget(_: Deferred[Ending]) -> None:
            self._waiting = None

        self._waiting = Deferred(forget)
        done, ending = self._waiting, self.ending
        if ending is not None and self._client_gone and self._provider_gone:
            done.callback(ending)
        return done

    def end(self, why: Exception | None) -> None:
        """End both sides, each with a close frame where it had none."""
        self._end("proxy", why)
        self._close()

    def abort(self, why: Exception) -> None:
        """Drop both sides at once."""
        self._end("proxy", why)
        self.drop()

    def drop(self) -> None:
        """Drop what is left of either side."""
        self._drop_client()
        self._drop_provider()

    def end_soon(self) -> None:
        """End as soon as no response is under way."""
        self._drains = True
        self._end_if_drained()

    def end_now(self) -> bool:
        """End now: the drain's time is over.  Return whether this is the first time."""
        if self._was_cut:
            return False
        self._was_cut = True
        self.end(Cut())
        return True

    def tell(self, message: bytes) -> None:
        """Send the client a frame with a message of ours, as soon as one may stand there."""
        if self.ending is None:
            self._messages.append(message)
            if self._client is not None and self._to_client.is_between_messages:
                self._write_client(b"".join(self._take_messages()))

    # -- what it is asked while it runs -----------------------------------------------------------

    @property
    def chunks(self) -> int:
        """How many reads of the provider's were forwarded."""
        return self.statistics.chunks

    @property
    def byte_count(self) -> int:
        """How many bytes these had."""
        return self.statistics.byte_count

    @property
    def paused_s(self) -> float:
        """For how many seconds the client has held up the provider so far."""
        paused = 0.0 if self._paused_at is None else self._clock() - self._paused_at
        return self._paused_before + paused

    @property
    def is_paused(self) -> bool:
        """Whether the client holds up the provider now."""
        return self._paused_at is not None

    def leave(self) -> None:
        """Drop both sides: the client counts as gone."""
        self.abort(ClientGone())

    # -- the client's side ------------------------------------------------------------------------

    def client_came(self, transport: Any) -> None:
        """The 101 was sent: forward from here on."""
        self._client = transport
        self._heard_at = self._clock()
        if self._provider_gone:
            self._part_client()
            return
        transport.registerProducer(_Valve(self._hold_provider, self._let_provider), True)
        self._provider.registerProducer(_Valve(self._hold_client, self._let_client), True)
        if self._idle is not None:
            self._watch_idle(self._idle, self._idle)

    def from_client(self, data: bytes) -> None:
        """Forward what the client sends, split at any point."""
        self._heard_at = self._clock()
        if self._provider_gone or "provider" in self._parted:
            return
        passed = data if self._gate is None else self._gate(data)
        if not self._is_closing:
            self._write_provider(passed)
            self._to_provider.feed(passed)
        else:
            self._close_within(passed, self._to_provider, self._write_provider, self._part_provider)
        self._note_close("client", self._to_provider)
        self._client_copy(data)

    def client_left(self, reason: Failure) -> None:
        """The client's connection is over, or was dropped."""
        self._client_gone = True
        self._cancel("watch", "stall")
        why = reason.value
        self._end("client", why if isinstance(why, ClientGone) else None)
        if isinstance(why, ClientStalled) and self.ending is not None and not self.ending.why:
            self.ending.why = why  # it did not take the rest of what a provider sent that has ended
        if reason.check(ConnectionDone) and not self._provider_gone:
            self._part_provider(within=_ABORT_S)
        else:
            self._drop_provider()
        self._settle()

    # -- the provider's side ----------------------------------------------------------------------

    def _provider_came(self, transport: Any) -> None:
        self._provider = transport

    def from_provider(self, data: bytes) -> None:
        """Forward what the provider sends, split at any point."""
        self._heard_at = now = self._clock()
        if self._client is None:
            self._early.append(data)
            self._to_client.feed(data)
        elif self._client_gone or "client" in self._parted:
            return
        elif not (self._is_closing or self._messages):
            self._write_client(data)
            self._to_client.feed(data)
        elif self._is_closing:
            self._close_within(data, self._to_client, self._write_client, self._part_client)
        else:
            self._put_messages_into(data)
        self._note_close("provider", self._to_client)
        self.statistics.read(now, data)
        self._provider_copy(data)
        if self._drains:
            self._end_if_drained()

    def _provider_left(self, reason: Failure) -> None:
        self._provider_gone = True
        self._end("provider", None)
        if self._client is not None:
            self._part_client()
        self._settle()

    # -- out --------------------------------------------------------------------------------------

    def _write_client(self, data: bytes) -> None:
        if data:
            self._written += len(data)
            self._client.write(data)

    def _write_provider(self, data: bytes) -> None:
        if data:
            self._provider.write(data)

    def _put_messages_into(self, data: bytes) -> None:
        """Forward bytes with messages of ours at the first place where one may stand."""
        at = self._to_client.find(data, message=True)
        if at < 0:
            self._write_client(data)
            return
        self._write_client(b"".join((data[:at], *self._take_messages(), data[at:])))
        self._to_client.feed(data, at)

    def _take_messages(self) -> list[bytes]:
        messages, self._messages = self._messages, []
        return messages

    def _note_close(self, side: Side, frames: Frames) -> None:
        if self._first_close is None and frames.close_code is not None:
            self._first_close = side, frames.close_code

    # -- backpressure -----------------------------------------------------------------------------

    def _hold_provider(self) -> None:
        """The client takes no more for now."""
        if self._paused_at is None and not self._provider_gone:
            self._paused_at = self._clock()
            self._provider.pauseProducing()
            if self._stall is not None:
                self._watch_stall(self._stall, self._taken_by_client(), self._clock())

    def _let_provider(self) -> None:
        if self._paused_at is not None:
            self._paused_before, self._paused_at = self.paused_s, None
            self._heard_at = self._clock()  # nothing could be heard of the provider
            self._cancel("stall")
            if not self._provider_gone:
                self._provider.resumeProducing()

    def _hold_client(self) -> None:
        """The provider takes no more for now; a client that leaves meanwhile is seen, too."""
        self._client.pauseProducing()
        self._call("watch", _WATCH_S, self._watch_client)

    def _let_client(self) -> None:
        self._cancel("watch")
        self._client.resumeProducing()

    def _watch_client(self) -> None:
        if has_peer_left(self._client):
            self._end("client", None)
            self._drop_client()
            self._drop_provider()
        else:
            self._call("watch", _WATCH_S, self._watch_client)

    def _watch_stall(self, stall: float, taken: int, since: float) -> None:
        """Drop a client that takes no byte although some wait for it.

        Args:
            taken: how many bytes it had taken when it last took one, at ``since``.
        """

        def look() -> None:
            now, has = self._clock(), self._taken_by_client()
            if has <= taken and now - since >= stall:
                self.abort(ClientStalled())
            else:
                self._watch_stall(stall, max(has, taken), now if has > taken else since)

        self._call("stall", stall / _STALL_LOOKS, look)

    def _taken_by_client(self) -> int:
        waiting: int = pending_bytes(self._client) + unacknowledged_bytes(self._client)
        return self._written - waiting

    # -- the end ----------------------------------------------------------------------------------

    def _watch_idle(self, idle: float, left: float) -> None:
        def look() -> None:
            left = idle - (self._clock() - self._heard_at)
            if self._paused_at is not None:
                left = idle  # a client that is slow is no provider that is silent
            if left > 0:
                self._watch_idle(idle, left)
            else:
                self.end(upstream_idle())

        self._call("idle", left, look)

    def _end_if_drained(self) -> None:
        if self.ending is None and self._client is not None and not self._is_busy():
            self.end(None)

    def _end(self, by: Side, why: Exception | None) -> None:
        """Keep how it ended: the first time counts."""
        if self.ending is None:
            self._cancel("idle")
            first: tuple[Side | None, int | None] = self._first_close or (None, None)
            self.ending = Ending(by, *first, why)

    def _close(self) -> None:
        """Send both sides a close frame at the end of a frame, and end both."""
        self._is_closing = True
        self._call("last words", _LAST_WORDS_S, self.drop)
        if self._client is not None and self._to_client.is_between_frames:
            self._close_within(b"", self._to_client, self._write_client, self._part_client)
        if self._to_provider.is_between_frames:
            self._close_within(b"", self._to_provider, self._write_provider, self._part_provider)

    def _close_within(
        self,
        data: bytes,
        frames: Frames,
        write: Callable[[bytes], object],
        part: Callable[[], object],
    ) -> None:
        """Forward up to the end of a frame, and end that side behind a close frame of ours."""
        at = frames.find(data, message=False)
        if at < 0:
            write(data)
            return
        ours = b""
        if frames.close_code is None:
            ours = close_frame(GOING_AWAY, masked=frames is self._to_provider)
        write(data[:at] + ours)
        part()

    def _part_client(self) -> None:
        """Let the client have all that was written, and then the end."""
        if not self._client_gone and "client" not in self._parted:
            self._parted.add("client")
            self._client.loseConnection()

    def _part_provider(self, within: float | None = None) -> None:
        """Let the provider have all that was written, and then the end; drop it if it is slow."""
        if not self._provider_gone and "provider" not in self._parted:
            self._parted.add("provider")
            self._provider.unregisterProducer()
            self._provider.loseConnection()
            if within is not None:
                self._call("last words", within, self.drop)

    def _drop_client(self) -> None:
        if self._client is not None and not self._client_gone:
            self._parted.add("client")
            self._client.abortConnection()

    def _drop_provider(self) -> None:
        if not self._provider_gone and "dropped" not in self._parted:
            self._parted |= {"provider", "dropped"}
            self._provider.abortConnection()

    def _settle(self) -> None:
        """Report the end, once both sides are closed."""
        if not (self._client_gone and self._provider_gone):
            return
        self._cancel(*list(self._timers))
        if self._paused_at is not None:
            self._paused_before, self._paused_at = self.paused_s, None
        waiting, self._waiting = self._waiting, None
        if waiting is not None and self.ending is not None:
            waiting.callback(self.ending)

    # -- timers -----------------------------------------------------------------------------------

    def _call(self, name: str, seconds: float, call: Callable[[], object]) -> None:
        self._cancel(name)
        self._timers[name] = self._reactor.callLater(seconds, partial(self._ring, name, call))

    def _ring(self, name: str, call: Callable[[], object]) -> None:
        del self._timers[name]
        call()

    def _cancel(self, *names: str) -> None:
        for name in names:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()
