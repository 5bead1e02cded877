"""TLS straight on the socket: OpenSSL reads and writes it, without a copy of every byte between.

Twisted's layer feeds OpenSSL through memory, which costs as much as the rest of an event.  Here
pyOpenSSL's ``Connection(context, socket)`` stands in the place of ``recv`` and ``send`` below the
queue of ``net/tcp.py`` (ADR-0009).  What its safety rests on::

    handshake     nothing of the protocol's is sent before it; what is written waits in the queue
    reading       one record is one read; OpenSSL keeps nothing back that epoll would not report
    a full kernel a record that OpenSSL could not send stays first in the queue and is tried again
                  with the same bytes (SSL_write(3), "moving write buffer")
    the end       a peer's close_notify is an end, and gets ours; a FIN without one is a break
    our end       close_notify and FIN, then the peer's; an abort is a reset, without either
    renegotiation refused by the contexts; a key update is OpenSSL's own affair

pyOpenSSL's private ``_ssl``, ``_raise_ssl_error`` and ``_util`` are leaned on for reading and
writing; ``tests/net/test_tls.py`` fails when they change (ADR-0011).

To a protocol that implements ``IHandshakeListener`` it is reported that the handshake is done.  No
certificate, provider or client is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from OpenSSL import SSL
from OpenSSL._util import ffi, lib
from twisted.internet.abstract import FileDescriptor
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.python.failure import Failure

from llmproxy.net.tcp import (
    READ_SIZE,
    AcceptedTransport,
    DirectClient,
    DirectServer,
    DirectTransport,
    MadeTransport,
)

_RECORD = 16384
"""Most bytes of one record (RFC 8446, section 5.1)."""

_BULK = _RECORD // 2
"""A record of so many bytes rarely comes alone: the next one is read in the same turn."""

_MOST = READ_SIZE // _RECORD
"""Most records of one read, so that other connections have their turn."""

_read_record, _write_record = lib.SSL_read, lib.SSL_write
_BUFFER = ffi.new("char[]", _RECORD)
_VIEW = ffi.buffer(_BUFFER)


def _take_nothing(data: bytes) -> int:
    """Stand for ``send`` until the handshake is done."""
    return 0


class TlsTransport(DirectTransport):
    """What an accepted connection and one that we made have in common.

    Attributes:
        tls: OpenSSL's side of the connection.
        handshake_done: the handshake is done.
        verdict: what the handshake found out, if the maker of ``tls`` keeps that here.
    """

    # What every read looks at, of the slots: ``_flows`` says that nothing is in its way.
    __slots__ = ()
    tls: SSL.Connection
    verdict: Any = None
    handshake_done: bool = False
    _reading_waits: bool = False
    _writing_waits: bool = False
    _parted: bool = False
    _has_ended: bool = False  # the peer sends no more

    # -- the handshake --------------------------------------------------------------------------

    def _begin(self, tls: SSL.Connection) -> None:
        """Hold back what is written until the handshake is done."""
        self.tls, self._ssl = tls, tls._ssl
        self._flows = False
        self._send = _take_nothing

    def _shake(self) -> Any:
        """Go on with the handshake; return why the connection is lost, where it is."""
        try:
            self.tls.do_handshake()
        except SSL.WantReadError:
            return None
        except SSL.WantWriteError:
            self.startWriting()
            return None
        except SSL.SysCallError:
            return CONNECTION_LOST
        except SSL.Error as error:
            return error
        self.handshake_done, self._flows = True, not self.disconnecting
        self._send = self._send_records
        if self.disconnecting:
            self.stopReading()  # until all is sent, as behind any close
        if self._tempDataLen or self.disconnecting or self._writeDisconnecting:
            self.startWriting()
        if IHandshakeListener.providedBy(self.protocol):
            self.protocol.handshakeCompleted()
        return None

    # -- in -------------------------------------------------------------------------------------

    def doRead(self) -> Any:
        """Forward the content of what came in, in one piece."""
        if self._flows:
            # pyOpenSSL's recv() makes a buffer of its own for each record; what is not a record
            # goes its way.  All reads are of one thread, and done with the buffer before the next.
            size = _read_record(self._ssl, _BUFFER, _RECORD)
            if 0 < size < _BULK:
                self.protocol.dataReceived(_VIEW[:size])
                return None
            return self._read_more(size)
        if not self.handshake_done:
            return self._shake()  # epoll reports again what came behind it
        self._flows = not self.disconnecting
        if self._writing_waits:
            self._writing_waits = False
            self.startWriting()
        return self._read_more(_read_record(self._ssl, _BUFFER, _RECORD))

    def _read_more(self, size: int) -> Any:
        """Read on, from what reading the first record returned."""
        pieces: list[bytes] = []
        why: Any = None
        try:
            while True:
                if size <= 0:
                    self.tls._raise_ssl_error(self._ssl, size)
                pieces.append(_VIEW[:size])
                if size < _BULK or len(pieces) == _MOST:
                    break
                size = _read_record(self._ssl, _BUFFER, _RECORD)
        except SSL.WantReadError:
            pass
        except SSL.WantWriteError:
            self._reading_waits = True
            self.startWriting()
        except SSL.ZeroReturnError:
            why = CONNECTION_DONE  # ours follows when the connection ends: something may be queued
        except SSL.Error:
            why = CONNECTION_LOST
        if pieces and not self.disconnecting:
            self.protocol.dataReceived(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        return None if self._aborting else why

    # -- out ------------------------------------------------------------------------------------

    def _send_records(self, data: bytes) -> int:
        """Send what the kernel takes; where the connection is broken, nothing: doWrite ends it."""
        size = len(data)
        if 0 < size <= _RECORD:
            # pyOpenSSL's send() makes a view of the bytes, and looks for the error of a success.
            sent: int = _write_record(self._ssl, data, size)
            if sent > 0:
                return sent
            self._why_not_sent(sent)
            return 0
        result = self.writeSomeData(data)
        return result if isinstance(result, int) else 0

    def writeSomeData(self, data: bytes) -> Any:
        """Send records as long as the kernel takes them; return how many bytes, or why not."""
        view = memoryview(data)
        end = min(len(view), self.SEND_LIMIT)
        sent = 0
        while sent < end:
            record = view[sent : sent + _RECORD]
            size = _write_record(self._ssl, ffi.from_buffer(record), len(record))
            if size <= 0:
                return self._why_not_sent(size) or sent
            sent += size
        return sent

    def _why_not_sent(self, result: int) -> Any:
        """Return why the connection is lost, or None where it goes on: OpenSSL did not write."""
        try:
            self.tls._raise_ssl_error(self._ssl, result)
        except SSL.WantWriteError:
            pass
        except SSL.WantReadError:
            self._writing_waits, self._flows = True, False
            self.stopWriting()
        except SSL.Error:
            return CONNECTION_LOST
        return None

    def doWrite(self) -> Any:
        """The kernel takes bytes: go on with what waited for that."""
        if self._aborting:
            return None  # by the read of the same event: the descriptor may be another's by now
        if not self.handshake_done:
            self.stopWriting()
            return self._shake()
        if self._reading_waits:
            self._reading_waits = False
            why = self.doRead()
            if why is not None or self._aborting or not self.connected:  # type: ignore[redundant-expr]  # reading may abort
                return why
        return super().doWrite()

    # -- the end --------------------------------------------------------------------------------

    def loseConnection(self, *args: Any) -> None:
        """Send what is queued and close_notify, then close; before the handshake, drop it."""
        if not self.handshake_done and not self._tempDataLen:
            self.abortConnection()
        else:
            self._flows = False
            super().loseConnection(*args)
            if self.connected and not self.handshake_done:
                self.startReading()  # the handshake goes on

    def loseWriteConnection(self) -> None:
        """End our side by close_notify, behind the handshake and what is queued."""
        FileDescriptor.loseWriteConnection(self)

    def connectionLost(self, reason: Failure) -> None:
        """The connection is over; an orderly end has our close_notify, too."""
        orderly = self.handshake_done and not self._parted and not self._aborting
        if orderly and isinstance(reason.value, ConnectionDone) and hasattr(self, "socket"):
            self._close_notify()
        super().connectionLost(reason)

    def _postLoseConnection(self) -> Any:
        """All is sent: end our side, and wait for the peer's."""
        self._writeDisconnected = True  # what is written from here on is dropped
        if self._part():
            if self._has_ended:
                return CONNECTION_DONE
            self.startReading()
        return None

    def readConnectionLost(self, reason: Failure) -> None:
        """The peer has ended its side."""
        self._has_ended = True
        super().readConnectionLost(reason)

    def _closeWriteConnection(self) -> None:
        if not self._parted and self._part():
            half_closeable: Any = IHalfCloseableProtocol(self.protocol, None)
            if half_closeable is not None:
                half_closeable.writeConnectionLost()

    def _part(self) -> bool:
        """Send our close_notify and FIN, once; return whether the kernel has taken them."""
        if not self._parted:
            if not self._close_notify():
                self.startWriting()  # then this is called again
                return False
            self._parted = True
            with suppress(OSError):  # the peer was faster
                self.socket.shutdown(1)
        return True

    def _close_notify(self) -> bool:
        """Send our close_notify; return False where the kernel is full."""
        try:
            self.tls.shutdown()
        except SSL.WantWriteError:
            return False
        except SSL.Error:
            pass  # the connection is broken, which reading finds
        return True


class TlsServer(TlsTransport, AcceptedTransport):
    """An accepted connection.

    Args:
        tls: makes OpenSSL's side of a connection, on its ``socket``.
    """

    def __init__(self, tls: Callable[[Any], SSL.Connection], *args: Any) -> None:
        super().__init__(*args)
        self._begin(tls(self))
        self.tls.set_accept_state()


class TlsClient(TlsTransport, MadeTransport):
    """A connection that we make.

    Args:
        tls: makes OpenSSL's side of a connection, on its ``socket``.
    """

    def __init__(self, tls: Callable[[Any], SSL.Connection], *args: Any) -> None:
        self._make_tls = tls
        super().__init__(*args)

    def _connected(self) -> None:
        self._begin(self._make_tls(self))
        self.tls.set_connect_state()
        super()._connected()
        if self.connected and not self._aborting:
            self.startWriting()  # the handshake begins in the next turn, where it may fail


def begin_tls(transport: DirectClient | DirectServer, tls: Callable[[Any], SSL.Connection]) -> None:
    """Begin TLS on a connection that was plain so far, as the side that made it or accepted it.

    The transport stays, and is of another class from here on: nobody has one left that writes in
    the clear, and the reactor need not learn of another.

    Args:
        transport: nothing waits in its queue.
        tls: makes OpenSSL's side of a connection, on its ``socket``.
    """
    accepted, changed = isinstance(transport, DirectServer), cast(Any, transport)
    changed.__class__ = TlsServer if accepted else TlsClient
    changed._begin(tls(changed))
    if accepted:
        changed.tls.set_accept_state()
    else:
        changed.tls.set_connect_state()
        if changed.connected and not changed._aborting:
            changed.startWriting()  # the handshake begins in the next turn, where it may fail
