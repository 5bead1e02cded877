"""TLS towards a provider: what is offered, verified and resumed, and what the kernel watches."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred

from llmproxy.errors import EndReason
from llmproxy.net.transport import raw_transport
from tests.support.fake_transport import Collector, until
from tests.support.sockets import WAIT, Provider, Wire
from tests.support.tls import Authority
from tests.upstream.hello import Hello, read_hello
from tests.upstream.one_provider import (
    OK,
    RespondingProvider,
    failure_of,
    plain,
    pool_of,
    url_of,
)

CLOSING = plain(b"ok", b"Connection: close")


# --- what is offered and verified -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "name"), [("localhost", b"localhost"), ("127.0.0.1", None)], ids=["name", "address"]
)
@ensureDeferred
async def test_a_provider_is_offered_http_1_1_by_its_name(host: str, name: bytes | None) -> None:
    """SNI with the URL's host, where it is a name (RFC 6066), ALPN, and TLS 1.2 and 1.3 alone."""
    seen: queue.Queue[bytes] = queue.Queue()
    provider = Provider(lambda wire: seen.put(wire.receive()))
    async with pool_of(provider, url_of(provider, host, "https")) as (_, pool):
        error = await failure_of(pool.send())
    assert (error.end, error.cause) == (EndReason.UPSTREAM_TLS, "protocol")
    assert not error.may_have_run
    offered = read_hello(seen.get(timeout=WAIT))
    assert offered == Hello(name, [b"http/1.1"], {0x0303, 0x0304})


def limited(authority: Authority, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a server's context that speaks one version of TLS."""
    context = authority.server()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    if version < ssl.TLSVersion.TLSv1_2:
        context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("authority", "unknown_authority"),
        ("name", "wrong_name"),
        ("plain", "protocol"),
        ("expired", "expired"),
        ("old version", "protocol"),
    ],
)
@ensureDeferred
async def test_a_provider_that_cannot_be_trusted_gets_no_request(
    fault: str, cause: str, authority: Authority, tmp_path: Path
) -> None:
    """A wrong authority, name, time or version, or no TLS, is a failure before a byte is sent."""
    contexts = {
        "authority": lambda: Authority(tmp_path).server(),
        "name": lambda: authority.server("else.where"),
        "expired": lambda: authority.server(not_after=datetime(2001, 1, 1, tzinfo=UTC)),
        "old version": lambda: limited(authority, ssl.TLSVersion.TLSv1_1),
    }
    requests: queue.Queue[bytes] = queue.Queue()

    def script(wire: Wire) -> None:
        if fault == "plain":
            wire.send(b"HTTP/1.1 400 Speak plainly\r\n\r\n")
        else:
            requests.put(wire.receive())

    provider = Provider(script, tls=None if fault == "plain" else contexts[fault]())
    url = url_of(provider, "localhost", "https")
    with contextlib.suppress(ssl.SSLError):  # which the provider's side of the handshake is
        async with pool_of(provider, url, ca=authority.ca_path) as (_, pool):
            error = await failure_of(pool.send())
    assert not any(requests.queue)
    assert (error.status, error.end) == (502, EndReason.UPSTREAM_TLS)
    assert (error.cause, error.may_have_run) == (cause, False)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
@ensureDeferred
async def test_a_certificate_may_be_for_a_name_or_an_address(
    host: str, authority: Authority
) -> None:
    """A certificate for the URL's host is accepted."""
    provider = RespondingProvider(tls=authority.server(host))
    async with pool_of(provider, url_of(provider, host), ca=authority.ca_path) as (_, pool):
        assert await pool.fetch() == b"ok"


# --- what is resumed ------------------------------------------------------------------------------


class Resuming:
    """A provider's script that notes for each connection whether it resumed a session."""

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
            if self.hang_up.get(timeout=WAIT) == "close_notify":
                wire.close_notify()
            return
        wire.wait_closed()


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS, ids=["1.2", "1.3"])
@pytest.mark.parametrize("first", ["stays", "close_notify", "expires"])
@ensureDeferred
async def test_the_next_connection_resumes_the_session(
    authority: Authority, version: ssl.TLSVersion, first: str
) -> None:
    """Whether the connection that began the session is idle, or was closed by either side."""
    script = Resuming()
    provider = Provider(script, tls=limited(authority, version))
    async with pool_of(provider, ca=authority.ca_path) as (_, pool):
        await pool.fetch(credential=b"a")
        if first == "close_notify":
            script.hang_up.put(first)
        elif first == "expires":
            await until(lambda: pool.counts()["idle"])  # behind a TLS layer it takes a turn
            pool.clock.advance(61)
        if first != "stays":
            await until(lambda: not any(pool.counts().values()))
        await pool.fetch(credential=b"b")
        for _ in range(2):
            script.hang_up.put("fin")
    assert script.resumed == [False, True]


@ensureDeferred
async def test_a_session_is_resumed_where_no_connection_is_kept(
    authority: Authority,
) -> None:
    """A provider that closes behind each response saves the handshake no less."""
    script = Resuming(CLOSING)
    provider = Provider(script, tls=authority.server())
    async with pool_of(provider, ca=authority.ca_path) as (_, pool):
        await pool.fetch()
        await pool.fetch()
    assert script.resumed == [False, True]


@ensureDeferred
async def test_a_session_outlives_a_connection_that_we_abort(authority: Authority) -> None:
    """A caller that leaves in the middle of its response does not cost the next one a handshake."""
    script = Resuming()
    provider = Provider(script, tls=authority.server())
    async with pool_of(provider, ca=authority.ca_path) as (_, pool):
        await pool.fetch(credential=b"a")
        (await pool.send(credential=b"b")).abort()
        await until(lambda: not pool.counts()["active"])
        await pool.fetch(credential=b"c")
        for _ in range(3):
            script.hang_up.put("fin")
    assert script.resumed == [False, True, True]


# --- what the kernel watches ----------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@ensureDeferred
async def test_an_upstream_socket_has_its_options(authority: Authority, tls: bool) -> None:
    """Small writes leave at once, and the kernel notices a provider that has vanished."""
    provider = RespondingProvider(tls=authority.server() if tls else None)
    async with pool_of(provider, ca=authority.ca_path) as (_, pool):
        body = Collector()
        (await pool.send()).deliverBody(body)
        option = raw_transport(body.transport).socket.getsockopt
        assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) <= 30
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) <= 5
        assert 0 < option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 120_000
        await body.ended
