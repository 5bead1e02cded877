"""Providers' connections from one configuration to the next: which stay, and how the others end."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred

from llmproxy.config import Config, Limits, Secret, Timeouts, Url
from llmproxy.config import Provider as ProviderConfig
from llmproxy.dialects.dialect import Dialect
from llmproxy.upstream.client import Upstream, connection_key
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, TurnedReactor, turn, until
from tests.support.sockets import Provider, Wire
from tests.support.tls import Authority

OFF = Timeouts(connect=None, first_byte=None)
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def response(wire: Wire) -> None:
    """A provider's script: answer until the client's end."""
    while True:
        wire.read_request()
        wire.send(WHOLE)


class Rig:
    """An upstream that is made anew for each configuration, and its one provider ``p``."""

    def __init__(self, peer: Provider) -> None:
        url = Url(scheme="http", host="127.0.0.1", port=peer.port)
        self.reactor = TurnedReactor()
        self.config = config(ProviderConfig(name="p", url=url, dialect=Dialect.RAW))
        self.upstream = Upstream(self.reactor, self.reactor.seconds, self.config)

    def follow(self, config: Config) -> Upstream:
        """Take up another configuration; return what there was before."""
        before = self.upstream
        self.upstream = Upstream(self.reactor, self.reactor.seconds, config, before=before)
        self.upstream.take_over(before)
        self.config = config
        return before

    async def send(self, upstream: Upstream | None = None) -> Response:
        """Send one request; return the head of its response."""
        return await (upstream or self.upstream).send(
            self.config.providers["p"], "GET", b"/", [], b"", credential=b"", timeouts=OFF
        )

    async def fetch(self, upstream: Upstream | None = None) -> bytes:
        """Send one request; return the body of its response."""
        return await read(await self.send(upstream))

    def count(self, state: str) -> int:
        """Return how many connections to ``p`` there are in this state."""
        return self.upstream.counts().get(("p", state), 0)

    async def rest(self) -> None:
        """Close what is open; nothing may be left."""
        self.upstream.close()
        await until(lambda: not any(self.upstream.counts().values()))
        assert not self.reactor.timers()


def config(*providers: ProviderConfig, **parts: Any) -> Config:
    """Return a configuration of these providers."""
    return Config(providers={one.name: one for one in providers}, **parts)


def changed(provider: ProviderConfig, **fields: Any) -> ProviderConfig:
    """Return a provider with other fields."""
    values = {name: getattr(provider, name) for name in provider.__struct_fields__}
    return ProviderConfig(**{**values, **fields})


async def read(response: Response) -> bytes:
    """Read a response's body."""
    collector = Collector()
    response.deliverBody(collector)
    await collector.ended
    return collector.body


SAME = {
    "default headers": {"headers": (("x-a", "b"),)},
    "deadlines of requests": {"timeouts": {"idle": 1.0, "connect": 2.0}},
    "a path before the request's": {"url_path": "/v2"},
    "another dialect": {"dialect": Dialect.OPENAI},
}
OTHER = {
    "a credential": {"credential": Secret("new")},
    "a way to write it": {"credential": Secret("new"), "format": "Key {}"},
    "callers' own credentials": {"pass_credential": True},
    "a pool": {"pool": 7},
    "a time to keep connections": {"timeouts": {"pool_idle": 1.0}},
}


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
@ensureDeferred
async def test_a_provider_keeps_its_pool(fields: dict[str, Any]) -> None:
    """Where nothing has changed that connections depend on: the next request takes a warm one."""
    with Provider(response) as peer:
        rig = Rig(peer)
        assert await rig.fetch() == b"ok"
        provider = rig.config.providers["p"]
        fields = dict(fields)
        if path := fields.pop("url_path", ""):
            fields["url"] = Url(scheme="http", host="127.0.0.1", port=peer.port, path=path)
        rig.follow(config(changed(provider, **fields)))
        assert rig.count("idle") == 1
        assert await rig.fetch() == b"ok"
        assert peer.accepted == 1
        await rig.rest()


@pytest.mark.parametrize("fields", OTHER.values(), ids=OTHER)
@ensureDeferred
async def test_a_provider_that_is_another_begins_anew(fields: dict[str, Any]) -> None:
    """What is idle is closed at once, and what runs goes on to its end, and is not kept."""
    with Provider(response) as peer:
        rig = Rig(peer)
        running = await rig.send()
        idle = await rig.send()
        assert await read(idle) == b"ok"
        rig.follow(config(changed(rig.config.providers["p"], **fields)))
        await until(lambda: rig.count("idle") == 0)
        assert rig.count("active") == 1
        assert await rig.fetch() == b"ok"
        assert peer.accepted == 3
        assert await read(running) == b"ok"
        await until(lambda: rig.count("active") == 0)
        assert rig.count("idle") == 1
        await rig.rest()


@ensureDeferred
async def test_a_provider_that_moves_is_followed() -> None:
    """New requests go to the new place; a request that began before still finds the old one."""
    with Provider(response) as old, Provider(response) as new:
        rig = Rig(old)
        provider = rig.config.providers["p"]
        url = Url(scheme="http", host="127.0.0.1", port=new.port)
        before = rig.follow(config(changed(provider, url=url)))
        assert await rig.fetch() == b"ok"
        assert (old.accepted, new.accepted) == (0, 1)
        assert await rig.fetch(before) == b"ok"
        assert (old.accepted, new.accepted) == (1, 1)
        await until(lambda: rig.count("active") == 0)
        assert rig.count("idle") == 1
        await rig.rest()


@ensureDeferred
async def test_a_provider_that_is_gone_is_counted_to_its_end() -> None:
    """Its running responses are connections as long as they last, and end with the process."""
    with Provider(response) as peer:
        rig = Rig(peer)
        first, second = await rig.send(), await rig.send()
        rig.follow(config())
        rig.follow(config())
        assert rig.count("active") == 2
        assert await read(first) == b"ok"
        await until(lambda: rig.count("active") == 1)
        rig.upstream.close()
        await until(lambda: rig.count("active") == 0)
        second.abort()
        await rig.rest()


@ensureDeferred
async def test_what_is_replaced_is_let_go_of() -> None:
    """No trace of the old pool stays once nothing runs on it, nor of its credential."""
    with Provider(response) as peer:
        rig = Rig(peer)
        assert await rig.fetch() == b"ok"
        secret = Secret("old")
        provider = changed(rig.config.providers["p"], credential=secret)
        rig.follow(config(provider))
        assert await rig.fetch() == b"ok"
        pool = weakref.ref(rig.upstream._reached["p"].pool)
        rig.follow(config(changed(provider, credential=Secret("new"))))
        await until(lambda: not any(rig.upstream.counts().values()))
        await turn()
        gc.collect()
        assert pool() is None
        del provider
        assert [one for one in gc.get_referrers(secret) if isinstance(one, ProviderConfig)] == []
        await rig.rest()


def test_an_authority_is_known_by_its_content(tmp_path: Path) -> None:
    """A file of the same name may hold other certificates by now."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    url = Url(scheme="https", host="localhost", port=1)
    provider = ProviderConfig(name="p", url=url, dialect=Dialect.RAW, ca=str(authority.ca_path))
    before = connection_key(provider, config(provider))
    assert connection_key(provider, config(provider)) == before
    authority.ca_path.write_bytes(other.ca_path.read_bytes())
    assert connection_key(provider, config(provider)) != before


def test_limits_of_responses_count_too() -> None:
    """What a connection was made with is what it goes by."""
    provider = ProviderConfig(
        name="p", url=Url(scheme="http", host="a", port=1), dialect=Dialect.RAW
    )
    before = connection_key(provider, config(provider))
    assert connection_key(provider, config(provider, limits=Limits(response_head=1))) != before
    assert connection_key(provider, config(provider, limits=Limits(request_head=1))) == before
    assert connection_key(provider, config(provider, timeouts=Timeouts(pool_idle=1.0))) != before
