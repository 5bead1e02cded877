"""Each SDK's way to show a key says who calls, and the provider sees its own key and no other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.sdk.sdks import KEY, SDKS, WAYS, Question, Way, access_line, route, text_of, user
from tests.sdk.stage import PATHS, Stage
from tests.support.daemon import Daemon
from tests.support.sockets import WAIT, Received

OPTIONS: Any = {"max_retries": 0, "timeout": WAIT}
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
    sdk: str, show: Callable[[str], None], stage: Stage, stage_proxy: Daemon
) -> None:
    """The caller is served, and the provider, which needs no key, sees none."""
    show(route(stage_proxy, sdk))
    (request,) = stage.received
    assert keys_in(request) == {}
    assert not holds(request, KEY)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_provider_sees_its_own_key_in_place_of_the_callers(
    way: Way, stage: Stage, stage_proxy: Daemon
) -> None:
    """The credential stands in the one field of the dialect; the caller's is nowhere."""
    outcome = way.ask(Question(base=route(stage_proxy, f"keyed-{way.sdk}")))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    (request,) = stage.received
    own = f"provider-key-of-{way.sdk}".encode()
    if way.sdk == "anthropic":
        assert keys_in(request) == {b"x-api-key": [own]}
    else:
        assert keys_in(request) == {b"authorization": [b"Bearer " + own]}
    assert not holds(request, KEY)
    assert own.decode() not in str(stage_proxy.log)
    assert access_line(stage_proxy, outcome.session)["client"] == "team"


@pytest.mark.parametrize("sdk", SDKS)
def test_two_keys_that_disagree_are_refused(sdk: str, stage: Stage, stage_proxy: Daemon) -> None:
    """A good key beside a wrong one is a 401, and the provider hears of neither."""
    way = Way(sdk, is_async=False, stream=False)
    outcome = way.ask(Question(base=route(stage_proxy, sdk), headers={"x-api-key": "another-key"}))
    assert outcome.failure.status_code == 401
    assert outcome.headers["x-llmproxy-error"] == "unknown_key"
    assert stage.received == []


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_callers_own_key_crosses_where_the_route_says_so(
    way: Way, stage: Stage, stage_proxy: Daemon
) -> None:
    """With pass_credential the SDK's key is the provider's; who calls is said in our own field."""
    base = route(stage_proxy, f"passing-{way.sdk}")
    outcome = way.ask(Question(base=base, key="callers-own-key", headers={"x-llmproxy-key": KEY}))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    (request,) = stage.received
    assert keys_in(request) == {b"authorization": [b"Bearer callers-own-key"]}
    assert not holds(request, KEY)
    assert access_line(stage_proxy, outcome.session)["client"] == "team"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_own_key_alone_does_not_say_who_calls(way: Way, stage: Stage, stage_proxy: Daemon) -> None:
    """With pass_credential a client's key in the SDK's field is the provider's business: 401."""
    outcome = way.ask(Question(base=route(stage_proxy, f"passing-{way.sdk}")))
    assert outcome.headers["x-llmproxy-error"] == "no_key"
    assert stage.received == []


# From the proxy to the provider


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_model_is_overridden_and_nothing_else(way: Way, stage: Stage, stage_proxy: Daemon) -> None:
    """The provider is asked for the route's model in otherwise the very bytes of the SDK."""
    asked = Question(base=route(stage_proxy, f"keyed-{way.sdk}"), model="the-model-here")
    renamed = Question(base=route(stage_proxy, f"renamed-{way.sdk}"), model="the-model-here")
    way.ask(asked)
    outcome = way.ask(renamed)
    assert text_of(way.sdk, outcome.response) == "Hello there"
    before, after = stage.received
    assert json.loads(after.body)["model"] == "the-model-there"
    assert after.body == before.body.replace(b"the-model-here", b"the-model-there")
    assert after.values(b"content-length") == [b"%d" % len(after.body)]
    assert access_line(stage_proxy, outcome.session)["model"] == "the-model-here"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_request_arrives_as_the_sdk_made_it(way: Way, stage: Stage, stage_proxy: Daemon) -> None:
    """Path, agent and the SDK's own fields cross; the fields of the hop are our own."""
    way.ask(Question(base=route(stage_proxy, way.sdk), headers={"x-trace-of-mine": "yes"}))
    (request,) = stage.received
    assert (request.method, request.target) == (b"POST", PATHS[way.sdk])
    assert request.values(b"x-trace-of-mine") == [b"yes"]
    assert request.values(b"content-type") == [b"application/json"]
    assert request.values(b"accept") == [b"application/json"]
    (agent,) = request.values(b"user-agent")
    (host,) = request.values(b"host")
    assert way.sdk.encode() in agent.lower()
    assert host != b"127.0.0.1:%d" % stage_proxy.port
    assert len(request.values(b"via")) == len(request.values(b"x-request-id")) == 1
    if way.sdk == "anthropic":
        assert request.values(b"anthropic-version")
    if way.sdk != "ollama":
        assert request.values(b"x-stainless-lang") == [b"python"]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_request_id_of_the_caller_crosses(way: Way, stage: Stage, stage_proxy: Daemon) -> None:
    """A caller's own x-request-id reaches the provider and the record."""
    outcome = way.ask(
        Question(base=route(stage_proxy, way.sdk), headers={"x-request-id": "mine-17"})
    )
    (request,) = stage.received
    assert request.values(b"x-request-id") == [b"mine-17"]
    line = access_line(stage_proxy, outcome.session)
    assert line["client_request_id"] == "mine-17"
    assert line["id"] != "mine-17"


def test_connections_to_the_provider_are_kept_apart_by_key(
    stage: Stage, stage_proxy: Daemon
) -> None:
    """Two keys that cross never meet on one connection; the same key finds its own again."""
    way = Way("openai", is_async=False, stream=False)
    base = route(stage_proxy, "passing-openai")
    wires: list[Any] = []
    accept = stage.response

    def note(wire: Any, request: Received) -> None:
        wires.append(wire)
        accept(wire, request)

    stage.response = note
    for key in ("first-key", "second-key", "first-key"):
        outcome = way.ask(Question(base=base, key=key, headers={"x-llmproxy-key": KEY}))
        assert text_of("openai", outcome.response) == "Hello there"
    first, second, third = wires
    assert first is third
    assert first is not second
