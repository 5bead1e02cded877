"""What the tests of our transports are given: TCP, and TLS of each version, on each side."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import pytest
from OpenSSL import SSL
from twisted.internet.protocol import Protocol

from llmproxy.net.tcp import DirectClient, DirectServer
from llmproxy.net.tls import TlsClient, TlsServer, begin_tls
from tests.support.ends import End, TwoEnds, held_client, held_server
from tests.support.fake_transport import until
from tests.support.tls_peer import ENGINES, Contexts, TlsPeer


class OpenTls:
    """Opens TLS connections with our end in one role, of one version.

    Args:
        contexts: of the version.
        role: of our end: ``server``, ``client``, or ``later``: a client whose connection was plain
            at first.
    """

    def __init__(self, contexts: Contexts, role: str) -> None:
        self.contexts = contexts
        self.role = role
        self.server = server = role == "server"
        self.plain: Any = None  # the transport that was there before
        self.ours: SSL.Context = contexts.openssl(server)

    def raw(self, end: End | None = None, *, small: bool = False) -> Any:
        """Open a connection whose other end has sent nothing yet."""
        if self.server:
            return held_server(partial(TlsServer, self.on_socket), end, small=small)
        if self.role == "later":
            return held_client(self.later, end, small=small)
        return held_client(partial(TlsClient, self.on_socket), end, small=small)

    def on_socket(self, transport: Any) -> SSL.Connection:
        """Return OpenSSL's side of our end."""
        return SSL.Connection(self.ours, transport.socket)

    def later(self, reactor: Any, make: Callable[[], Any]) -> DirectClient:
        """Connect without TLS, and begin it when the connection is there."""
        opened = self

        class Plain(Protocol):
            def connectionMade(self) -> None:
                opened.plain = self.transport
                end = make()
                transport = cast(DirectClient, self.transport)
                begin_tls(transport, opened.on_socket)
                transport.protocol = end
                end.makeConnection(transport)

        return DirectClient(reactor, Plain)

    def peer(self, held: TwoEnds, engine: str = "ssl") -> TlsPeer:
        """Return the other end, which speaks TLS."""
        return TlsPeer(held, ENGINES[engine](self.contexts, not self.server))

    @asynccontextmanager
    async def handshake_done(
        self, end: End | None = None, *, small: bool = False, engine: str = "ssl"
    ) -> Any:
        """Open a connection; yield the peer when the handshake is done at both ends."""
        async with self.raw(end, small=small) as held:
            peer = self.peer(held, engine)
            await peer.handshake()
            held.sock.send(peer.records(b"!"))
            await until(lambda: held.end.received[:1] == b"!")
            held.transport.write(b"!")
            await peer.hear(1)
            held.end.pieces.clear()
            peer.heard = b""
            yield peer


class PlainPeer(TlsPeer):
    """The other end of a connection without TLS, as bytes that are not changed."""

    def __init__(self, held: TwoEnds) -> None:
        super().__init__(held, None)

    def records(self, *pieces: bytes) -> bytes:
        return b"".join(pieces)

    def end_record(self) -> bytes:
        return b""

    def listen(self, limit: int = 1 << 20) -> bool:
        self.heard += self.held.pull(limit)
        return False


class OpenTcp:
    """Opens connections without TLS, with our end in one role."""

    def __init__(self, server: bool) -> None:
        self.server = server

    @asynccontextmanager
    async def handshake_done(self, end: End | None = None, *, small: bool = False) -> Any:
        """Open a connection, and yield the peer."""
        opened: Any = held_server(DirectServer, end, small=small)
        if not self.server:
            opened = held_client(DirectClient, end, small=small)
        async with opened as held:
            yield PlainPeer(held)


def fill(peer: TlsPeer) -> bytes:
    """Write until the kernel takes no more; return what was written."""
    written = b""
    while not peer.held.transport._tempDataLen:
        piece = random.Random(len(written)).randbytes(5000)
        peer.held.transport.write(piece)
        written += piece
    return written


def reasons(end: End) -> list[type[Exception]]:
    """Return why the connection of our end was lost, once for each report."""
    return [type(error) for error in end.lost]


@pytest.fixture(scope="module", params=["1.2", "1.3"])
def contexts(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    """Each version's contexts."""
    return Contexts(request.param, tmp_path_factory.mktemp("contexts"))


@pytest.fixture(params=["server", "client", "later"])
def tls(request: Any, contexts: Contexts) -> OpenTls:
    """Our end in each role."""
    return OpenTls(contexts, request.param)


@pytest.fixture(params=[True, False], ids=["server", "client"])
def tcp(request: Any) -> OpenTcp:
    """Our end in each role."""
    return OpenTcp(request.param)


_ROLES = [("tcp", "server"), ("tcp", "client")]
_ROLES += [(version, role) for version in ("1.2", "1.3") for role in ("server", "client", "later")]


@pytest.fixture(scope="module", params=_ROLES, ids="-".join)
def direct(request: Any, tmp_path_factory: pytest.TempPathFactory) -> OpenTcp | OpenTls:
    """Our end in each role, with TLS and without."""
    version, role = request.param
    if version == "tcp":
        return OpenTcp(role == "server")
    return OpenTls(Contexts(version, tmp_path_factory.mktemp("contexts")), role)
