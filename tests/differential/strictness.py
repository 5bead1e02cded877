"""Where readers may differ: what we refuse on purpose, and what others refuse not for framing.

Each strictness of ours has its reason and a message that shows it; nothing else may be refused that
both others accept.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tests.differential.verdict import Verdict, framing_error


class Strict(NamedTuple):
    """Something that we refuse although another reader takes it.

    Attributes:
        words: how our refusal begins.
        reason: why, with its source.
        wire: a message that shows it.
    """

    words: str
    reason: str
    wire: bytes


_OK = b"HTTP/1.1 200 OK\r\n"
_LENGTH = b"Content-Length: 2\r\n\r\n{}"
_CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
_LAST = b"0\r\n\r\n"
_POST = b"POST / HTTP/1.1\r\nHost: h\r\n"

_TWICE = "the Content-Length is malformed or given twice"
_BESIDE = "Transfer-Encoding beside a Content-Length, or in HTTP/1.0"
_CODING = "a transfer coding other than chunked"
_NAME = "a header field's name is malformed"
_VALUE = "a header field's value holds a control character"
_SIZE = "a chunk's size line is malformed"
_LONG_LINE = "a line of the chunked coding is too long"
_STATUS = "the status line is malformed"
_INTERIM = "a protocol switch that nobody asked for, or endless 1xx responses"
_REQUEST = "The request is not acceptable: "
_BODY = "The body is bad: "

_BOTH: list[tuple[str, str, bytes]] = [
    (
        "a tab beside a transfer coding",
        "RFC 9110, 5.6.3, has it for white space, but llhttp may then see no chunks",
        b"Transfer-Encoding:\t chunked\r\n\r\n0\r\n\r\n",
    ),
    (_TWICE, "RFC 9112, 6.3: a repeated length may be refused", b"Content-Length: 2\r\n" + _LENGTH),
    (_TWICE, "RFC 9112, 6.3: so may a list of lengths", b"Content-Length: 2, 2\r\n\r\n{}"),
    (_TWICE, "RFC 9110, 8.6: sizes are bounded: 18 digits", b"Content-Length: %019d\r\n\r\n{}" % 2),
    (
        _BESIDE,
        "RFC 9112, 6.1: two framings are an attack",
        b"Content-Length: 5\r\n" + _CHUNKED + _LAST,
    ),
    (
        _CODING,
        "RFC 9112, 6.1: unknown codings",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    ),
    (_NAME, "RFC 9112, 5.2: folded lines are refused", b"a: b\r\n c\r\n" + _LENGTH),
    (_VALUE, "RFC 9110, 5.5: so are control characters", b"a: \x01\r\n" + _LENGTH),
    (_VALUE, "RFC 9112, 2.2: a bare LF may end a line; it does not here", b"a: b\n" + _LENGTH),
    ("more than 128 header fields", "RFC 9110, 5.4: bounds", b"a: b\r\n" * 128 + _LENGTH),
]
_CODED: list[tuple[str, str, bytes]] = [
    (_SIZE, "RFC 9112, 7.1.1: no control character", b"2;\x01\r\n{}\r\n0\r\n\r\n"),
    (_SIZE, "RFC 9112, 7.1: no white space behind a size", b"2 \r\n{}\r\n0\r\n\r\n"),
    (_LONG_LINE, "RFC 9112, 7.1.1: bounds: 1 KiB", b"0;" + b"a" * 1023 + b"\r\n\r\n"),
    (
        "a trailer section longer than",
        "RFC 9110, 5.4: 16 KiB",
        b"0\r\n" + b"a: b\r\n" * 5000 + b"\r\n",
    ),
    (_VALUE, "RFC 9110, 5.5: in trailers, too", b"0\r\na: \x01\r\n\r\n"),
    (
        "a framing field in a trailer section",
        "RFC 9110, 6.5.1: nor one that routes",
        b"0\r\nHost: h\r\n\r\n",
    ),
]

RESPONSES = [
    *(Strict(words, reason, _OK + wire) for words, reason, wire in _BOTH),
    *(Strict(words, reason, _OK + _CHUNKED + wire) for words, reason, wire in _CODED),
    Strict(
        _BESIDE,
        "RFC 9112, 6.1: in HTTP/1.0 the framing is faulty",
        b"HTTP/1.0 200 X\r\n" + _CHUNKED + b"0\r\n\r\n",
    ),
    Strict(_STATUS, "RFC 9110, 15: 100 to 599", b"HTTP/1.1 600 X\r\n" + _LENGTH),
    Strict(_STATUS, "RFC 9112, 4: no control character", b"HTTP/1.1 200 O\x7f\r\n" + _LENGTH),
    Strict(_STATUS, "RFC 9112, 2.3: 1.0 and 1.1", b"HTTP/1.2 200 X\r\n" + _LENGTH),
    Strict(_STATUS, "RFC 9112, 2.2: empty lines stand before requests", b"\r\n" + _OK + _LENGTH),
    Strict(
        "a Transfer-Encoding in a 1xx response",
        "RFC 9112, 6.1: a server must not send it",
        b"HTTP/1.1 103 X\r\n" + _CHUNKED + _OK + _LENGTH,
    ),
    Strict(_INTERIM, "bounds: 16 of them", b"HTTP/1.1 102 X\r\n\r\n" * 17 + _OK + _LENGTH),
]

REQUESTS = [
    *(Strict(_REQUEST + words, reason, _POST + wire) for words, reason, wire in _BOTH),
    *(Strict(_BODY + words, reason, _POST + _CHUNKED + wire) for words, reason, wire in _CODED),
    Strict(
        _REQUEST + _BESIDE,
        "RFC 9112, 6.1: in HTTP/1.0 the framing is faulty",
        b"POST / HTTP/1.0\r\n" + _CHUNKED + b"0\r\n\r\n",
    ),
    Strict(
        _REQUEST + "a line does not end with CRLF",
        "RFC 9112, 2.2: a bare LF may end a line; it does not here",
        b"POST / HTTP/1.1\nHost: h\nContent-Length: 2\n\n{}",
    ),
    Strict(
        _REQUEST + "the Host field is malformed",
        "RFC 9112, 3.2: 400",
        b"POST / HTTP/1.1\r\nHost: a/b\r\n" + _LENGTH,
    ),
    Strict(
        _REQUEST + "exactly one Host field is needed",
        "RFC 9112, 3.2: 400",
        b"POST / HTTP/1.1\r\n" + _LENGTH,
    ),
    Strict(
        _REQUEST + "the request line is malformed",
        "RFC 9112, 3.2: a fragment is no part of a target",
        b"POST /#a HTTP/1.1\r\nHost: h\r\n" + _LENGTH,
    ),
    Strict(
        _REQUEST + "only HTTP/1.0 and HTTP/1.1 are served",
        "RFC 9110, 15.6.6: 505",
        b"POST / HTTP/2.0\r\nHost: h\r\n" + _LENGTH,
    ),
    Strict(
        "This expectation cannot be met",
        "RFC 9110, 10.1.1: 417",
        _POST + b"Expect: x\r\n" + _LENGTH,
    ),
]

THEIR_OWN = (
    # Where an extension's end is, all agree; llhttp also wants its inside to be well formed, and
    # lacks the white space of RFC 9112, section 7.1.1.
    "llhttp: Invalid character in chunk extensions",
    # llhttp has a list of methods; every token is one (RFC 9110, section 9.1).
    "llhttp: Invalid method encountered",
    "llhttp: Expected space after method",
    # llhttp reads some targets as URLs; what is behind a target is the same to all.
    "llhttp: Unexpected char in url",
    "llhttp: Unexpected start char in url",
    "llhttp: Invalid characters in url",
    # httptools reads nothing behind the head of a request that may switch protocols.
    "llhttp: an upgrade",
    # RFC 9112, section 2.2: an empty line before a request should be ignored.
    "h11: no request line received",
)
"""How refusals of others begin that are not for framing."""

_PADDED = re.compile(r"h11: illegal chunk header: bytearray\(b.[0-9A-Fa-f]+(?: |\\t)+;")
"""Neither h11 nor llhttp knows the white space before an extension (RFC 9112, section 7.1.1)."""

_OF_A_SIZE = ("h11: illegal chunk header", "llhttp: Invalid character in chunk size")


def faults(ours: Verdict, others: tuple[Verdict, ...], ours_alone: list[Strict]) -> list[str]:
    """Return how our reading differs from the others' where it must not.

    Args:
        ours_alone: what we may refuse although all others accept it.
    """
    is_padded = any(_PADDED.match(other.why) for other in others)
    their_own = (*THEIR_OWN, *_OF_A_SIZE) if is_padded else THEIR_OWN
    found = [framing_error(ours, other, their_own) for other in others]
    if not ours.whole and all(other.whole for other in others):
        strict = any(ours.why.startswith(strict.words) for strict in ours_alone)
        found += [] if strict else [f"refused what both read: {ours.why}"]
    return [fault for fault in found if fault]
