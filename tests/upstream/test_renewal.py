"""Providers' connections from one configuration to the next: which stay, and how the others end."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from pytest_twisted import ensureDeferred

from llmproxy.config import Limits, Secret, Timeouts, Url
from llmproxy.config import Provider as ProviderConfig
from llmproxy.dialects.dialect import Dialect
from llmproxy.upstream.client import connection_key
from llmproxy.upstream.pool import ProviderPool
from tests.support.fake_transport import turn, until
from tests.support.tls import Authority
from tests.upstream.one_provider import (
    RespondingProvider,
    config_of,
    read,
    upstream_of,
    url_of,
)


def changed(provider: ProviderConfig, **fields: Any) -> ProviderConfig:
    """Return a provider with other fields."""
    values = {name: getattr(provider, name) for name in provider.__struct_fields__}
    return ProviderConfig(**{**values, **fields})


SAME = {
    "default headers": {"headers": (("x-a", "b"),)},
    "deadlines of requests": {"timeouts": {"idle": 1.0, "connect": 2.0}},
    "a path before the request's": {"url": "/v2"},
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
    """Where nothing has changed that connections depend on, the next request takes a warm one."""
    async with upstream_of(RespondingProvider()) as (provider, upstream):
        await upstream.fetch()
        if path := fields.get("url"):
            fields = {"url": Url(scheme="http", host="127.0.0.1", port=provider.port, path=path)}
        upstream.follow(changed(upstream.provider, **fields))
        assert upstream.count("idle") == 1
        await upstream.fetch()
        assert provider.accepted == 1


@pytest.mark.parametrize("fields", OTHER.values(), ids=OTHER)
@ensureDeferred
async def test_a_provider_that_is_another_begins_anew(fields: dict[str, Any]) -> None:
    """An idle connection is closed at once; a busy one serves its response, and is not kept."""
    async with upstream_of(RespondingProvider()) as (provider, upstream):
        running = await upstream.send()
        await upstream.fetch()
        upstream.follow(changed(upstream.provider, **fields))
        await until(lambda: upstream.count("idle") == 0)
        assert upstream.count("active") == 1
        await upstream.fetch()
        assert provider.accepted == 3
        assert await read(running) == b"ok"
        await until(lambda: upstream.count("active") == 0)
        assert upstream.count("idle") == 1


@ensureDeferred
async def test_a_provider_that_moves_is_followed() -> None:
    """New requests go to the new place; a request that began before still finds the old one."""
    async with upstream_of(RespondingProvider()) as (old, upstream):
        with RespondingProvider() as new:
            before = upstream.follow(changed(upstream.provider, url=url_of(new)))
            await upstream.fetch()
            assert (old.accepted, new.accepted) == (0, 1)
            await upstream.fetch(through=before)
            assert (old.accepted, new.accepted) == (1, 1)
            await until(lambda: upstream.count("active") == 0)
            assert upstream.count("idle") == 1


@ensureDeferred
async def test_a_provider_that_is_gone_is_counted_to_its_end() -> None:
    """Its running responses are connections as long as they last, and end with the process."""
    async with upstream_of(RespondingProvider()) as (_, upstream):
        first, second = await upstream.send(), await upstream.send()
        upstream.follow()
        upstream.follow()
        assert upstream.count("active") == 2
        assert await read(first) == b"ok"
        await until(lambda: upstream.count("active") == 1)
        upstream.upstream.close()
        await until(lambda: upstream.count("active") == 0)
        second.abort()


def pools() -> int:
    """Return how many pools there are."""
    gc.collect()
    return sum(isinstance(one, ProviderPool) for one in gc.get_objects())


@ensureDeferred
async def test_what_is_replaced_is_let_go_of() -> None:
    """No trace of the old pool stays once nothing runs on it, nor of its credential."""
    before = pools()
    async with upstream_of(RespondingProvider()) as (_, upstream):
        secret = Secret("old")
        upstream.follow(changed(upstream.provider, credential=secret))
        await upstream.fetch()
        upstream.follow(changed(upstream.provider, credential=Secret("new")))
        await until(lambda: not any(upstream.counts().values()))
        await turn()
        assert pools() == before + 1
        assert [one for one in gc.get_referrers(secret) if isinstance(one, ProviderConfig)] == []


def test_an_authority_is_known_by_its_content(tmp_path: Path) -> None:
    """A file of the same name may hold other certificates by now."""
    (tmp_path / "other").mkdir()
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    url = Url(scheme="https", host="localhost", port=1)
    provider = ProviderConfig(name="p", url=url, dialect=Dialect.RAW, ca=str(authority.ca_path))
    before = connection_key(provider, config_of(provider))
    assert connection_key(provider, config_of(provider)) == before
    authority.ca_path.write_bytes(other.ca_path.read_bytes())
    assert connection_key(provider, config_of(provider)) != before


def test_limits_of_responses_count_too() -> None:
    """A limit or a deadline of connections makes another key, and one of requests the same key."""
    provider = ProviderConfig(
        name="p", url=Url(scheme="http", host="a", port=1), dialect=Dialect.RAW
    )
    before = connection_key(provider, config_of(provider))
    assert connection_key(provider, config_of(provider, limits=Limits(response_head=1))) != before
    assert connection_key(provider, config_of(provider, limits=Limits(request_head=1))) == before
    assert connection_key(provider, config_of(provider, timeouts=Timeouts(pool_idle=1.0))) != before
