"""One provider's connections: which request may use which, and how long each phase may take."""

from __future__ import annotations

import errno
import resource
import socket
import threading
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import CancelledError

from llmproxy.config import Timeouts, Url
from llmproxy.errors import EndReason, ProxyError
from llmproxy.upstream.resolver import KEPT
from tests.support.fake_transport import until
from tests.support.sockets import WAIT, connect
from tests.upstream.one_provider import (
    OK,
    OneProviderPool,
    RespondingProvider,
    failure_of,
    has_ended,
    plain,
    pool_of,
    read,
    take,
    url_of,
)

# --- the pool -------------------------------------------------------------------------------------


@ensureDeferred
async def test_a_connection_serves_one_request_after_the_other() -> None:
    """A whole response gives its connection back, and the next request takes it."""
    async with pool_of(RespondingProvider()) as (provider, pool):
        pool.assert_counts()
        for _ in range(3):
            assert await pool.fetch() == b"ok"
            pool.assert_counts(idle=1)
        assert provider.accepted == 1
        assert provider.closed.empty()
    await take(provider.closed)


@ensureDeferred
async def test_a_connection_keeps_nothing_of_how_it_was_made() -> None:
    """What makes its protocol, and the Deferred of the attempt, are gone once it is ready."""
    async with pool_of(RespondingProvider()) as (_, pool):
        response = await pool.send()
        (connection,) = pool.pool._live
        transport: Any = connection.transport
        assert (transport._make, transport._made) == (None, None)
        assert not {"doRead", "doWrite", "connector"} & vars(transport).keys()
        assert await read(response) == b"ok"


@ensureDeferred
async def test_requests_at_once_have_connections_of_their_own() -> None:
    """A connection whose response is not over serves no other request."""
    async with pool_of(RespondingProvider()) as (provider, pool):
        first, second = await pool.send(), await pool.send()
        pool.assert_counts(active=2)
        for response in (first, second):
            assert await read(response) == b"ok"
        pool.assert_counts(idle=2)
        assert provider.accepted == 2


@ensureDeferred
async def test_credentials_never_share_a_connection() -> None:
    """An idle connection is taken only for the credential that went over it before."""
    async with pool_of(RespondingProvider()) as (provider, pool):
        for credential in (b"a", b"b", b"a", b"b", b""):
            await pool.fetch(credential=credential)
        pool.assert_counts(idle=3)
        assert provider.accepted == 3


@ensureDeferred
async def test_no_connection_of_a_credential_that_is_dropped_stays() -> None:
    """An idle one is closed at once, a busy one when it is idle; those of others stay."""
    async with pool_of(RespondingProvider()) as (provider, pool):
        first, second = await pool.send(credential=b"a"), await pool.send(credential=b"a")
        await pool.fetch(credential=b"b")
        await read(first)
        pool.assert_counts(idle=2, active=1)
        pool.pool.drop(b"a")
        await take(provider.closed)
        await until(lambda: pool.counts() == {"idle": 1, "active": 1, "connecting": 0})
        await read(second)
        await take(provider.closed)
        await until(lambda: pool.counts() == {"idle": 1, "active": 0, "connecting": 0})
        await pool.fetch(credential=b"a")
        pool.assert_counts(idle=2)
        assert provider.accepted == 4
        assert not pool.pool._last


@ensureDeferred
@pytest.mark.parametrize("size", [0, 1])
async def test_the_pool_is_bounded_over_all_credentials(size: int) -> None:
    """A connection that does not fit is closed when its response is over."""
    async with pool_of(RespondingProvider(), size=size) as (provider, pool):
        await pool.fetch(credential=b"a")
        await pool.fetch(credential=b"b")
        for _ in range(2 - size):
            await take(provider.closed)
        await until(lambda: pool.counts()["active"] == 0)
        pool.assert_counts(idle=size)


@ensureDeferred
@pytest.mark.parametrize(
    ("pool_idle", "hint", "kept_s"),
    [
        (60.0, b"x: y", 60.0),
        (60.0, b"keep-alive: timeout=5, max=100", 4.0),
        (60.0, b"keep-alive: timeout=300", 60.0),
        (None, b"keep-alive: timeout=10", 9.0),
    ],
)
async def test_an_idle_connection_is_closed_in_time(
    pool_idle: float | None, hint: bytes, kept_s: float
) -> None:
    """After ``pool_idle``, or a second before the provider would, and not sooner."""
    response = RespondingProvider(plain(b"ok", hint))
    async with pool_of(response, pool_idle=pool_idle) as (provider, pool):
        await pool.fetch()
        pool.clock.advance(kept_s - 0.1)
        await pool.fetch()
        pool.clock.advance(kept_s - 0.1)
        pool.assert_counts(idle=1)
        pool.clock.advance(0.2)
        await take(provider.closed)
        await pool.assert_nothing_left()
        assert provider.accepted == 1


@ensureDeferred
async def test_one_timer_serves_the_whole_pool() -> None:
    """Each idle connection is closed at its own time, however many there are."""
    async with pool_of(RespondingProvider()) as (provider, pool):
        for credential in (b"a", b"b", b"c"):
            await pool.fetch(credential=credential)
            pool.clock.advance(10)
        assert pool.reactor.timers() == 1
        for left in (2, 1, 0):
            pool.clock.advance(30 if left == 2 else 10)
            await take(provider.closed)
            await until(lambda left=left: pool.counts()["idle"] == left)  # type: ignore[misc]  # the lambda's default
        await pool.assert_nothing_left()


@ensureDeferred
async def test_without_a_deadline_idle_connections_stay() -> None:
    """``pool_idle`` off keeps them, without any timer."""
    async with pool_of(RespondingProvider(), pool_idle=None) as (_, pool):
        await pool.fetch()
        assert not pool.reactor.timers()
        pool.clock.advance(1e6)
        pool.assert_counts(idle=1)


@ensureDeferred
@pytest.mark.parametrize("busy", [False, True], ids=["in its turn", "behind a busy turn"])
@pytest.mark.parametrize("stray", [b"", plain(b"trick")], ids=["fin", "bytes"])
async def test_an_idle_connection_that_is_not_quiet_is_not_used(stray: bytes, busy: bool) -> None:
    """A FIN or stray bytes end an idle connection, also where the reactor has not seen them yet."""
    async with pool_of(RespondingProvider()) as (provider, pool):
        await pool.fetch()
        wire = await take(provider.wires)
        wire.send(stray) if stray else wire.sock.shutdown(socket.SHUT_WR)
        if busy:
            prober = threading.Thread(target=probe, args=(provider.port,))
            prober.start()
            prober.join(WAIT)  # the reactor does not turn meanwhile
        else:
            await until(lambda: not any(pool.counts().values()))
        assert await pool.fetch() == b"ok"
        assert provider.accepted == 2 + busy


def probe(port: int) -> None:
    """Make a round trip over loopback, behind whatever was sent before."""
    with connect(port) as wire:
        wire.send(b"GET / HTTP/1.1\r\n\r\n")
        wire.read_until(b"ok")


@ensureDeferred
async def test_a_connection_that_just_expired_is_not_taken() -> None:
    """A request in the turn in which an idle connection expires gets another one."""
    async with pool_of(RespondingProvider()) as (provider, pool):
        await pool.fetch()
        pool.clock.advance(61)
        assert await pool.fetch() == b"ok"
        assert provider.accepted == 2


# --- the deadlines --------------------------------------------------------------------------------


@ensureDeferred
async def test_the_name_lookup_is_under_the_connect_deadline() -> None:
    """A name server that does not respond is a timeout before any work was done."""
    pool = OneProviderPool(Url(scheme="https", host="p.example", port=443))
    pool.lookup.hangs = lambda name: True
    request = pool.send(timeouts=Timeouts(connect=3.0))
    pool.assert_counts(connecting=1)
    pool.clock.advance(2.9)
    assert not request.called
    pool.clock.advance(0.2)
    error = await failure_of(request)

    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_TIMEOUT, False)
    await pool.assert_nothing_left()
    await pool.close()


@ensureDeferred
async def test_the_handshake_is_under_the_connect_deadline() -> None:
    """A provider that accepts and never speaks TLS is a timeout, and its socket is closed."""
    silent = RespondingProvider(None)
    async with pool_of(silent, url_of(silent, "localhost", "https")) as (provider, pool):
        request = pool.send(timeouts=Timeouts(connect=3.0))
        await take(provider.wires)
        pool.clock.advance(3.1)
        error = await failure_of(request)
        await take(provider.closed)
        await pool.assert_nothing_left()
    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_TIMEOUT, False)


@ensureDeferred
async def test_the_head_is_under_the_first_byte_deadline() -> None:
    """A provider that took the request and is silent may have done the work."""
    async with pool_of(RespondingProvider(None)) as (provider, pool):
        request = pool.send(timeouts=Timeouts(connect=3.0, first_byte=30.0))
        await take(provider.wires)
        await until(lambda: pool.counts()["active"] == 1)
        assert pool.reactor.timers() == 1
        pool.clock.advance(29.9)
        assert not has_ended(request)
        pool.clock.advance(0.2)
        error = await failure_of(request)
        await take(provider.closed)
    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_TIMEOUT, True)


@ensureDeferred
async def test_deadlines_end_with_their_phase() -> None:
    """Once the head has come, no deadline of the pool's stands any more."""
    async with pool_of(RespondingProvider()) as (_, pool):
        response = await pool.send(timeouts=Timeouts(connect=3.0, first_byte=30.0))
        assert not pool.reactor.timers()
        response.abort()


# --- closing --------------------------------------------------------------------------------------


@ensureDeferred
async def test_close_ends_connections_in_every_state() -> None:
    """Idle, active or just being made: after ``close`` there is no connection and no timer."""
    provider = RespondingProvider()
    async with pool_of(provider, url_of(provider, "p.example")) as (_, pool):
        await pool.fetch(credential=b"idle")
        response = await pool.send(credential=b"active")
        pool.clock.advance(KEPT)
        pool.lookup.hangs = lambda name: True
        connecting = pool.send(credential=b"connecting", timeouts=Timeouts())
        pool.assert_counts(idle=1, active=1, connecting=1)
        pool.pool.close()
        assert pool.counts()["connecting"] == 0
        with pytest.raises((CancelledError, ProxyError)):
            await connecting
        await pool.assert_nothing_left()
        response.abort()  # harmless by now


@ensureDeferred
async def test_nothing_is_pooled_after_close() -> None:
    """A request that is sent later is served, and its connection is not kept."""
    async with pool_of(RespondingProvider()) as (_, pool):
        pool.pool.close()
        assert await pool.fetch() == b"ok"
        await pool.assert_nothing_left()


# --- no connection at all -------------------------------------------------------------------------


@ensureDeferred
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_refused_connection_is_unreachable(scheme: str) -> None:
    """Where nothing listens the provider is unreachable, by TLS or not."""
    with RespondingProvider(OK) as provider:
        url = url_of(provider, scheme=scheme)
    pool = OneProviderPool(url)
    error = await failure_of(pool.send())

    assert (error.status, error.end) == (502, EndReason.UPSTREAM_UNREACHABLE)
    assert not error.may_have_run
    pool.assert_counts()


@ensureDeferred
@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("127.0.0.1", OSError()),
        ("p.example", OSError(errno.EMFILE, "Too many open files")),
        ("p.example", socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
        ("p.example", socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")),
        ("p.example", UnicodeError("no codec could be loaded")),
    ],
)
async def test_being_out_of_descriptors_is_reported(host: str, said: Exception) -> None:
    """In the lookup, whatever that says, or in connecting: 503, with a hint when to try again."""
    pool = OneProviderPool(Url(scheme="http", host=host, port=1))
    pool.lookup.error = said
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 3), hard))
    try:
        error = await failure_of(pool.send())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert (error.status, error.reason) == (503, "no_descriptors")
    assert dict(error.fields)[b"retry-after"] == b"1"
    pool.assert_counts()


@ensureDeferred
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EBUSY])
async def test_a_lookup_that_was_out_of_descriptors_says_so(number: int) -> None:
    """Its word counts although there are some again when it has ended."""
    pool = OneProviderPool(Url(scheme="http", host="p.example", port=1))
    pool.lookup.error = OSError(number, "no")
    error = await failure_of(pool.send())

    assert (error.status, error.reason) == (503, "no_descriptors")
