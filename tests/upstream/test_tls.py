"""TLS towards a provider: what is offered, what is taken up again, and what the kernel watches."""

from __future__ import annotations

import queue
import socket
import ssl
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from llmproxy.config import Provider as ProviderConfig
from llmproxy.config import Timeouts, Url
from llmproxy.errors import EndReason, ProxyError
from llmproxy.net.transport import raw_transport
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, until
from tests.support.sockets import WAIT, Provider, Wire
from tests.support.tls import Authority
from tests.upstream.hello import Hello, read_hello

CLOCK: Any = reactor
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CLOSING = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that providers' certificates come from."""
    return Authority(tmp_path_factory.mktemp("ca"))


class Rig:
    """An agent, and what its requests come to."""

    def __init__(
        self,
        port: int,
        authority: Authority,
        host: str = "localhost",
        *,
        pool_idle: float | None = None,
    ) -> None:
        self.agent = ProviderPool(
            CLOCK,
            CLOCK.seconds,
            ProviderConfig(
                name="p",
                url=Url(scheme="https", host=host, port=port),
                dialect="raw",  # type: ignore[arg-type]  # text will do
                ca=str(authority.ca_path),
            ),
            resolver=Resolver(CLOCK, CLOCK.seconds),
            pool_idle=pool_idle,
            max_head=4096,
        )

    async def ask(self, credential: bytes = b"") -> Response:
        """Send a request and return its head."""
        timeouts = Timeouts(connect=10.0, first_byte=10.0)
        outgoing = OutgoingRequest(self.agent, b"/", [], credential, timeouts)
        response: Any = await outgoing.request(b"GET", b"", None, None)
        assert isinstance(response, Response)
        return response

    async def fetch(self, credential: bytes = b"") -> Collector:
        """Send a request and take its body."""
        body = Collector()
        (await self.ask(credential)).deliverBody(body)
        await body.ended
        assert body.body == b"ok"
        return body

    async def rest(self) -> None:
        """Close everything."""
        self.agent.close()
        await until(lambda: not any(self.agent.counts().values()))


# --- what is offered ------------------------------------------------------------------------------


async def hello_to(host: str, authority: Authority) -> Hello:
    """Return what a provider that is called ``host`` is offered; it hangs up then."""
    seen: queue.Queue[bytes] = queue.Queue()

    def script(wire: Wire) -> None:
        seen.put(wire.receive())

    with Provider(script) as provider:
        rig = Rig(provider.port, authority, host)
        with pytest.raises(ProxyError) as caught:
            await rig.ask()
        await rig.rest()
    assert (caught.value.end, caught.value.cause) == (EndReason.UPSTREAM_TLS, "protocol")
    assert not caught.value.may_have_run
    return read_hello(seen.get(timeout=WAIT))


@pytest_twisted.ensureDeferred
async def test_a_provider_is_told_its_name_and_offered_http_1_1_alone(authority: Authority) -> None:
    """SNI with the URL's host, ALPN with one protocol, TLS 1.2 and 1.3."""
    assert await hello_to("localhost", authority) == Hello(
        b"localhost", [b"http/1.1"], {0x0303, 0x0304}
    )


@pytest_twisted.ensureDeferred
async def test_an_address_is_no_name(authority: Authority) -> None:
    """SNI holds names alone (RFC 6066, section 3)."""
    assert (await hello_to("127.0.0.1", authority)).name is None


def limited(authority: Authority, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a server's context that speaks one version of TLS."""
    context = authority.server()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    if version < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest_twisted.ensureDeferred
async def test_a_current_version_is_spoken(authority: Authority, version: ssl.TLSVersion) -> None:
    """A provider that speaks one of the two is asked in it."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(OK)
        wire.wait_closed()

    with Provider(script, tls=limited(authority, version)) as provider:
        rig = Rig(provider.port, authority)
        await rig.fetch()
        await rig.rest()


@pytest_twisted.ensureDeferred
async def test_an_old_version_is_not_spoken(authority: Authority) -> None:
    """A provider that knows nothing newer than TLS 1.1 is not asked."""
    context = limited(authority, ssl.TLSVersion.TLSv1_1)
    failures: queue.Queue[str] = queue.Queue()

    def script(wire: Wire) -> None:
        with pytest.raises(ssl.SSLError) as caught:
            context.wrap_socket(wire.sock, server_side=True)
        failures.put(str(caught.value))

    with Provider(script) as provider:
        rig = Rig(provider.port, authority)
        with pytest.raises(ProxyError) as refused:
            await rig.ask()
        await rig.rest()
    assert refused.value.cause == "protocol"
    assert failures.get(timeout=WAIT)


# --- what is taken up again -----------------------------------------------------------------------


class Resuming:
    """A provider's script that tells for each connection whether its session was an older one."""

    def __init__(self, response: bytes = OK) -> None:
        self._response = response
        self.resumed: list[bool] = []
        self.hang_up: queue.Queue[str] = queue.Queue()

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        assert isinstance(wire.sock, ssl.SSLSocket)
        wire.read_request()
        self.resumed.append(bool(wire.sock.session_reused))
        wire.send(self._response)
        if self._response is OK:
            if self.hang_up.get(timeout=WAIT) == "farewell":
                wire.close_notify()
            return
        wire.wait_closed()


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
@pytest.mark.parametrize("first", ["stays", "farewell", "expires"])
@pytest_twisted.ensureDeferred
async def test_the_next_connection_takes_the_session_up_again(
    authority: Authority, version: ssl.TLSVersion, first: str
) -> None:
    """Whether the connection that began the session is idle, or was closed by either side."""
    script = Resuming()
    with Provider(script, tls=limited(authority, version)) as provider:
        rig = Rig(provider.port, authority, pool_idle=0.05 if first == "expires" else None)
        await rig.fetch(b"a")
        if first == "farewell":
            script.hang_up.put(first)
        if first != "stays":
            await until(lambda: not any(rig.agent.counts().values()))
        await rig.fetch(b"b")
        for _ in range(2):
            script.hang_up.put("fin")
        await rig.rest()
    assert script.resumed == [False, True]


@pytest_twisted.ensureDeferred
async def test_a_session_is_taken_up_again_where_no_connection_is_kept(
    authority: Authority,
) -> None:
    """A provider that closes behind each response saves the handshake no less."""
    script = Resuming(CLOSING)
    with Provider(script, tls=authority.server()) as provider:
        rig = Rig(provider.port, authority)
        await rig.fetch()
        await rig.fetch()
        await rig.rest()
    assert script.resumed == [False, True]


@pytest_twisted.ensureDeferred
async def test_a_session_outlives_a_connection_that_we_cut(authority: Authority) -> None:
    """A caller that leaves in the middle of its response does not cost the next one a handshake."""
    script = Resuming()
    with Provider(script, tls=authority.server()) as provider:
        rig = Rig(provider.port, authority)
        await rig.fetch(b"a")
        (await rig.ask(b"b")).abort()
        await until(lambda: not rig.agent.counts()["active"])
        await rig.fetch(b"c")
        for _ in range(3):
            script.hang_up.put("fin")
        await rig.rest()
    assert script.resumed == [False, True, True]


# --- what the kernel watches ----------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest_twisted.ensureDeferred
async def test_a_vanished_provider_is_noticed_by_the_kernel(
    authority: Authority, tls: bool
) -> None:
    """Keepalive probes and a bound on what stays unacknowledged, on every upstream socket."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(OK)
        wire.wait_closed()

    with Provider(script, tls=authority.server() if tls else None) as provider:
        rig = Rig(provider.port, authority)
        if not tls:
            rig.agent = plain_agent(provider.port)
        body = await rig.fetch()
        option = reading(raw_transport(body.transport).socket)
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 30
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) <= 5
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 120_000
        await rig.rest()


def reading(handle: socket.socket) -> Callable[[int, int], int]:
    """Return what reads a number from the socket's options."""
    return lambda level, name: handle.getsockopt(level, name)


def plain_agent(port: int) -> ProviderPool:
    """Return an agent without TLS."""
    url = Url(scheme="http", host="localhost", port=port)
    provider = ProviderConfig(name="p", url=url, dialect="raw")  # type: ignore[arg-type]  # text will do
    resolver = Resolver(CLOCK, CLOCK.seconds)
    return ProviderPool(
        CLOCK, CLOCK.seconds, provider, resolver=resolver, pool_idle=None, max_head=4096
    )
