"""The bytes of a life: the requests of its client, and the steps of its provider.

Every body spells its life and its request, so that a body at another client is recognized at once.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from tests.support.lives.plan import (
    BODY_LIMIT,
    BROKEN_BODY,
    KEY,
    MALFORMED,
    Kind,
    Part,
    RequestFacts,
)
from tests.support.sockets import chunked

FORGED = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nX-Forged: 1\r\n\r\nforged"
"""Bytes that a provider sends after a whole response; they belong to no client."""

LAST = b"0\r\n\r\n"
_BEGUN = 4000
"""Bytes that a client sends of a body that is refused for its length."""

_RECORD = 16384
"""Bytes of a full TLS record: the bytes after them are read separately."""

_FOLLOWS = b"\r\nHost: h\r\n\r\n"
MALFORMED_HEADS = (
    b"GET /plain HTTP/1.1\r\n\r\n",
    b"GET /plain HTTP/1.1\r\nHost: h\r\nHost: h\r\n\r\n",
    b"GET /plain HTTP/1.1\r\nHost: h\r\n folded: 1\r\n\r\n",
    b"GET /plain HTTP/1.1\nHost: h\n\n",
    b"GET /plain HTTP/2.0" + _FOLLOWS,
    b"GET  /plain HTTP/1.1" + _FOLLOWS,
    b"POST /plain HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /plain HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"POST /plain HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"GET /" + b"a" * 40_000 + b" HTTP/1.1" + _FOLLOWS,
    b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: 1234567890\r\n" * 3000 + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
)
_GARBLED = (
    b"HTTP/1.1 2_00 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    b"220 mail.example.com ESMTP\r\n\r\n",
)


class Act(Enum):
    """The act of the provider after it has written."""

    GO_ON = "go on"
    FIN = "fin"
    RESET = "reset"
    NEXT = "next"  # the response is whole: another request may come


class Step(NamedTuple):
    """One thing that the provider does, ``after`` seconds."""

    after: float
    data: bytes
    act: Act = Act.GO_ON


def path(ask: RequestFacts, life: int, number: int) -> str:
    """Return the target of a life's request, which names it."""
    route = "nowhere" if ask.flaw == "route" else ask.route
    return f"/{route}/{life}/{number}" + ("/v1/chat/completions" if ask.known else "")


def method(ask: RequestFacts) -> str:
    """Return the method that is sent."""
    return "TRACE" if ask.flaw == "method" else ask.method


def body(ask: RequestFacts, life: int, number: int) -> bytes:
    """Return the body of a request."""
    if not ask.framing:
        return b""
    if ask.media == "application/json":
        opening = b'{"model":"m","pad":"'
        return opening + _spell(b"^", life, number, max(ask.size - len(opening) - 2, 0)) + b'"}'
    return _spell(b">", life, number, ask.size)


def request(ask: RequestFacts, life: int, number: int) -> tuple[bytes, bytes]:
    """Return head and body of a request as its client writes them."""
    if ask.flaw == MALFORMED:
        return MALFORMED_HEADS[ask.variant % len(MALFORMED_HEADS)], b""
    content = body(ask, life, number)
    key = "unknown" if ask.flaw == "key" else KEY
    lines = [f"{method(ask)} {path(ask, life, number)} HTTP/{ask.version}", "Host: proxy"]
    lines.append(f"Authorization: Bearer {key}" if life % 2 else f"x-llmproxy-key: {key}")
    if ask.framing:
        lines.append(f"Content-Type: {ask.media}")
    if ask.framing == "length":
        lines.append(f"Content-Length: {len(content)}")
    elif ask.framing:
        lines.append("Transfer-Encoding: chunked")
    if ask.flaw == "expectation":
        lines.append("Expect: a-miracle")
    elif ask.expects:
        lines.append("Expect: 100-continue")
    if ask.closes:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n", _framed_body(ask, content)


def _framed_body(ask: RequestFacts, content: bytes) -> bytes:
    if ask.framing != "chunked":
        return content[:_BEGUN] if len(content) > BODY_LIMIT else content
    third = len(content) // 3 or len(content)
    chunks = chunked(*(content[at : at + third] for at in range(0, len(content), third)))
    return chunks + (b"zz\r\n" if ask.flaw == "bad_chunk" else LAST)


def content(part: Part, life: int, number: int) -> bytes:
    """Return the content of the provider's response, as far as it means to send it."""
    whole = _spell(b"<", life, number, _fitted(part).size)
    return whole[: part.cut] if part.kind in BROKEN_BODY else whole


def steps(ask: RequestFacts, life: int, number: int) -> list[Step]:
    """Return the steps of the provider for a request."""
    part = _fitted(ask.part)
    if part.kind is Kind.SILENT:
        return []
    fault = Act.RESET if part.abrupt else Act.FIN
    if part.kind is Kind.GARBLED:
        return [Step(part.gap, _GARBLED[part.variant % len(_GARBLED)])]
    head = _interim(part) + _response_head(part)
    if part.kind is Kind.DROPPED:
        return [Step(part.gap, head[: part.cut], fault)]
    sent = content(part, life, number)
    first, *rest = _pieces(part, b"" if ask.method == "HEAD" else sent)
    played = [Step(part.gap, head + first), *(Step(part.gap, piece) for piece in rest)]
    if part.kind is Kind.HANGING:
        return played
    if part.kind is Kind.SHORT:
        return [*played, Step(max(part.gap, 0.002), b"", fault)]
    if part.kind is Kind.BAD_CHUNK:
        return [*played, Step(0.0, b"zz\r\n")]
    return _with_end(ask, played)


def _with_end(ask: RequestFacts, played: list[Step]) -> list[Step]:
    """Add the end of a whole response to the last step."""
    part = ask.part
    after, data, _ = played[-1]
    if part.framing == "chunked" and ask.method != "HEAD" and part.status != 204:
        data += LAST
    if part.kind is Kind.EXTRA:
        data += FORGED
    ends = part.closes or part.deserts or part.framing == "close"
    return [*played[:-1], Step(after, data, Act.FIN if ends else Act.NEXT)]


def _fitted(part: Part) -> Part:
    """Let every other response with bytes behind it fill a TLS record, so that they stand alone."""
    plain = part.framing == "length" and part.status != 204
    if part.kind is not Kind.EXTRA or part.variant % 2 or not plain:
        return part
    part = part._replace(size=_RECORD // 2, pieces=1)
    rest = _RECORD - len(_interim(part) + _response_head(part))
    fitted = part._replace(size=rest)
    return fitted._replace(size=_RECORD - len(_interim(part) + _response_head(fitted)))


def _interim(part: Part) -> bytes:
    return b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * part.interim


def _response_head(part: Part) -> bytes:
    lines = [f"HTTP/1.1 {part.status} Whatever", f"Content-Type: {part.media}"]
    if part.framing == "length" and part.status != 204:
        lines.append(f"Content-Length: {part.size}")
    elif part.framing == "chunked" and part.status != 204:
        lines.append("Transfer-Encoding: chunked")
    if part.closes:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def _pieces(part: Part, sent: bytes) -> list[bytes]:
    size = -(-len(sent) // part.pieces) or 1
    pieces = [sent[at : at + size] for at in range(0, len(sent), size)] or [b""]
    if part.framing == "chunked" and part.status != 204:
        return [chunked(piece) if piece else b"" for piece in pieces]
    return pieces


def _spell(mark: bytes, life: int, number: int, size: int) -> bytes:
    word = b"%b%d.%d " % (mark, life, number)
    return (word * (size // len(word) + 1))[:size]
