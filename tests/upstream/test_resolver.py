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
from tests.support.fake_transport import TurnedReactor, until
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

    def addresses(self, name: str, caller: str = "") -> Any:
        found = super().addresses(name, caller)
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


# --- names that callers choose --------------------------------------------------------------------


def rows(*addresses: str) -> list[Any]:
    """Return what ``getaddrinfo`` returns."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses]


@ensureDeferred
async def test_so_many_lookups_are_under_way_and_no_more() -> None:
    """A thousand names start a few threads; each name has its turn, in order."""
    at_once, most = 0, 0
    lock, names = threading.Lock(), list[str]()
    go_on = threading.Semaphore(0)

    def lookup(name: str, *_: object) -> list[Any]:
        nonlocal at_once, most
        with lock:
            at_once, most = at_once + 1, max(most, at_once + 1)
            names.append(name)
        go_on.acquire()
        with lock:
            at_once -= 1
        return rows("192.0.2.1")

    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup, most_lookups=3)
    wanted = [f"n{number}.example" for number in range(1000)]
    found = [resolver.addresses(name) for name in wanted]
    await until(lambda: len(names) == 3)
    for _ in wanted:
        go_on.release()
    for one in found:
        assert await one == [(socket.AF_INET, "192.0.2.1")]
    assert most == 3
    assert sorted(names) == sorted(wanted)


@ensureDeferred
async def test_a_caller_cannot_keep_others_from_asking() -> None:
    """Its names that hang take its own part; another caller's name is looked up at once."""
    lookup = Lookup()
    lookup.hangs = lambda name: name.startswith("hangs")
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup, most_lookups=3, most_of_one=2)
    hanging = [resolver.addresses(f"hangs{number}.example", "greedy") for number in range(50)]
    common = resolver.addresses("common.example", "greedy")
    assert await resolver.addresses("common.example", "other")
    assert await common
    for number in range(5):  # one after another, each has the place that is left
        assert await resolver.addresses(f"n{number}.example", "other")
    assert sorted(one for one in lookup.names if "hangs" in one) == [
        "hangs0.example",
        "hangs1.example",
    ]
    lookup.over.set()
    for one in hanging:
        assert await one
    assert len(lookup.names) == 56
    assert not resolver._under_way
    assert not resolver._callers


@ensureDeferred
async def test_a_name_that_nobody_waits_for_any_more_has_no_turn() -> None:
    """What was cancelled in the line is forgotten; the name can be asked for again."""
    lookup = Lookup()
    lookup.hangs = lambda name: name == "hangs.example"
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup, most_lookups=1)
    hangs = resolver.addresses("hangs.example")
    for name in ("a.example", "b.example"):
        waits = resolver.addresses(name)
        waits.addErrback(lambda failure: None)
        waits.cancel()
    again = resolver.addresses("b.example")
    lookup.over.set()
    assert await hangs
    assert await again
    assert lookup.names == ["hangs.example", "b.example"]
    assert not resolver._waiting


@ensureDeferred
async def test_so_many_names_are_remembered_and_no_more() -> None:
    """Those that were found, and those that were not; the oldest are forgotten."""
    lookup = Lookup()
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup, most_names=2)
    for error in (None, socket.gaierror(socket.EAI_NONAME, "who?")):
        lookup.error = error
        for number in range(5):
            await resolver.addresses(f"n{number}{error is None}.example")
    assert list(resolver._kept) == ["n3True.example", "n4True.example"]
    assert list(resolver.failures) == ["n3False.example", "n4False.example"]


@ensureDeferred
async def test_a_name_that_was_forgotten_meanwhile_is_waited_for() -> None:
    """Its addresses of before are gone when its patience is over."""
    turned, lookup = TurnedReactor(), Lookup()
    clock = turned.clock
    resolver = Resolver(turned, clock.seconds, getaddrinfo=lookup, most_names=1)
    await resolver.addresses("a.example")
    clock.advance(KEPT)
    lookup.hangs = lambda name: name == "a.example"
    waits = resolver.addresses("a.example")
    await resolver.addresses("b.example")
    clock.advance(PATIENCE)
    assert not waits.called
    lookup.over.set()
    assert await waits


@ensureDeferred
async def test_a_name_with_endless_addresses_is_cut() -> None:
    """Whoever owns a name decides how many there are."""
    many = rows(*(f"192.0.{high}.{low}" for high in range(8) for low in range(256)))
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lambda *_: many)
    assert len(await resolver.addresses("many.example")) == 64


@ensureDeferred
async def test_names_in_the_line_fail_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many there are: one does not wait on the other."""
    lookup = Lookup()
    lookup.hangs = lambda name: True
    resolver = Resolver(CLOCK, CLOCK.seconds, getaddrinfo=lookup, most_lookups=1)
    first = resolver.addresses("hangs.example")
    others = [resolver.addresses(f"n{number}.example") for number in range(2000)]

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    lookup.over.set()
    assert await first
    for one in others:
        assert await one == []
