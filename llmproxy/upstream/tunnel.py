"""A tunnel through a parent proxy: the CONNECT, and the parent's response (RFC 9110, 9.3.6).

The head of the response is read as strictly as a provider's.  A refusal, and what is no response,
are failures to reach the provider with causes of their own: an operator sees which of the two hops
is at fault.  Which bytes go through the tunnel is not known here (ADR-0028).
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from llmproxy.config import ParentProxy
from llmproxy.errors import ProxyError, upstream_unreachable
from llmproxy.http1.grammar import BadMessage, Fields, field_values, parse_fields, parse_status_line
from llmproxy.net.transport import pending_bytes

_WANTS_CREDENTIALS = (401, 407)
"""Tinyproxy responds to a wrong password with 401."""

_BEGIN = b"HTTP/"


def connect_request(host: str, port: int, parent: ParentProxy) -> bytes:
    """Return the head that asks ``parent`` for a tunnel; ``host`` has no brackets."""
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if parent.credential is not None:
        basic = b64encode(parent.credential.reveal().encode("utf-8")).decode("ascii")
        lines.append(f"Proxy-Authorization: Basic {basic}")
    return "\r\n".join([*lines, "\r\n"]).encode("ascii")


class Tunnel(Protocol):
    """A connection to a parent proxy, until the tunnel is there.

    Args:
        max_head: most bytes of the parent's response.
        may_speak_first: what is reached may send before it is sent anything.  If so, nothing is
            read behind the parent's response until somebody else has the transport.

    Attributes:
        early: what has come through the tunnel so far.
    """

    def __init__(self, max_head: int, *, may_speak_first: bool = False) -> None:
        self._left = max_head
        self._may_speak_first = may_speak_first
        self.early = b""
        self._received = b""
        self._opened: Deferred[None] | None = None

    def ask(self, request: bytes) -> Deferred[None]:
        """Send the CONNECT.

        Returns:
            fires when the parent has opened the tunnel.  Unless the far side may speak first,
            nothing has come through it yet: neither a server of TLS nor one of HTTP does.
            Cancelling it closes the socket at once.  It fails with ``ProxyError``, and the socket
            is closed then.
        """
        self._opened = Deferred(lambda _: self.abort())
        self._transport.write(request)
        return self._opened

    def abort(self) -> None:
        """Close the socket at once."""
        self._transport.abortConnection()

    def connectionMade(self) -> None:
        """Nothing is sent yet: another address may be faster."""
        self._transport: Any = self.transport

    def dataReceived(self, data: bytes) -> None:
        """Take bytes of the response, split at any point."""
        if self._opened is None or self._opened.called:
            self.early += data if self._may_speak_first else b""
            return  # it is being closed
        self._received += data
        try:
            is_open = self._is_open()
        except BadMessage as error:
            self._fail(self._opened, _failure("protocol", f"sent no valid response: {error}"))
        except ProxyError as refusal:
            self._fail(self._opened, refusal)
        else:
            if is_open:
                if self._may_speak_first:
                    self._transport.pauseProducing()
                self._opened.callback(None)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The parent left before its response was whole."""
        if self._opened is not None and not self._opened.called:
            text = f"closed the connection before it responded: {reason.getErrorMessage()}"
            self._opened.errback(_failure("protocol", text))

    def _fail(self, opened: Deferred[None], error: ProxyError) -> None:
        self.abort()
        opened.errback(error)

    def _is_open(self) -> bool:
        """Return whether the tunnel is there; no, as long as the response is not whole.

        Raises:
            BadMessage: it is no response.
            ProxyError: the parent refuses.
        """
        while (end := self._end_of_head()) >= 0:
            line, *lines = self._received[:end].split(b"\r\n")
            self._received = self._received[end + 4 :]
            self._left -= end + 4  # a 1xx counts, too
            _, status = parse_status_line(line)
            fields = parse_fields(lines, longest=end)
            if status >= 300:
                raise _refusal(status, line, fields)
            if status >= 200:
                # A Content-Length says nothing here: no content follows (RFC 9110, 9.3.6).
                if self._received and not self._may_speak_first:
                    raise BadMessage("bytes behind it")
                if pending_bytes(self._transport):
                    raise BadMessage("it came before it was asked for")
                self.early = self._received
                return True
            if status == 101:
                raise BadMessage("a protocol switch that nobody asked for")
        return False

    def _end_of_head(self) -> int:
        """Return where the head ends, or -1 where its end has not come."""
        if not _BEGIN.startswith(self._received[: len(_BEGIN)]):
            raise BadMessage("it is not HTTP")  # in which no end of a head may ever come
        end = self._received.find(b"\r\n\r\n")
        if (end if end >= 0 else len(self._received) - 3) > self._left:
            raise BadMessage("its head is longer than limits.response_head")
        return end


def _refusal(status: int, line: bytes, fields: Fields) -> ProxyError:
    words = f"responded with {_shown(line)}"
    if status not in _WANTS_CREDENTIALS:
        own = b" ".join(field_values(fields, b"x-squid-error"))
        return _failure("refused", f"{words} {_shown(own)}".rstrip())
    schemes = field_values(fields, b"proxy-authenticate")
    wanted = b", ".join(one.partition(b" ")[0] for one in schemes)
    return _failure("auth", f"{words}, and asks for {_shown(wanted) or 'nothing else'}")


def _shown(text: bytes) -> str:
    return text[:120].decode("latin-1")


def _failure(cause: str, text: str) -> ProxyError:
    return upstream_unreachable(f"the parent proxy {text}", cause=f"parent_proxy_{cause}")
