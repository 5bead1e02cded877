"""TCP transports that send at once what the kernel takes, and queue the rest.

Twisted queues every write and asks epoll when it may be sent: two more system calls and half a turn
of the reactor for each event of a stream.  Here a write goes straight to the socket while nothing
waits.  As soon as something waits, everything queues behind it in Twisted's own way: writes are
joined, and a producer is paused (ADR-0009).

A connection also begins and ends in fewer steps than Twisted's: no texts for logs are worded that
nobody reads, and the reactor is told once.

In all else these are Twisted's transports.  What is leaned on is the queue of
``twisted.internet.abstract.FileDescriptor`` (``_tempDataBuffer``, ``_tempDataLen``,
``dataBuffer``), ``_aborting``, and what ``tcp.Server`` and ``tcp.Client`` set at their beginning
and ``tcp.Connection`` deletes at its end; ``tests/net/test_tcp.py`` fails when they change.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from twisted.internet import tcp
from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.error import (
    ConnectError,
    ConnectionAborted,
    ConnectionLost,
    getConnectError,
)
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python.failure import Failure

from llmproxy.net.transport import has_sent_all, unsent_bytes

READ_SIZE = 80 * 1024
"""Most bytes of one read; ``bufferSize`` is how many may be queued before a producer is paused."""

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV

_GLANCE = 8
"""Bytes that tell one protocol from another."""

_NO_LINGER = struct.pack("ii", 1, 0)
"""SO_LINGER for a reset instead of a FIN (socket(7))."""


class DirectTransport(tcp.Connection):
    """What an accepted connection and one that we made have in common.

    Attributes:
        drained: called once, when the kernel has taken all that is queued.
        written: bytes that were given to :meth:`write` so far.
        unsent: bytes that the kernel had not sent yet when the connection was lost.
    """

    # What every write looks at.  Twisted's own marks, and attributes in the dictionary of an
    # instance with some forty of them, are slower to find (docs/performance.rst).
    # Those of TLS stand here, too, so that it can begin on a transport that is there.
    __slots__ = (
        *("_flows", "_is_pulled", "_may_wait", "_send", "_ssl", "protocol", "socket"),
        "written",
    )
    drained: Callable[[], object] | None = None
    _reads: bool = False
    _writes: bool = False  # it may be in the reactor's hands for that
    unsent: int = 0

    def __init__(self, *args: Any) -> None:
        self._clear()
        super().__init__(*args)

    def _clear(self) -> None:
        """Begin: nothing is written yet."""
        self._send: Callable[[bytes], int] = len  # stands for a socket that takes and drops all
        self._may_wait = False  # something may be queued
        self._is_pulled = False  # by a producer that must be asked for more
        self.written = 0

    def write(self, data: bytes) -> None:
        """Send what the kernel takes now, and queue the rest."""
        size = len(data)
        self.written += size
        if self._may_wait:
            self._may_wait = bool(self._tempDataLen or self.dataBuffer)
            if self._may_wait:
                FileDescriptor.write(self, data)
                return
        try:
            sent = self._send(data)
        except OSError:
            sent = 0  # full, or broken: then the reactor's own attempt to write ends it
        if sent < size:
            self._may_wait = True
            FileDescriptor.write(self, data[sent:] if sent else data)
        elif self._is_pulled:
            self.startWriting()  # a pull producer is asked for more in the next turn

    @property
    def may_hold(self) -> bool:
        """Whether something may be queued; of most connections this is known at once."""
        return self._may_wait

    def is_sent(self) -> bool:
        """Return whether nothing is queued, and the kernel has sent all that it was given."""
        if self._may_wait and (self._tempDataLen or self.dataBuffer):
            return False
        return has_sent_all(self.socket)

    def writeSequence(self, iovec: Any) -> None:
        """Send pieces together."""
        self.write(b"".join(iovec))

    def writeSomeData(self, data: bytes) -> Any:
        """Send from the queue; an empty one costs no call."""
        return super().writeSomeData(data) if data else 0

    def abortConnection(self) -> None:
        """Reset the connection now; it is reported to the protocol in the next turn."""
        if self.disconnected or self._aborting:
            return
        self.stopReading()
        self.stopWriting()
        self._aborting = True
        self._send = len
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.socket.close()
        reactor: Any = self.reactor
        reactor.callLater(0, self.connectionLost, Failure(ConnectionAborted()))

    def peek(self, call: Callable[[bytes], object]) -> None:
        """Call ``call`` once with the first bytes of what comes next, which stay unread.

        They are read in the same turn, by what stands in the transport's place by then.
        """

        def look() -> Any:
            try:
                data = self.socket.recv(_GLANCE, socket.MSG_PEEK)
            except BlockingIOError:
                return None
            except OSError:
                return CONNECTION_LOST
            if not data:
                return CONNECTION_DONE
            del self.doRead
            call(data)
            return self.doRead() if self._reads and not self._aborting else None

        self.doRead = look  # type: ignore[method-assign]  # of this one alone, until something comes

    def startReading(self) -> None:
        """Read, unless the connection is aborted, or is read already."""
        if not (self._reads or self._aborting):
            self._reads = True
            self.reactor.addReader(self)

    def stopReading(self) -> None:
        """Read no more."""
        if self._reads and not self._aborting:
            self._reads = False
            self.reactor.removeReader(self)

    def startWriting(self) -> None:
        """Write what is queued, unless the connection is aborted."""
        if not self._aborting:
            self._writes = True
            self.reactor.addWriter(self)

    def stopWriting(self) -> None:
        """Write no more."""
        if self._writes and not self._aborting:
            self._writes = False
            self.reactor.removeWriter(self)

    def loseWriteConnection(self) -> None:
        """End our side behind what is queued; where that is nothing, as mostly, at once."""
        waits = self._may_wait and (self._tempDataLen or self.dataBuffer)
        if waits or self._is_pulled or self.producerPaused:
            super().loseWriteConnection()
        elif self.connected and not (self.disconnecting or self._writeDisconnecting):
            self._writeDisconnecting = self._writeDisconnected = True
            self._send = len
            self._closeWriteConnection()

    def doWrite(self) -> Any:
        """Send from the queue, unless the read of the same event has aborted the connection."""
        if self._aborting:
            return None
        why = super().doWrite()
        if self._writeDisconnected:
            self._send = len
        if self.drained is not None and not self._tempDataLen and not self.dataBuffer:
            report, self.drained = self.drained, None
            report()
        return why

    def doRead(self) -> Any:
        """Forward what came in, in one piece."""
        try:
            data = self.socket.recv(READ_SIZE)
        except BlockingIOError:
            return None
        except OSError:
            return CONNECTION_LOST
        if not data:
            return CONNECTION_DONE
        self.protocol.dataReceived(data)
        return None

    def readConnectionLost(self, reason: Failure) -> None:
        """The peer sends no more, or has reset the connection.

        The kernel notes the error of a reset a moment before the end of what comes.  If epoll looks
        in between, Twisted takes the error alone for an end, and what was broken off would look
        whole.  The kernel still knows: behind a FIN a read returns nothing, and here it fails.
        """
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            pass  # TLS has ended, and TCP has not
        except OSError:
            self.connectionLost(Failure(ConnectionLost()))
            return
        super().readConnectionLost(reason)

    def startTLS(self, ctx: Any, normal: bool = True) -> None:
        """Refuse: what is written would pass by Twisted's TLS layer, and leave in the clear.

        Raises:
            RuntimeError: always; TLS from the first byte on is ``net/tls.py``.
        """
        raise RuntimeError("startTLS is not supported: what is written here would not be encrypted")

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Ask ``producer`` for more, or pause it."""
        self._is_pulled = not streaming
        FileDescriptor.registerProducer(self, producer, streaming)  # there is no layer of TLS

    def unregisterProducer(self) -> None:
        """Ask nobody for more."""
        self._is_pulled = False
        super().unregisterProducer()

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over: what is written from here on is dropped."""
        self._send = len
        self._is_pulled = False
        if not self.connected:
            super().connectionLost(reason)  # it was never made, or is reported already
            return
        self.unsent = unsent_bytes(self)
        self.disconnected, self.connected = 1, 0
        producer, self.producer = self.producer, None
        if producer is not None:
            producer.stopProducing()
        self.stopReading()
        self.stopWriting()
        self._closeSocket(not isinstance(reason.value, ConnectionAborted))
        protocol = self.protocol
        del self.protocol, self.socket, self.fileno
        protocol.connectionLost(reason)

    def _closeSocket(self, orderly: bool) -> None:  # noqa: N802 - Twisted's name
        """Close the socket, which ends the connection: no other process has it.

        Twisted's own ends both sides first, to be safe.  Where the peer has reset, that fails.
        """
        with suppress(OSError):  # an abort has closed it
            if not orderly and self.socket.fileno() >= 0:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self.socket.close()


class AcceptedTransport(DirectTransport, tcp.Server):
    """What accepted connections have in common, with TLS and without."""

    def __init__(
        self,
        handle: socket.socket,
        protocol: Any,
        client: Any,
        port: Any,
        number: int,
        reactor: Any,
    ) -> None:
        # Twisted's own is not called: what it sets is set here.
        self._clear()
        handle.setblocking(False)
        self.reactor = reactor
        self.socket, self.fileno, self.protocol = handle, handle.fileno, protocol
        self._tempDataBuffer, self._tempDataLen = [], 0
        if len(client) != 2:
            self._addressType = IPv6Address
        self.server, self.client, self.sessionno = port, client, number
        self.startReading()
        self.connected = 1

    def logPrefix(self) -> str:  # noqa: N802 - Twisted's name
        """Return what stands before a log line of Twisted's that is about this connection."""
        return f"{type(self).__name__},{self.sessionno},{self.client[0]}"

    def __repr__(self) -> str:
        """Return a text for logs."""
        return f"<{self.logPrefix()}>"


class DirectServer(AcceptedTransport):
    """An accepted connection."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._send = self.socket.send


class MadeTransport(DirectTransport, tcp.Client):
    """What connections that we make have in common, with TLS and without.

    Twisted's way to one is an endpoint, a factory that wraps a factory, a protocol that wraps a
    protocol, a connector, a timer and a turn of the reactor.  Here it is :meth:`connect`.

    Args:
        reactor: tells when the kernel has connected.
        make: makes the protocol, once the connection is there.
    """

    def __init__(self, reactor: Any, make: Callable[[], Any]) -> None:
        # Twisted's own is not called: what it sets is set here.
        self._clear()
        self.reactor = reactor
        self._tempDataBuffer, self._tempDataLen = [], 0
        self._make: Callable[[], Any] | None = make
        self._made: Deferred[Any] | None = Deferred(self._give_up)

    def connect(self, family: int, host: str, port: int) -> Deferred[Any]:
        """Begin to connect to an address.

        Returns:
            fires with the protocol once it is connected, perhaps at once.  Cancelling it closes the
            socket.  It fails with ``OSError`` or a ``twisted.internet.error.ConnectError``.
        """
        made: Deferred[Any] = self._made  # type: ignore[assignment]  # until that has fired
        try:
            address: Any = (host, port)
            if family != socket.AF_INET:
                self._addressType: Any = IPv6Address
                found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, _NUMERIC)
                address = found[0][4]  # with the number of its scope
            self.socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self.fileno = self.socket.fileno
            self.addr = self.realAddress = address
            number = self.socket.connect_ex(address)
        except OSError as error:
            self._fail(error)
            return made
        if number in (0, errno.EISCONN):
            self._connected()
        elif number in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            self.doRead = self.doWrite = self._look  # type: ignore[method-assign]  # until then
            self.startWriting()
        else:
            self._fail(getConnectError((number, os.strerror(number))))
        return made

    def _look(self) -> None:
        """The kernel has connected, or has failed to."""
        if (error := self._error()) is not None:
            self._fail(error)
        elif self._make is not None:
            del self.doRead, self.doWrite
            self.stopWriting()
            self._connected()

    def _error(self) -> Exception | None:
        """Return why the kernel could not connect, or None."""
        number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return getConnectError((number, os.strerror(number))) if number else None

    def _connected(self) -> None:
        """The connection is there: let a protocol have it."""
        make: Any = self._make
        made: Any = self._made
        self._make = self._made = None
        self.connected = 1
        self.protocol = protocol = make()
        self.startReading()
        protocol.makeConnection(self)
        made.callback(protocol)

    def _fail(self, error: Exception) -> None:
        """There will be no connection."""
        made, self._made = self._made, None
        self._close_attempt()
        if made is not None:
            made.errback(Failure(error))

    def _give_up(self, _: Deferred[Any]) -> None:
        self._made = None
        self._close_attempt()

    def _close_attempt(self) -> None:
        self._make = None
        self.disconnected = 1
        self.stopWriting()
        if "fileno" in vars(self):
            self.socket.close()
            del self.socket, self.fileno
        if "doRead" in vars(self):  # which leads back here
            del self.doRead, self.doWrite

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over; or was never made, which whoever waits for it hears."""
        if self._make is not None:
            self._fail(self._error() or ConnectError(string=reason))
        elif self.connected:
            super().connectionLost(reason)

    def logPrefix(self) -> str:  # noqa: N802 - Twisted's name
        """Return what stands before a log line of Twisted's that is about this connection."""
        return f"{type(self).__name__},client"


class DirectClient(MadeTransport):
    """A connection that we make."""

    def _connected(self) -> None:
        self._send = self.socket.send
        super()._connected()
