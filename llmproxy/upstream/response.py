"""A provider's response: its head, and the hold on its body.

A response comes from ``upstream/http1.py`` and is what treq and the gateway see of it.  Nothing is
known here of sockets, pools or providers; how a body ends is a matter of ``http1/framing.py``.
"""

from __future__ import annotations

from typing import Any, Protocol

from twisted.internet.interfaces import IProtocol
from twisted.web.http_headers import Headers
from twisted.web.iweb import UNKNOWN_LENGTH, IResponse
from zope.interface import implementer

from llmproxy.http1.grammar import (
    Fields,
    field_values,
    first_values,
    is_persistent,
    list_tokens,
    parse_known_fields,
    parse_status_line,
)


class Holder(Protocol):
    """The connection that a response comes in on."""

    serving: Response | None
    persistent: bool

    def deliver(self, protocol: IProtocol) -> None:
        """Forward the body."""

    def take_whole(self) -> bytes | None:
        """Take the body, if all of it is here."""

    def abort(self) -> None:
        """Close at once."""


@implementer(IResponse)
class Response:
    """The head of a response, and the hold on its body.

    Attributes:
        code: the status, 100 to 599.
        fields: the header fields as they came, in order, names in lower case.
        first: the first value of each name.
        length: the body's bytes as announced, or ``UNKNOWN_LENGTH``.
        headers: always empty; it stands between treq's decoders and the bytes (ADR-0002).
    """

    __slots__ = ("_connection", "code", "fields", "first", "length", "version")
    phrase = b""
    request = None
    previousResponse = None  # noqa: N815 - IResponse's name
    headers = Headers()

    def __init__(self, connection: Holder, minor: int, code: int, fields: Fields) -> None:
        self._connection = connection
        self.version = (b"HTTP", 1, minor)
        self.code = code
        self.fields = fields
        self.first = first_values(fields)
        self.length: Any = UNKNOWN_LENGTH

    @property
    def keep_alive_hint(self) -> float | None:
        """For how many seconds the provider says it keeps an idle connection, or None.

        From ``Keep-Alive: timeout=5``, which no RFC defines and most servers send.
        """
        if b"keep-alive" not in self.first:
            return None
        for member in list_tokens(field_values(self.fields, b"keep-alive")):
            name, _, seconds = member.partition(b"=")
            if name.strip() == b"timeout" and seconds.strip().isdigit() and len(seconds) < 10:
                return float(seconds)
        return None

    @property
    def is_persistent(self) -> bool:
        """Whether the provider lets the connection be used again (RFC 9112, section 9.3)."""
        return is_persistent(self.version[2] == 1, self.fields, self.first)

    @property
    def is_kept(self) -> bool:
        """Whether the connection may be used again once this response ends; no, when it has."""
        return self._connection.serving is self and self._connection.persistent

    def deliverBody(self, protocol: IProtocol) -> None:
        """Forward the body to ``protocol``, from now on.

        ``dataReceived`` is called with non-empty pieces, split at any point; ``connectionLost``
        once: with ``ResponseDone`` where the body ended as its framing says, else with a
        ``ProxyError``.
        """
        self._connection.deliver(protocol)

    def take_whole(self) -> bytes | None:
        """Take the body, if all of it came together with the head; else return None.

        The response has ended then, as at the end of :meth:`deliverBody`, which is not called.
        Call it as soon as the response is there: a turn later it returns None.
        """
        return self._connection.take_whole()

    def setPreviousResponse(self, response: IResponse) -> None:
        """Refuse: redirects are forwarded, never followed."""
        raise NotImplementedError("redirects are not followed")

    def abort(self) -> None:
        """Close the connection at once; harmless once the response has ended.

        A connection that went back to its pool may be another caller's by now, and stays open.
        """
        if self._connection.serving is self:
            self._connection.abort()


def read_response(connection: Holder, head: bytes) -> Response:
    """Read a response head, without its empty line; a line may be as long as the head is.

    Raises:
        BadMessage: it is not HTTP/1.x.
    """
    lines = head.split(b"\r\n")
    minor, status = parse_status_line(lines[0])
    return Response(connection, minor, status, parse_known_fields(lines[1:]))
