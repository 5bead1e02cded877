"""Answers cut at every offset by the wire itself: two segments, two reads, one meaning."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from llmproxy.config import Provider as ProviderConfig
from llmproxy.config import Timeouts, Url
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, turn, until
from tests.support.kernel import held
from tests.support.sockets import Provider, Wire
from tests.support.tls import Authority

CLOCK: Any = reactor
HEAD = b"HTTP/1.1 200 OK\r\nx-a: 1\r\n"
CHUNKED = (
    HEAD
    + b"transfer-encoding: chunked\r\n\r\n4;x\r\ndata\r\n0A\r\n: a line\n\n\r\n0\r\nt: 1\r\n\r\n"
)
LENGTH = b"HTTP/1.1 103 X\r\n\r\n" + HEAD + b"content-length: 14\r\n\r\ndata: a line\n\n"


class Cutting:
    """A provider's script that cuts its response to each request, further on each time.

    The second piece follows only once the first one was read.
    """

    def __init__(self, response: bytes, *, tls: bool) -> None:
        self._response, self._tls = response, tls

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        port = wire.sock.getpeername()[1]
        tick = threading.Event()
        for at in range(1, len(self._response)):
            wire.read_request()
            wire.send(self._response[:at])
            while held(local=port).unread:
                tick.wait(0.0005)
            wire.send(self._response[at:])


def agent_for(provider: Provider, authority: Authority, tls: bool) -> ProviderPool:
    """Return an agent for the provider."""
    host, scheme = ("localhost", "https") if tls else ("127.0.0.1", "http")
    return ProviderPool(
        CLOCK,
        CLOCK.seconds,
        ProviderConfig(
            name="p",
            url=Url(scheme=scheme, host=host, port=provider.port),
            dialect="raw",  # type: ignore[arg-type]  # text will do
            ca=str(authority.ca_path),
        ),
        resolver=Resolver(CLOCK, CLOCK.seconds),
        pool_idle=None,
        max_head=4096,
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that the provider's certificate comes from."""
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("response", [LENGTH, CHUNKED], ids=["length", "chunked"])
@pytest_twisted.ensureDeferred
async def test_a_response_is_the_same_at_every_cut_of_the_wire(
    authority: Authority, response: bytes, tls: bool
) -> None:
    """One connection serves as many requests as there are cuts, and no response differs."""
    context = authority.server() if tls else None
    with Provider(Cutting(response, tls=tls), tls=context) as provider:
        agent = agent_for(provider, authority, tls)
        timeouts = Timeouts(connect=10.0, first_byte=10.0)
        for at in range(1, len(response)):
            outgoing = OutgoingRequest(agent, b"/%d" % at, [], b"", timeouts)
            got: Any = await outgoing.request(b"GET", b"", None, None)
            assert isinstance(got, Response)
            body = Collector()
            got.deliverBody(body)
            await body.ended
            assert (got.code, body.body) == (200, b"data: a line\n\n"), at
            await turn()  # a TLS connection is kept from then on
            assert b"" not in body.pieces
        accepted = provider.accepted
        agent.close()
        await until(lambda: not any(agent.counts().values()))
    assert accepted == 1
