"""Each SDK's way to show a key says who calls, and the provider sees its own key and no other."""

from __future__ import annotations

import asyncio
from operator import attrgetter
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.sdk.clients import OPTIONS
from tests.sdk.directed_provider import PATHS, DirectedProvider
from tests.sdk.sdks import KEY, WAYS, Question, Way, access_line, route, text_of, user
from tests.support.sockets import WAIT, Received

CHAT: Any = {"model": "m", "messages": user("hi")}
MESSAGE: Any = {**CHAT, "max_tokens": 9}
KEY_FIELDS = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"x-llmproxy-key")


def keys_in(request: Received) -> dict[bytes, list[bytes]]:
    """Return the fields of a request that can carry a key."""
    return {name: values for name in KEY_FIELDS if (values := request.values(name))}


def holds(request: Received, secret: str) -> bool:
    """Tell whether anything in a request holds a secret."""
    parts = [request.target, request.body, *(part for field in request.fields for part in field)]
    return any(secret.encode() in part for part in parts)


# From the caller to the proxy


def fetch() -> str:
    """Return the key: some programs give the SDK a function in its place."""
    return KEY


async def fetch_async() -> str:
    """Do the same for an async client."""
    return KEY


BEARER = {"Authorization": f"Bearer {KEY}"}
SHOWN: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "openai, api_key": ("openai", openai.OpenAI, {"api_key": KEY}),
    "openai, environment": ("openai", openai.OpenAI, {}),
    "openai, a function": ("openai", openai.OpenAI, {"api_key": fetch}),
    "openai, async function": ("openai", openai.AsyncOpenAI, {"api_key": fetch_async}),
    "openai, Azure": ("openai", openai.AzureOpenAI, {"api_key": KEY, "api_version": "2024-10-21"}),
    "anthropic, api_key": ("anthropic", anthropic.Anthropic, {"api_key": KEY}),
    "anthropic, auth_token": ("anthropic", anthropic.Anthropic, {"auth_token": KEY}),
    "anthropic, a header": (
        "anthropic",
        anthropic.Anthropic,
        {"default_headers": {"X-Api-Key": KEY}},
    ),
    "ollama, a header": ("ollama", ollama.Client, {"headers": BEARER}),
    "ollama, environment": ("ollama", ollama.Client, {}),
}
"""How a client is made that shows the key: its SDK, its class and its arguments."""
CALLS = {"openai": "chat.completions.create", "anthropic": "messages.create", "ollama": "chat"}


@pytest.mark.parametrize("how", SHOWN)
def test_key_is_known_however_the_sdk_shows_it(
    how: str, directed: DirectedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is served, and the provider, which needs no key, sees none."""
    sdk, kind, options = SHOWN[how]
    if how.endswith("environment"):
        monkeypatch.setenv(f"{sdk.upper()}_API_KEY", KEY)
    base = route(directed.proxy, sdk)
    if sdk == "ollama":
        client = kind(host=base, timeout=WAIT, **options)
    else:
        client = kind(base_url=base + ("/v1" if sdk == "openai" else ""), **OPTIONS, **options)
    call = attrgetter(CALLS[sdk])(client)

    async def scene() -> None:
        async with client:
            await call(**CHAT)

    if kind is openai.AsyncOpenAI:
        asyncio.run(scene())
    else:
        with client:
            call(**(MESSAGE if sdk == "anthropic" else CHAT))
    (request,) = directed.received
    assert keys_in(request) == {}
    assert not holds(request, KEY)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_provider_sees_its_own_key_in_place_of_the_callers(
    way: Way, directed: DirectedProvider
) -> None:
    """The credential stands in the one field of the dialect; the caller's is nowhere."""
    outcome = way.ask(Question(base=route(directed.proxy, f"keyed-{way.sdk}")))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    (request,) = directed.received
    own = f"provider-key-of-{way.sdk}".encode()
    if way.sdk == "anthropic":
        assert keys_in(request) == {b"x-api-key": [own]}
    else:
        assert keys_in(request) == {b"authorization": [b"Bearer " + own]}
    assert not holds(request, KEY)
    assert own.decode() not in str(directed.proxy.log)
    assert access_line(directed.proxy, outcome.session)["client"] == "team"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_callers_own_key_crosses_where_the_route_says_so(
    way: Way, directed: DirectedProvider
) -> None:
    """The SDK's key goes to the provider; our own field names the client."""
    base = route(directed.proxy, f"passing-{way.sdk}")
    outcome = way.ask(Question(base=base, key="callers-own-key", headers={"x-llmproxy-key": KEY}))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    (request,) = directed.received
    assert keys_in(request) == {b"authorization": [b"Bearer callers-own-key"]}
    assert not holds(request, KEY)
    assert access_line(directed.proxy, outcome.session)["client"] == "team"


# From the proxy to the provider


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_request_arrives_as_the_sdk_made_it(way: Way, directed: DirectedProvider) -> None:
    """Path, agent and the SDK's own fields cross; the fields of the hop are our own."""
    way.ask(Question(base=route(directed.proxy, way.sdk), headers={"x-trace-of-mine": "yes"}))
    (request,) = directed.received
    assert (request.method, request.target) == (b"POST", PATHS[way.sdk])
    assert request.values(b"x-trace-of-mine") == [b"yes"]
    assert request.values(b"content-type") == [b"application/json"]
    assert request.values(b"accept") == [b"application/json"]
    (agent,) = request.values(b"user-agent")
    (host,) = request.values(b"host")
    assert way.sdk.encode() in agent.lower()
    assert host != b"127.0.0.1:%d" % directed.proxy.port
    assert len(request.values(b"via")) == len(request.values(b"x-request-id")) == 1
    if way.sdk == "anthropic":
        assert request.values(b"anthropic-version")
    if way.sdk != "ollama":
        assert request.values(b"x-stainless-lang") == [b"python"]
