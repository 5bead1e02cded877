"""Blocking sockets for tests: a provider that follows a script, and a client that sees every byte.

Both run outside the reactor, in threads or in the test itself, so that what they see is what the
wire carried, when it did.  Every wait has a limit; a wait that runs out raises ``TimeoutError``.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from typing import Self

WAIT = 20.0
"""Seconds that any single wait may take; a promise that takes longer is broken."""


class Wire:
    """One connection, read and written in a blocking way.

    Attributes:
        buffer: what was received and not yet taken.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        sock.settimeout(WAIT)

    def send(self, *pieces: bytes) -> None:
        """Send everything."""
        self.sock.sendall(b"".join(pieces))

    def receive(self) -> bytes:
        """Receive some bytes into the buffer; return them, or nothing at the peer's end."""
        data = self.sock.recv(65536)
        self.buffer += data
        return data

    def read(self, count: int) -> bytes:
        """Take exactly so many bytes."""
        while len(self.buffer) < count:
            if not self.receive():
                raise EOFError(f"the peer ended after {len(self.buffer)} of {count} bytes")
        taken, self.buffer = self.buffer[:count], self.buffer[count:]
        return taken

    def read_until(self, mark: bytes) -> bytes:
        """Take everything up to and including ``mark``."""
        while (end := self.buffer.find(mark)) < 0:
            if not self.receive():
                raise EOFError(f"the peer ended before {mark!r}: {self.buffer!r}")
        return self.read(end + len(mark))

    def read_head(self) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Take a head; return its first line and its fields, names in lower case."""
        first, *lines = self.read_until(b"\r\n\r\n")[:-4].split(b"\r\n")
        pairs = [line.partition(b":") for line in lines]
        return first, [(name.lower(), value.strip()) for name, _, value in pairs]

    def read_chunk(self) -> bytes:
        """Take one chunk of the chunked coding; the last one is empty."""
        size = int(self.read_until(b"\r\n"), 16)
        return self.read(size + 2)[:-2]

    def read_chunks(self) -> bytes:
        """Take a whole chunked body."""
        body = b""
        while chunk := self.read_chunk():
            body += chunk
        return body

    def read_body(self, fields: list[tuple[bytes, bytes]]) -> bytes:
        """Take a body as the fields frame it."""
        names = dict(fields)
        if names.get(b"transfer-encoding") == b"chunked":
            return self.read_chunks()
        return self.read(int(names.get(b"content-length", b"0")))

    def read_request(self) -> Received:
        """Take one request, with its body."""
        first, fields = self.read_head()
        method, target, version = first.split(b" ")
        return Received(method, target, fields, self.read_body(fields), version)

    def wait_closed(self) -> str:
        """Read and drop until the peer's end; return ``"fin"`` or ``"reset"``."""
        try:
            while self.receive():
                pass
        except ssl.SSLEOFError:
            return "truncated"
        except ConnectionError:
            return "reset"
        return "fin"

    def reset(self) -> None:
        """Close with a RST, dropping what the kernel still holds."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()  # no shutdown before it: that would send a FIN

    def close_notify(self) -> None:
        """Send TLS's close_notify; nothing on a plain connection."""
        if isinstance(self.sock, ssl.SSLSocket):
            with contextlib.suppress(OSError):  # the peer may close without its own
                self.sock.unwrap()

    def close(self) -> None:
        """Close: a FIN, without TLS's close_notify."""
        with contextlib.suppress(OSError):
            # A thread may be blocked in recv; close alone would not wake it.
            if not isinstance(self.sock, ssl.SSLSocket):
                self.sock.shutdown(socket.SHUT_WR)
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.sock.close()


class Received:
    """A request as it came in."""

    def __init__(
        self,
        method: bytes,
        target: bytes,
        fields: list[tuple[bytes, bytes]],
        body: bytes,
        version: bytes = b"HTTP/1.1",
    ) -> None:
        self.method = method
        self.target = target
        self.fields = fields
        self.body = body
        self.version = version

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of every field of that name (lower case)."""
        return [value for key, value in self.fields if key == name]


Script = Callable[[Wire], None]


class Provider:
    """A provider on loopback that lets ``script`` speak on every connection, each in a thread.

    What a script raises is kept in :attr:`errors`, but for the end of its connection.

    Args:
        script: is handed each accepted connection, and closed behind it.
        tls: a server context, for HTTPS.
        receive_buffer: the kernel's receive buffer of each connection, in bytes.
        send_buffer: the same for sending.
    """

    def __init__(
        self,
        script: Script,
        *,
        tls: ssl.SSLContext | None = None,
        receive_buffer: int = 0,
        send_buffer: int = 0,
    ) -> None:
        self._script = script
        self._tls = tls
        self._send_buffer = send_buffer
        self._listener = socket.socket()
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if send_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1024)
        self.port: int = self._listener.getsockname()[1]
        self.errors: list[BaseException] = []
        self.accepted = 0
        self._wires: list[Wire] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False

    @property
    def url(self) -> str:
        """Where it is reached."""
        return f"https://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        self._threads.append(thread)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for wire in list(self._wires):
            with contextlib.suppress(OSError):
                wire.sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT)
        if kind is None and self.errors:
            raise self.errors[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            if self._tls is not None:
                sock.settimeout(WAIT)
                sock = self._tls.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False)
            with Wire(sock) as wire:
                self._wires.append(wire)
                self._script(wire)
        except (EOFError, ConnectionError, ssl.SSLEOFError):
            return
        except BaseException as error:
            if not self._stopping:
                self.errors.append(error)


def connect(port: int, *, receive_buffer: int = 0, tls: ssl.SSLContext | None = None) -> Wire:
    """Connect to loopback; a small ``receive_buffer`` (bytes) lets the kernel take little."""
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(WAIT)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        sock = tls.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False)
    return Wire(sock)


def request(
    method: str,
    target: str,
    *fields: str,
    body: bytes = b"",
    version: str = "1.1",
    host: str = "proxy",
) -> bytes:
    """Return a request as it goes on the wire."""
    lines = [f"{method} {target} HTTP/{version}", f"Host: {host}", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(*pieces: bytes) -> bytes:
    """Return pieces as chunks of the chunked coding, without the last one."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
