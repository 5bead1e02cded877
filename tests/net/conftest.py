"""What the tests of TLS on a socket are given: each version, and each side."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from OpenSSL import SSL

from llmproxy.net.tls import TlsConnector, TlsServer
from tests.support.ends import End, TwoEnds, held_client, held_server
from tests.support.fake_transport import until
from tests.support.tls_peer import ENGINES, Contexts, TlsPeer


class Open:
    """Opens connections with our end in one role, of one version.

    Args:
        contexts: of the version.
        server: our end is the server.
    """

    def __init__(self, contexts: Contexts, server: bool) -> None:
        self.contexts = contexts
        self.server = server
        self.ours: SSL.Context = contexts.openssl(server)

    def raw(self, end: End | None = None, *, small: bool = False) -> Any:
        """Open one whose other end says nothing yet."""
        if self.server:
            return held_server(partial(TlsServer, self.on_socket), end, small=small)
        return held_client(partial(TlsConnector, self.on_socket), end, small=small)

    def on_socket(self, transport: Any) -> SSL.Connection:
        """Return OpenSSL's side of our end."""
        return SSL.Connection(self.ours, transport.socket)

    def peer(self, held: TwoEnds, engine: str = "ssl") -> TlsPeer:
        """Return who speaks TLS at the other end."""
        return TlsPeer(held, ENGINES[engine](self.contexts, not self.server))

    @asynccontextmanager
    async def handshake_done(
        self, end: End | None = None, *, small: bool = False, engine: str = "ssl"
    ) -> Any:
        """Open one, and yield the peer when both ends know of the handshake's end."""
        async with self.raw(end, small=small) as held:
            peer = self.peer(held, engine)
            await peer.shake()
            held.sock.send(peer.records(b"!"))
            await until(lambda: held.end.received[:1] == b"!")
            held.transport.write(b"!")
            await peer.hear(1)
            held.end.pieces.clear()
            peer.heard = b""
            yield peer


@pytest.fixture(scope="module", params=["1.2", "1.3"])
def contexts(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    """Each version's contexts."""
    return Contexts(request.param, tmp_path_factory.mktemp("contexts"))


@pytest.fixture(params=[True, False], ids=["server", "client"])
def tls(request: Any, contexts: Contexts) -> Open:
    """Our end in each role."""
    return Open(contexts, request.param)
