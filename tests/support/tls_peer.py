"""The other end of a TLS connection, record by record: what it says is bytes until they are sent.

So the test decides which records share a segment and where one is cut.  OpenSSL is asked through
Python's ``ssl`` or through pyOpenSSL; both speak from memory to the socket of
:class:`tests.support.ends.TwoEnds`.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import trustme
from OpenSSL import SSL

from tests.support.ends import TwoEnds
from tests.support.fake_transport import until

VERSIONS = {
    "1.2": (ssl.TLSVersion.TLSv1_2, SSL.TLS1_2_VERSION),
    "1.3": (ssl.TLSVersion.TLSv1_3, SSL.TLS1_3_VERSION),
}


class Contexts:
    """Contexts of both kinds and of both sides, of one version.

    Args:
        version: a key of :data:`VERSIONS`.
        folder: where the authority's certificate is written.
    """

    def __init__(self, version: str, folder: Path) -> None:
        self._python, self._openssl = VERSIONS[version]
        self.ca = trustme.CA()
        self.issued = self.ca.issue_cert("localhost")
        self.ca_path = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_path))
        self.key_path = folder / "key.pem"
        self.issued.private_key_and_cert_chain_pem.write_to_path(str(self.key_path))

    def python(self, server: bool) -> ssl.SSLContext:
        """Return a context of Python's ``ssl``."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = context.maximum_version = self._python
        self.issued.configure_cert(context) if server else self.ca.configure_trust(context)
        return context

    def openssl(
        self, server: bool, *, trusted: bool = True, renegotiates: bool = False
    ) -> SSL.Context:
        """Return a context of pyOpenSSL, with the options that this package's have.

        Args:
            server: for this side.
            trusted: a client knows the authority.
            renegotiates: without the option that refuses it.
        """
        context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(self._openssl)
        context.set_max_proto_version(self._openssl)
        if not renegotiates:
            context.set_options(SSL.OP_NO_RENEGOTIATION)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)
        if server:
            self.issued.configure_cert(context)
            return context
        if trusted:
            context.load_verify_locations(str(self.ca_path))
        context.set_verify(SSL.VERIFY_PEER)
        return context


class Engine(Protocol):
    """TLS in memory."""

    def feed(self, data: bytes) -> None:
        """Take what came from the wire."""

    def drain(self) -> bytes:
        """Return what is to be sent."""

    def handshake(self) -> bool:
        """Go on with the handshake; return whether it is done."""

    def say(self, data: bytes) -> None:
        """Make records of ``data``."""

    def hear(self) -> bytes | None:
        """Return some content, nothing where more must come first, or None at close_notify."""

    def send_close_notify(self) -> None:
        """Make a close_notify."""


class PythonEngine:
    """Python's ``ssl``."""

    def __init__(self, contexts: Contexts, server: bool) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = contexts.python(server)
        name = None if server else "localhost"
        self.tls = context.wrap_bio(self._in, self._out, server, name)

    def feed(self, data: bytes) -> None:
        self._in.write(data)

    def drain(self) -> bytes:
        return self._out.read()

    def handshake(self) -> bool:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def say(self, data: bytes) -> None:
        assert self.tls.write(data) == len(data)

    def hear(self) -> bytes | None:
        try:
            return self.tls.read(65536) or None
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            return None

    def send_close_notify(self) -> None:
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()


class OpenSslEngine:
    """pyOpenSSL."""

    def __init__(self, contexts: Contexts, server: bool) -> None:
        self.tls = SSL.Connection(contexts.openssl(server, renegotiates=True), None)
        self.tls.set_accept_state() if server else self.tls.set_connect_state()

    def feed(self, data: bytes) -> None:
        while data:
            data = data[self.tls.bio_write(data) :]

    def drain(self) -> bytes:
        taken = b""
        with suppress(SSL.WantReadError):
            while True:
                taken += self.tls.bio_read(65536)
        return taken

    def handshake(self) -> bool:
        try:
            self.tls.do_handshake()
        except SSL.WantReadError:
            return False
        return True

    def say(self, data: bytes) -> None:
        for start in range(0, len(data), 16384):
            piece = data[start : start + 16384]
            assert self.tls.send(piece) == len(piece)

    def hear(self) -> bytes | None:
        try:
            return self.tls.recv(65536)
        except SSL.WantReadError:
            return b""
        except SSL.ZeroReturnError:
            return None

    def send_close_notify(self) -> None:
        self.tls.shutdown()


ENGINES: dict[str, Any] = {"ssl": PythonEngine, "pyOpenSSL": OpenSslEngine}


class TlsPeer:
    """Speaks TLS at the test's end.

    Attributes:
        heard: the content so far.
        got_close_notify: our end's close_notify has come.
    """

    def __init__(self, held: TwoEnds, engine: Any) -> None:
        self.held = held
        self.engine: Engine = engine
        self.heard = b""
        self.got_close_notify = False

    async def handshake(self) -> None:
        """Do the handshake."""
        await until(self._shaken)

    def _shaken(self) -> bool:
        self.engine.feed(self.held.pull())
        done = self.engine.handshake()
        self.flush()
        return done

    def flush(self) -> None:
        """Send what the engine has made, which is little, unless our end is gone."""
        if out := self.engine.drain():
            with suppress(ConnectionError):
                assert self.held.sock.send(out) == len(out)

    def records(self, *pieces: bytes) -> bytes:
        """Return records with this content, at least one for each piece, not sent yet."""
        for piece in pieces:
            self.engine.say(piece)
        return self.engine.drain()

    def end_record(self) -> bytes:
        """Return a close_notify, not sent yet."""
        self.engine.send_close_notify()
        return self.engine.drain()

    def listen(self, limit: int = 1 << 20) -> bool:
        """Take in what is there now; return False."""
        self.engine.feed(self.held.pull(limit))
        while not self.got_close_notify and (content := self.engine.hear()) != b"":
            if content is None:
                self.got_close_notify = True
            else:
                self.heard += content
        return False

    async def hear(self, size: int) -> bytes:
        """Take until ``size`` bytes of content have come; return everything."""
        await until(lambda: self.listen() or len(self.heard) >= size or self.over)
        return self.heard

    async def hear_end(self) -> str:
        """Take until the connection's end: ``"fin"``, or ``"reset"``."""
        await until(lambda: self.listen() or self.over)
        assert self.held.over is not None
        return self.held.over

    @property
    def over(self) -> str | None:
        """How the connection ended, if it did."""
        return self.held.over
