"""Faults that are known and not yet corrected; a fault that is gone must go from here, too.

Messages that have the look of one are left out of the random ones, which would find nothing else.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Known(NamedTuple):
    """A message that we accept although another reader refuses its framing.

    Attributes:
        what: the fault.
        look: found in ``method + wire`` of whatever may show it.
        method: of the request.
        wire: a message that shows it.
    """

    what: str
    look: re.Pattern[bytes]
    method: bytes
    wire: bytes


def _look(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


_OK = b"HTTP/1.1 200 OK\r\n"
_POST = b"POST / HTTP/1.1\r\nHost: h\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"

_TRAILER = _look(rb"\r\n\r\n.*\r\n(content-length|transfer-encoding)[ \t]*:")
_EMPTY_MEMBER = _look(rb"transfer-encoding:[^\r]*,|transfer-encoding:.*transfer-encoding:")
_SPACE = _look(rb"\n[0-9a-f]+[ \t]+;")

ANSWERS = [
    Known(
        "the coding of an answer without body is not judged",
        _look(rb"^HEAD|HTTP/1\.[01] (204|304)"),
        b"HEAD",
        _OK + b"Transfer-Encoding: x\r\n\r\n",
    ),
    Known(
        "the framing of a 1xx answer is not judged",
        _look(rb"HTTP/1\.[01] 1"),
        b"GET",
        b"HTTP/1.1 100 X\r\nContent-Length: 5, 5\r\n\r\n" + _OK + b"Content-Length: 0\r\n\r\n",
    ),
    Known(
        "framing fields may stand in a trailer section",
        _TRAILER,
        b"GET",
        _OK + _CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    ),
    Known(
        "empty members of Transfer-Encoding are overlooked",
        _EMPTY_MEMBER,
        b"GET",
        _OK + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
    ),
    Known(
        "white space may stand behind the size of a chunk",
        _SPACE,
        b"GET",
        _OK + _CHUNKED + b"2 ;a\r\n{}\r\n0\r\n\r\n",
    ),
]

REQUESTS = [
    Known(
        "framing fields may stand in a trailer section",
        _TRAILER,
        b"POST",
        _POST + _CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n",
    ),
    Known(
        "empty members of Transfer-Encoding are overlooked",
        _EMPTY_MEMBER,
        b"POST",
        _POST + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
    ),
    Known(
        "white space may stand behind the size of a chunk",
        _SPACE,
        b"POST",
        _POST + _CHUNKED + b"2 ;a\r\n{}\r\n0\r\n\r\n",
    ),
]


def is_known(faults: list[Known], method: bytes, wire: bytes) -> bool:
    """Tell whether a message has the look of a fault that is known."""
    return any(fault.look.search(method + b" " + wire) for fault in faults)
