"""Messages that were once accepted although another reader refuses their framing."""

from __future__ import annotations

from typing import NamedTuple


class Past(NamedTuple):
    """A message that shows a fault that was corrected.

    Attributes:
        what: the fault.
        method: of the request.
        wire: a message that shows it.
    """

    what: str
    method: bytes
    wire: bytes


_OK = b"HTTP/1.1 200 OK\r\n"
_POST = b"POST / HTTP/1.1\r\nHost: h\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

_TRAILER = "framing fields may stand in a trailer section"
_EMPTY = "empty members of Transfer-Encoding are overlooked"
_IN_A_TRAILER = _CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n"

RESPONSES = [
    Past(
        "the coding of a response without body is not judged",
        b"HEAD",
        _OK + b"Transfer-Encoding: x\r\n\r\n",
    ),
    Past(
        "the framing of a 1xx response is not judged",
        b"GET",
        b"HTTP/1.1 100 X\r\nContent-Length: 5, 5\r\n\r\n" + _OK + b"Content-Length: 0\r\n\r\n",
    ),
    Past(_TRAILER, b"GET", _OK + _IN_A_TRAILER),
    Past(_EMPTY, b"GET", _OK + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n"),
]

REQUESTS = [
    Past(_TRAILER, b"POST", _POST + _IN_A_TRAILER),
    Past(_EMPTY, b"POST", _POST + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n"),
]
