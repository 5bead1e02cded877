"""Each SDK's way to show a key says who calls, and the provider sees its own key and no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
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


def openai_key(base: str) -> None:
    """``api_key=`` of the OpenAI SDK: a Bearer."""
    with openai.OpenAI(base_url=f"{base}/v1", api_key=KEY, **OPTIONS) as client:
        client.chat.completions.create(**CHAT)


def openai_key_from_the_environment(base: str) -> None:
    """``OPENAI_API_KEY``, as programs are deployed."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENAI_API_KEY", KEY)
        environment.setenv("OPENAI_BASE_URL", f"{base}/v1")
        with openai.OpenAI(**OPTIONS) as client:
            client.chat.completions.create(**CHAT)


def azure_key(base: str) -> None:
    """The ``api-key`` of the OpenAI SDK's Azure client, whose path names the model."""
    with openai.AzureOpenAI(
        base_url=f"{base}/v1", api_key=KEY, api_version="2024-10-21", **OPTIONS
    ) as client:
        client.chat.completions.create(**CHAT)


def anthropic_key(base: str) -> None:
    """``api_key=`` of the Anthropic SDK."""
    with anthropic.Anthropic(base_url=base, api_key=KEY, **OPTIONS) as client:
        client.messages.create(**MESSAGE)


def anthropic_token(base: str) -> None:
    """``auth_token=`` of the Anthropic SDK: a Bearer."""
    with anthropic.Anthropic(base_url=base, auth_token=KEY, **OPTIONS) as client:
        client.messages.create(**MESSAGE)


def anthropic_header(base: str) -> None:
    """``x-api-key``, as the Anthropic API has it and other clients of it send it."""
    headers = {"X-Api-Key": KEY}
    with anthropic.Anthropic(base_url=base, default_headers=headers, **OPTIONS) as client:
        client.messages.create(**MESSAGE)


def ollama_header(base: str) -> None:
    """A header field of one's own in the Ollama SDK."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with ollama.Client(host=base, headers=headers, timeout=WAIT) as client:
        client.chat(**CHAT)


def ollama_key_from_the_environment(base: str) -> None:
    """``OLLAMA_API_KEY``: a Bearer."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OLLAMA_API_KEY", KEY)
        with ollama.Client(host=base, timeout=WAIT) as client:
            client.chat(**CHAT)


def openai_async_key_that_is_fetched(base: str) -> None:
    """A function in place of a key, in the async client of the OpenAI SDK."""

    async def fetch() -> str:
        return KEY

    async def scene() -> None:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=fetch, **OPTIONS) as client:
            await client.chat.completions.create(**CHAT)

    asyncio.run(scene())


SHOWN = [
    ("openai", openai_key),
    ("openai", openai_key_from_the_environment),
    ("openai", openai_async_key_that_is_fetched),
    ("openai", azure_key),
    ("anthropic", anthropic_key),
    ("anthropic", anthropic_token),
    ("anthropic", anthropic_header),
    ("ollama", ollama_header),
    ("ollama", ollama_key_from_the_environment),
]


@pytest.mark.parametrize(("sdk", "show"), SHOWN, ids=[show.__name__ for _, show in SHOWN])
def test_key_is_known_however_the_sdk_shows_it(
    sdk: str, show: Callable[[str], None], directed: DirectedProvider
) -> None:
    """The caller is served, and the provider, which needs no key, sees none."""
    show(route(directed.proxy, sdk))
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
    """With pass_credential the SDK's key is the provider's; who calls is said in our own field."""
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
