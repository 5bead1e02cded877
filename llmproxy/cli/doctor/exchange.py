"""One request over a socket of its own, and when each byte of its response came.

No HTTP client stands between the kernel and the notes: each read is noted with its time, before
anything is made of it.  Framing is read by the grammar of ``http1/``, which repairs nothing.  The
time is bounded by a deadline for the whole exchange, the memory by :data:`MOST_NOTES`, and the
bytes themselves are not kept.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import time
import zlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Self, TypeVar

import msgspec

from llmproxy.cli.doctor.target import Target
from llmproxy.http1.framing import BodyReader, LengthReader, response_body
from llmproxy.http1.grammar import (
    BadMessage,
    Fields,
    first_values,
    parse_fields,
    parse_status_line,
)
from llmproxy.http1.headers import is_ndjson, media_type
from llmproxy.stream.events import Event as Framed
from llmproxy.stream.events import Framing, Lines, ServerSentEvents

T = TypeVar("T")

MOST_NOTES = 50_000
"""Most reads, and most events, of one exchange; what comes later is not read."""

_MOST_BYTES = 256 * 1024**2
_MOST_HEAD = 64 * 1024
_MOST_EVENT = 1024**2
_MOST_INTERIM = 10
_EXCERPT = 2048
_READ = 65536

_TRUST_WORDS = {
    10: "the certificate has expired",
    9: "the certificate is not valid yet",
    18: "the certificate is self-signed, and not trusted here",
    19: "the chain ends in a self-signed certificate that is not trusted here",
    20: "the certificate's issuer is not known here; the chain may lack an intermediate",
    21: "the certificate's issuer is not known here; the chain may lack an intermediate",
    62: "the certificate is for another host name",
    64: "the certificate is for another address",
}
"""What OpenSSL's codes of a failed verification mean (``X509_V_ERR_*``)."""


class End(StrEnum):
    """How a response ended."""

    WHOLE = "whole"
    """As its framing says."""
    CLOSED = "closed"
    """With the connection, and nothing else could end it: a break would look the same."""
    CUT = "cut"
    """The connection was closed before the end that the framing announces."""
    RESET = "reset"
    """The connection was reset."""
    MALFORMED = "malformed"
    """The bytes are not HTTP/1.1."""
    OPEN = "open"
    """It had not ended when the doctor stopped reading."""


class Read(msgspec.Struct, frozen=True, array_like=True):
    """One read that brought content: when, in seconds since the request, and how many bytes."""

    at: float
    size: int


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One event: when it was complete, how long its data is, and what a paced one says of itself.

    ``sent`` is in seconds of the far end's clock; without it the event is not a paced one.
    """

    at: float
    size: int
    sent: float | None = None


class Seen(msgspec.Struct, kw_only=True):
    """What was seen of one exchange.  All times are in seconds since the request was sent.

    Attributes:
        problem: why there is no response, in words; None where there is one.
        connect_s: how long the connection took, with the name lookup; None where there is none.
        tls_s: how long the handshake took.
        tls: the version of TLS, such as ``TLSv1.3``; None without TLS.
        minor: HTTP/1.x of the response.
        status: of the response.
        fields: of the response, names in lower case.
        framing: what ends the body: ``chunked``, ``length`` or ``close``.
        head_s: when the head was complete.
        reads: each read that brought content of the body, as it came: compressed, but unframed.
        events: each event of a stream of events.
        end: how it ended.
        end_s: when it ended, or when the doctor stopped reading.
        excerpt: the first bytes of the content.
        began: when the request was sent, by a clock that means something beside the same of
            another exchange alone.
    """

    problem: str | None = None
    connect_s: float | None = None
    tls_s: float | None = None
    tls: str | None = None
    minor: int | None = None
    status: int | None = None
    fields: list[tuple[str, str]] = []
    framing: str | None = None
    head_s: float | None = None
    reads: list[Read] = []
    events: list[Event] = []
    end: End = End.OPEN
    end_s: float = 0.0
    excerpt: bytes = b""
    began: float = 0.0

    def field(self, name: str) -> str | None:
        """Return the values of every field of that name, joined by commas; None without one."""
        values = [value for key, value in self.fields if key == name]
        return ", ".join(values) if values else None

    @property
    def coding(self) -> str | None:
        """The content coding of the response; None where there is none."""
        coding = self.field("content-encoding")
        return None if coding in (None, "", "identity") else coding

    @property
    def size(self) -> int:
        """How many bytes of content came."""
        return sum(read.size for read in self.reads)

    @property
    def is_paced(self) -> bool:
        """Whether every event says when it was sent, but perhaps the last one."""
        told = [event.sent is not None for event in self.events]
        return len(told) > 1 and all(told[:-1])


class Trust(msgspec.Struct, frozen=True):
    """Whom to believe: a file of authorities in place of the system's, or None."""

    ca: str | None = None

    def context(self, *protocols: str) -> ssl.SSLContext:
        """Return a context that offers these protocols."""
        context = ssl.create_default_context(cafile=self.ca)
        context.set_alpn_protocols(list(protocols))
        return context


class Exchange:
    """One request and its response, as a context manager that closes the connection.

    Args:
        target: whom to ask.
        request: what is sent, as bytes.
        trust: whom to believe.
        timeout_s: how long all of it may take.
        receive_buffer: of the kernel, in bytes; 0 leaves it as it is.

    Attributes:
        seen: what was seen so far.
    """

    def __init__(
        self,
        target: Target,
        request: bytes,
        *,
        trust: Trust,
        timeout_s: float,
        receive_buffer: int = 0,
    ) -> None:
        self.seen = Seen(reads=[], events=[], fields=[])
        self._target = target
        self._deadline = time.monotonic() + timeout_s
        self._sock: socket.socket | None = None
        self._head = b""
        self._body: BodyReader | None = None
        self._content = _Content()
        self._sent_at = time.monotonic()
        try:
            self._open(request, trust, receive_buffer)
        except (OSError, ValueError) as error:
            self.seen.problem = self.seen.problem or _words(error)
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what the far end has sent and nobody read makes it a reset."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def read(
        self, until: Callable[[Seen], bool] = lambda seen: False, *, seconds: float | None = None
    ) -> Seen:
        """Read to the end of the response, or to the deadline.

        Args:
            until: asked after each read whether this was enough.
            seconds: the longest that this call may take.
        """
        limit = self._deadline
        if seconds is not None:
            limit = min(limit, time.monotonic() + seconds)
        seen = self.seen
        while self._sock is not None and not until(seen):
            if len(seen.reads) >= MOST_NOTES or len(seen.events) >= MOST_NOTES:
                break
            if self._content.size >= _MOST_BYTES:
                break
            try:
                data = self._receive(limit)
            except TimeoutError:
                break
            except ssl.SSLEOFError:
                self._over(End.CUT)
            except OSError:
                self._over(End.RESET)
            else:
                self._take(data)
        if self._sock is not None:
            seen.end_s = self._now()
            if seen.status is None and time.monotonic() >= self._deadline:
                seen.problem = f"no response within {seen.end_s:.1f} s"
        return seen

    # --- the connection ---------------------------------------------------------------------------

    def _open(self, request: bytes, trust: Trust, receive_buffer: int) -> None:
        url, began = self._target.url, time.monotonic()
        self._sock = _connected(url.host, url.port, self._deadline, receive_buffer)
        self.seen.connect_s = time.monotonic() - began
        if url.scheme == "https":
            began = time.monotonic()
            self._sock = secured(self._sock, trust.context("http/1.1"), url.host, self._deadline)
            self.seen.tls_s = time.monotonic() - began
            self.seen.tls = self._sock.version()
        self._sock.settimeout(max(0.001, self._deadline - time.monotonic()))
        self._sock.sendall(request)
        self.seen.began = self._sent_at = time.monotonic()
        self._sock.setblocking(False)

    def _receive(self, limit: float) -> bytes:
        """Return the next bytes, or none at the peer's end.

        Raises:
            TimeoutError: the limit has passed.
        """
        assert self._sock is not None  # noqa: S101 - it is read only once it is there
        return _when_ready(self._sock, lambda: self._recv(), limit)

    def _recv(self) -> bytes:
        assert self._sock is not None  # noqa: S101 - as above
        return self._sock.recv(_READ)

    def _now(self) -> float:
        return time.monotonic() - self._sent_at

    # --- the response -----------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        at = self._now()
        try:
            if self._body is None:
                if not data:
                    self._over(End.CUT)
                    return
                data = self._take_head(data, at)
            elif not data:
                unframed = isinstance(self._body, LengthReader) and self._body.left is None
                self._over(End.CLOSED if unframed else End.CUT)
                return
            if self._body is not None:
                self._take_body(self._body, data, at)
        except BadMessage as error:
            if self.seen.status is None:
                self.seen.problem = f"what answers is no HTTP/1.1 server: {error}"
            self._over(End.MALFORMED)

    def _take_head(self, data: bytes, at: float) -> bytes:
        """Take a part of the head; return what stands behind it."""
        self._head += data
        for _ in range(_MOST_INTERIM):
            head, mark, rest = self._head.partition(b"\r\n\r\n")
            if not mark:
                if len(self._head) > _MOST_HEAD:
                    raise BadMessage(f"a head longer than {_MOST_HEAD} bytes")
                if b"\n" in self._head and not self._head.startswith(b"HTTP/1."):
                    raise BadMessage("the status line is malformed")
                return b""
            first, *lines = head.split(b"\r\n")
            minor, status = parse_status_line(first)
            if status >= 200:
                self._begin(minor, status, parse_fields(lines, longest=_MOST_HEAD), at)
                return rest
            self._head = rest
        raise BadMessage(f"more than {_MOST_INTERIM} interim responses")

    def _begin(self, minor: int, status: int, fields: Fields, at: float) -> None:
        seen, first = self.seen, first_values(fields)
        method = b"POST" if self._target.body else b"GET"
        self._body, length = response_body(method, status, minor, fields, first)
        seen.minor, seen.status, seen.head_s = minor, status, at
        seen.fields = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in fields]
        chunked = b"transfer-encoding" in first
        seen.framing = "chunked" if chunked else "close" if length is None else "length"
        self._content = _Content(first.get(b"content-type"), seen.coding)

    def _take_body(self, body: BodyReader, data: bytes, at: float) -> None:
        content = body.feed(data)
        if content:
            self.seen.reads.append(Read(at, len(content)))
            self._content.feed(content)
        if body.error is not None:
            raise body.error
        if body.done:
            self._content.finish()
        for size, sent in self._content.events():
            self.seen.events.append(Event(at, size, sent))
        self.seen.excerpt = self._content.excerpt
        if body.done:
            self._over(End.WHOLE)

    def _over(self, end: End) -> None:
        self.seen.end, self.seen.end_s = end, self._now()
        if self.seen.status is None and self.seen.problem is None:
            how = "reset" if end is End.RESET else "closed"
            self.seen.problem = f"the connection was {how} before a response"
        self.close()


class _Content:
    """Takes the content of a body apart: events with their sizes, and when paced ones were sent.

    Args:
        kind: the content type.
        coding: the content coding; what is not gzip is not taken apart.
    """

    def __init__(self, kind: bytes | None = None, coding: str | None = None) -> None:
        self.size = 0
        self.excerpt = b""
        self._gzip = zlib.decompressobj(31) if coding in ("gzip", "x-gzip") else None
        self._framing: Framing | None = None
        self._events: list[tuple[int, float | None]] = []
        if coding is None or self._gzip is not None:
            if media_type(kind) == b"text/event-stream":
                self._framing = ServerSentEvents(_MOST_EVENT, _nothing)
            elif is_ndjson(kind):
                self._framing = Lines(_MOST_EVENT, _nothing)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        if self._gzip is None:
            self._read(data)
            return
        try:
            while data and self.size < _MOST_BYTES:
                self._read(self._gzip.decompress(data, _READ))
                data = self._gzip.unconsumed_tail
        except zlib.error:
            self._framing = None

    def finish(self) -> None:
        """Take the end of the body: it ends the last event."""
        if self._framing is not None:
            self._note(self._framing.flush())

    def events(self) -> list[tuple[int, float | None]]:
        """Return what came since the last call: the size of each event, and when it was sent."""
        taken, self._events = self._events, []
        return taken

    def _read(self, data: bytes) -> None:
        self.size += len(data)
        if len(self.excerpt) < _EXCERPT:
            self.excerpt = (self.excerpt + data)[:_EXCERPT]
        if self._framing is not None:
            self._note(self._framing.feed(data))

    def _note(self, events: Sequence[Framed]) -> None:
        self._events += [(len(data), _sent_at(data)) for _, data in events]


def _sent_at(data: bytes) -> float | None:
    """Return when a paced event says that it was sent, or None."""
    if b'"sent"' not in data[:200]:
        return None
    try:
        said = json.loads(data)
    except ValueError:
        return None
    sent = said.get("sent") if isinstance(said, dict) else None
    return float(sent) if isinstance(sent, int | float) and not isinstance(sent, bool) else None


def _nothing() -> None:
    pass


# --- sockets --------------------------------------------------------------------------------------


def _connected(host: str, port: int, deadline: float, receive_buffer: int) -> socket.socket:
    """Connect to the first address of a host that answers.

    Raises:
        OSError: none did, before the deadline.
    """
    failed: OSError | None = None
    for family, kind, number, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, number)
        try:
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            failed = failed or error
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed or OSError("the host has no address")


def secured(
    sock: socket.socket, context: ssl.SSLContext, host: str, deadline: float
) -> ssl.SSLSocket:
    """Shake hands on a connection; it is closed where that fails.

    Raises:
        OSError: it failed, or the deadline has passed.
    """
    try:
        over = context.wrap_socket(
            sock, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
    except BaseException:
        sock.close()
        raise
    try:
        over.setblocking(False)
        _when_ready(over, over.do_handshake, deadline)
    except BaseException:
        over.close()
        raise
    return over


def protocol(target: Target, *, trust: Trust, timeout_s: float) -> str | None:
    """Return what a server of https:// chooses that is offered HTTP/2 and HTTP/1.1.

    Raises:
        OSError: there is no connection.
    """
    deadline = time.monotonic() + timeout_s
    sock = _connected(target.url.host, target.url.port, deadline, 0)
    with contextlib.closing(
        secured(sock, trust.context("h2", "http/1.1"), target.url.host, deadline)
    ) as over:
        return over.selected_alpn_protocol()


def _when_ready(sock: socket.socket, call: Callable[[], T], limit: float) -> T:
    """Call until it does not have to wait for the socket any more.

    Raises:
        TimeoutError: the limit has passed.
    """
    while True:
        try:
            return call()
        except ssl.SSLWantWriteError:
            reads, writes = [], [sock]
        except (BlockingIOError, ssl.SSLWantReadError):
            reads, writes = [sock], []
        left = limit - time.monotonic()
        if left <= 0 or not any(select.select(reads, writes, [], left)):
            raise TimeoutError("it took too long")


def _words(error: OSError | ValueError) -> str:
    """Return what went wrong before there was a response, for a person."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "TLS: " + _TRUST_WORDS.get(error.verify_code, error.verify_message.lower())
    if isinstance(error, ssl.SSLError):
        said = (error.reason or "the handshake failed").lower().replace("_", " ")
        plain = " (does it speak TLS at all?)" if "wrong version number" in said else ""
        return f"TLS: {said}{plain}"
    if isinstance(error, socket.gaierror):
        return "the host's name is not known"
    if isinstance(error, TimeoutError):
        return "no connection in time"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused: nothing listens there"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)
