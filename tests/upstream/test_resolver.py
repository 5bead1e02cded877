"""The lookup of a provider's name: shared and kept, or one that hangs, fails or cannot begin."""

from __future__ import annotations

import errno
import gc
import socket
import threading
import weakref
from typing import Any

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor

from llmproxy.config import Timeouts, Url
from llmproxy.errors import EndReason
from llmproxy.upstream.resolver import KEPT, PATIENCE, STALE, Resolver
from tests.support.fake_transport import until
from tests.upstream.one_provider import (
    Lookup,
    OneProviderPool,
    RespondingProvider,
    failure_of,
    pool_of,
    url_of,
)

CLOCK: Any = reactor


def named(name: str) -> Url:
    """Return a URL with this name, at which nothing listens."""
    return Url(scheme="http", host=name, port=1)


@ensureDeferred
async def test_a_name_is_looked_up_once_for_all_who_wait() -> None:
    """Requests share a lookup and, for a while, the addresses that it found."""
    provider = RespondingProvider()
    async with pool_of(provider, url_of(provider, "p.example"), size=0) as (_, pool):
        for response in [pool.send(), pool.send()]:
            (await response).abort()
        pool.clock.advance(KEPT - 0.1)
        await pool.fetch()
        assert pool.lookup.names == ["p.example"]
        pool.clock.advance(0.2)
        await pool.fetch()
        assert pool.lookup.names == ["p.example"] * 2


@ensureDeferred
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_an_unknown_name_is_unreachable(scheme: str) -> None:
    """A name without an address makes the provider unreachable; the client gets no name."""
    pool = OneProviderPool(Url(scheme=scheme, host="secret.example", port=1))
    pool.lookup.error = socket.gaierror(socket.EAI_NONAME, "who is that?")
    error = await failure_of(pool.send())

    assert (error.end, error.may_have_run) == (EndReason.UPSTREAM_UNREACHABLE, False)
    assert "secret.example" in error.detail
    assert "who is that?" in error.detail
    assert "secret.example" not in error.message
    pool.assert_counts()


@ensureDeferred
async def test_a_failed_lookup_is_not_kept() -> None:
    """The next request looks the name up again, and is served where the name is known by then."""
    provider = RespondingProvider()
    async with pool_of(provider, url_of(provider, "p.example")) as (_, pool):
        pool.lookup.error = socket.gaierror(socket.EAI_AGAIN, "later")
        await failure_of(pool.send())
        pool.lookup.error = None
        assert await pool.fetch() == b"ok"


@ensureDeferred
async def test_the_last_addresses_are_used_while_a_name_cannot_be_looked_up() -> None:
    """For an hour, and each use is counted; then the provider is unreachable, as its name says."""
    provider = RespondingProvider()
    async with pool_of(provider, url_of(provider, "p.example"), size=0) as (_, pool):
        await pool.fetch()
        pool.lookup.error = socket.gaierror(socket.EAI_AGAIN, "the resolver is down")
        for count in (1, 2):
            pool.clock.advance(KEPT)
            assert await pool.fetch() == b"ok"
            assert pool.resolver.stale == count
        pool.clock.advance(STALE)
        error = await failure_of(pool.send())
        assert "the resolver is down" in error.detail
        pool.lookup.error = None
        assert await pool.fetch() == b"ok"
        assert pool.resolver.stale == 2


@ensureDeferred
async def test_the_last_addresses_are_used_while_a_lookup_hangs() -> None:
    """A silent resolver costs a request a moment, once in ten seconds, and not its deadline."""
    provider = RespondingProvider()
    async with pool_of(provider, url_of(provider, "p.example"), size=0) as (_, pool):
        await pool.fetch()
        pool.lookup.hangs = lambda name: True
        for count in (1, 2):
            pool.clock.advance(KEPT)
            waiting = pool.send()
            pool.clock.advance(PATIENCE - 0.1)
            assert not waiting.called
            pool.clock.advance(0.1)
            (await waiting).abort()
            assert await pool.fetch() == b"ok"
            assert pool.resolver.stale == count
        assert pool.lookup.names == ["p.example"] * 2  # the one that hangs is the only one
        pool.lookup.over.set()
        await until(lambda: not [one for one in threading.enumerate() if one.name == "name"])


@ensureDeferred
async def test_a_failed_lookup_does_not_explain_a_refusal() -> None:
    """Where old addresses refuse, the reason is that; a want of descriptors earlier is not."""
    pool = OneProviderPool(named("p.example"))
    for problem in (None, OSError(errno.EMFILE, "no more")):
        pool.lookup.error = problem
        error = await failure_of(pool.send())
        assert (error.end, error.reason) == (EndReason.UPSTREAM_UNREACHABLE, "upstream_unreachable")
        pool.clock.advance(KEPT)
    assert pool.resolver.stale == 1
    await pool.close()


@ensureDeferred
async def test_a_hanging_name_delays_no_other_provider() -> None:
    """Twenty names hang at once; the provider whose name is found is asked meanwhile."""
    lookup = Lookup()
    lookup.hangs = lambda name: name.startswith("hangs")
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup)
    hanging = [OneProviderPool(named(f"hangs{n}.example"), resolver=resolver) for n in range(20)]
    requests = [pool.send() for pool in hanging]
    provider = RespondingProvider()
    url = url_of(provider, "p.example")
    async with pool_of(provider, url, resolver=resolver) as (_, pool):
        assert await pool.fetch() == b"ok"
    for request, pool in zip(requests, hanging, strict=True):
        assert not request.called
        request.addErrback(lambda failure: None)
        await pool.close()
    lookup.over.set()
    await until(lambda: not [one for one in threading.enumerate() if one.name == "name"])


class WatchedResolver(Resolver):
    """A resolver that keeps a weak reference to whatever waits for its addresses."""

    waiting: list[weakref.ref[Any]]

    def addresses(self, name: str) -> Any:
        found = super().addresses(name)
        self.waiting.append(weakref.ref(found))
        return found


@ensureDeferred
async def test_cancelled_requests_are_not_kept_by_a_name_that_hangs() -> None:
    """However long a lookup takes, a request that was cancelled is forgotten before its end."""
    lookup = Lookup()
    lookup.hangs = lambda name: True
    resolver = WatchedResolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup)
    resolver.waiting = []
    pool = OneProviderPool(named("hangs.example"), resolver=resolver)
    cancelled: list[weakref.ref[Any]] = []
    for _ in range(5):
        request = pool.send(timeouts=Timeouts())
        cancelled.append(weakref.ref(request))
        request.addErrback(lambda failure: None)
        request.cancel()
        del request
    gc.collect()
    assert len(resolver.waiting) == 5
    assert [ref for ref in cancelled + resolver.waiting if ref() is not None] == []
    lookup.over.set()
    await pool.close()


@ensureDeferred
async def test_a_lookup_that_cannot_begin_fails_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no thread can be started the request fails, and the next one is looked up again."""

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    provider = RespondingProvider()
    async with pool_of(provider, url_of(provider, "p.example")) as (_, pool):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_more)
            failed = pool.send()
        error = await failure_of(failed)
        assert error.end in (EndReason.UPSTREAM_UNREACHABLE, EndReason.REJECTED)
        assert await pool.fetch() == b"ok"
