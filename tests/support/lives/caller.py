"""The client of one life: it sends and leaves as drawn, and keeps the responses."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from llmproxy.net.transport import pending_bytes, raw_transport
from tests.support.lives.messages import method, request
from tests.support.lives.plan import MALFORMED, Departure, Leave, Life, Moment
from tests.support.lives.response_reader import ResponseReader

_BREATH = 0.003
"""Seconds between two parts of a request."""

_NARROW = 16384
"""Bytes of a narrow client's receive buffer."""


class _Segment(NamedTuple):
    """A part of a request, and the act after it.

    Attributes:
        then: nothing, ``breathe``, ``invite`` (wait for the 100) or ``leave``.
        head: it is the end of a request's head.
    """

    data: bytes
    then: str
    head: bool


@implementer(IHandshakeListener)
class LifeClient(Protocol):
    """The client of one life.

    Args:
        life: the drawn life.
        reactor: keeps time.
        over: called once when the connection is gone.

    Attributes:
        heads: how many requests' heads went out.
        left: it has left, or is about to.
        unsent: some written bytes were not sent when it left.
    """

    transport: Any

    def __init__(self, life: Life, reactor: Any, over: Callable[[None], None]) -> None:
        self.life = life
        self.reader = ResponseReader()
        self.heads = 0
        self.left = False
        self.unsent = False
        self._over: Callable[[None], None] | None = over
        self._reactor = reactor
        self._leave: Leave | None = life.leave
        self._segments: list[_Segment] = []
        self._begun = False
        self._has_closed = False
        self._quiet = False
        self._awaits_invitation = False
        self._timers: list[Any] = []
        self._current = 0
        self._received = 0

    # -- the connection -------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Leave at once, or begin; over TLS, begin after the handshake."""
        raw = raw_transport(self.transport)
        raw.setTcpNoDelay(True)
        if self.life.narrow:
            raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW)
        if self._is_due(Moment.CONNECTED, 0):
            self._go()
        elif not self.life.secure:
            self._ask()

    def handshakeCompleted(self) -> None:
        """Begin over TLS."""
        if not self.left:
            self._ask()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Note how the connection ended."""
        if reason.check(ConnectionDone) and not self._has_closed:
            self.reader.end()
        self._stop_timers()
        self.transport = None
        over, self._over = self._over, None
        if over is not None:
            over(None)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(self._reactor.callLater(seconds, call))

    def _stop_timers(self) -> None:
        for timer in self._timers:
            if timer.active():
                timer.cancel()
        self._timers = []

    # -- asking ---------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Send the present request, or all of them."""
        self._begun = True
        count = len(self.life.asks)
        for number in range(count) if self.life.pipelined else (self._current,):
            self._segments += self._split(number)
        self._announce()
        self._send()

    def _announce(self) -> None:
        self._received = 0
        ask = self.life.asks[self._current]
        leave = self._leave
        waits = leave is not None and leave.way is Departure.WAIT
        # Where the proxy never learns the method, its response is not one to a HEAD.
        unknown = ask.flaw == MALFORMED or (waits and self._is_due(Moment.HEAD, self._current))
        self.reader.announce("GET" if unknown else method(ask))

    def _split(self, number: int) -> list[_Segment]:
        """Split a request where something happens in it."""
        ask = self.life.asks[number]
        head, content = request(ask, self.life.number, number)
        wire = head + content
        marks = {len(head): "", len(wire): ""}
        if not self.life.pipelined:
            marks |= {1 + int((len(wire) - 2) * cut): "breathe" for cut in ask.cuts}
        if ask.expects and ask.version == "1.1":
            marks[len(head)] = "invite"
        leave = self._leave
        if leave is not None and leave.ask == number:
            if leave.moment is Moment.HEAD:
                marks[1 + int(leave.share * (len(head) - 2))] = "leave"
            elif leave.moment is Moment.BODY and content:
                marks[len(head) + int(leave.share * (len(content) - 1))] = "leave"
        ends = sorted(marks)
        return [
            _Segment(wire[start:end], marks[end], end == len(head))
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def _send(self) -> None:
        while self._segments and not (self.left or self._quiet):
            data, then, head = self._segments.pop(0)
            self.transport.write(data)
            self.heads += head
            if then == "leave":
                self._quiet = True
                self._later(_BREATH, self._go)  # what was written goes out before
                return
            if then == "invite":
                self._awaits_invitation = True
                return
            if then == "breathe":
                self._later(_BREATH, self._send)
                return
        self._look_whether_waiting()

    def _look_whether_waiting(self) -> None:
        """If the request is sent, leave a little later if that was drawn."""
        leave = self._leave
        if leave is None or self._segments:
            return
        waits = self._is_due(Moment.WAITING, self._current) or (
            self._is_due(Moment.BODY, self._current) and not self.life.asks[self._current].framing
        )
        if waits:
            self._later(leave.share * 0.03, self._go_if_waiting)

    def _go_if_waiting(self) -> None:
        leave = self._leave
        if leave is not None and leave.ask == self._current:
            self._go()

    # -- responses ------------------------------------------------------------------------------

    def dataReceived(self, data: bytes) -> None:
        """Take bytes of responses."""
        self._received += len(data)
        leave = self._leave
        due = self._is_due(Moment.RESPONSE, self._current) and not self._awaits_invitation
        if leave is not None and due:
            size = self.life.asks[self._current].part.size
            if self._received > leave.share * (size + 200):
                self._go()
        self.reader.feed(data)
        if self._awaits_invitation and self.reader.invitations:
            self._awaits_invitation = False
            self._send()
        self._go_on()

    def _go_on(self) -> None:
        while not self.left and self.reader.responses and self.reader.responses[-1].whole:
            if not self._has_next():
                return

    def _has_next(self) -> bool:
        """After a whole response, return whether another may be there already."""
        if self._is_due(Moment.END, self._current):
            self._go()
            if self.left:
                return False
        if self._quiet and not self.life.pipelined:
            return False
        if not self.reader.responses[-1].kept or self._current + 1 == len(self.life.asks):
            self._segments = []
            self.left = True
            if not self.life.patient:
                self._close()
            return False
        self._current += 1
        if not self.life.pipelined:
            self._ask()
            return False
        self._announce()
        self._look_whether_waiting()
        return True

    # -- leaving --------------------------------------------------------------------------------

    def _is_due(self, moment: Moment, number: int) -> bool:
        leave = self._leave
        return leave is not None and leave.moment is moment and leave.ask == number

    def _go(self) -> None:
        """Leave as it was drawn."""
        leave, self._leave = self._leave, None
        if leave is None:
            return
        if leave.way is Departure.WAIT:
            self._quiet = True
            return
        if leave.pause:
            self._quiet = True
            self.transport.pauseProducing()
            self._later(leave.pause, lambda: self._come_back(leave.way))
            return
        self.left = True
        self.unsent = pending_bytes(self.transport) > 0
        self._depart(leave.way)

    def _depart(self, way: Departure) -> None:
        if way in (Departure.CLOSE, Departure.PAUSE_CLOSE):
            self._close()
        elif way is Departure.HALF_CLOSE:
            self._shut(socket.SHUT_WR)
        elif way in (Departure.RESET, Departure.PAUSE_RESET):
            raw_transport(self.transport).abortConnection()

    def _come_back(self, way: Departure) -> None:
        """Read again, and leave or go on."""
        self._quiet = False
        self.left = way is not Departure.PAUSE
        self.unsent = pending_bytes(self.transport) > 0
        self.transport.resumeProducing()
        if self.left:
            self._depart(way)
        elif self._begun:
            self._send()
            self._go_on()
        elif not self.life.secure:
            self._ask()

    def _close(self) -> None:
        """Send a FIN now, before queued bytes; every other life sends TLS's close_notify first."""
        self._has_closed = True
        if self.life.number % 2 or pending_bytes(self.transport):
            self._shut(socket.SHUT_RDWR)
        else:
            self.transport.loseConnection()

    def _shut(self, how: int) -> None:
        with suppress(OSError):  # the proxy was first, and nobody has read of it yet
            raw_transport(self.transport).socket.shutdown(how)
