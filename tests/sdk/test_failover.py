"""Several providers for a route, as SDKs see them: one response, or one exception of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.sdk.directed_provider import DirectedProvider, Response
from tests.sdk.sdks import WAYS, Question, Way, route, text_of, trace_of
from tests.sdk.test_errors import assert_raised
from tests.support.daemon import Daemon, provider_table
from tests.support.live_proxy import client_config
from tests.support.sockets import Provider, Received, Wire

KEY = "key-of-team"
NO_CIRCUIT = "health = { failures = 0 }"
SDKS = ("openai", "anthropic", "ollama")


class Two(NamedTuple):
    """A proxy with two providers for each SDK's route."""

    proxy: Daemon
    first: DirectedProvider
    second: DirectedProvider


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    first, second = DirectedProvider(), DirectedProvider()
    with Provider(first.play) as one, Provider(second.play) as other:
        config = client_config("team", KEY)
        for sdk in SDKS:
            for number, url in enumerate((one.url, other.url), 1):
                config += provider_table(f"{sdk}-{number}", NO_CIRCUIT, url=url, dialect=sdk)
            config += f'[[routes]]\npath = "/{sdk}"\nproviders = ["{sdk}-1", "{sdk}-2"]\n'
        with Daemon(tmp_path_factory.mktemp("two"), config, proxy="") as proxy:
            yield Two(proxy, first, second)


@pytest.fixture(autouse=True)
def _as_at_first(two: Two) -> None:
    two.first.reset()
    two.second.reset()


def refusing(status: int, *fields: bytes) -> Response:
    """Return what refuses every request."""

    def refuse(wire: Wire, request: Received) -> None:
        head = b"\r\n".join([b"HTTP/1.1 %d No" % status, *fields, b"content-length: 2"])
        wire.send(head, b"\r\n\r\n{}")

    return refuse


def question(two: Two, way: Way, model: str, retries: int = 0) -> Question:
    """Return a question about a model of its own: cooldowns are by model."""
    more = {"model": model}
    return Question(base=route(two.proxy, way.sdk), key=KEY, retries=retries, more=more)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("status", [429, 503, 529])
def test_the_sdk_never_hears_of_the_first_provider(two: Two, way: Way, status: int) -> None:
    """It gets what the second one sent."""
    two.first.response = refusing(status)
    outcome = way.ask(question(two, way, f"failing-{status}"))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    assert [len(one.received) for one in (two.first, two.second)] == [1, 1]
    record = trace_of(two.proxy, outcome.session)
    tried = [(one["provider"], one["outcome"]) for one in record["attempts"]]
    assert tried == [(f"{way.sdk}-1", "upstream_refused"), (f"{way.sdk}-2", "ok")]
    assert record["is_complete"]


RETRYING = [Way(sdk, is_async=False, stream=stream) for sdk in SDKS[:2] for stream in (True, False)]


@pytest.mark.parametrize("way", RETRYING, ids=str)
def test_where_all_cool_down_the_sdk_raises_its_rate_limit_error(two: Two, way: Way) -> None:
    """With the soonest time to come again where it looks for it; nobody is asked."""
    model = f"cooling-{way}"
    two.first.response = refusing(429, b"retry-after: 90")
    two.second.response = refusing(429, b"retry-after: 30")
    asking = question(two, way, model)
    began = time.monotonic()
    assert_raised(way, way.ask(asking), 429)
    outcome = way.ask(asking)
    passed = time.monotonic() - began
    assert_raised(way, outcome, 429)
    assert outcome.headers["x-llmproxy-error"] == "all_cooling"
    assert 30 - passed <= int(outcome.headers["retry-after"]) <= 30
    assert "x-should-retry" not in outcome.headers
    assert [len(one.received) for one in (two.first, two.second)] == [1, 1]


@pytest.mark.parametrize("way", RETRYING, ids=str)
def test_the_sdks_own_retry_finds_a_provider_that_is_ready_again(two: Two, way: Way) -> None:
    """It waits as long as it is told, and is served."""
    model = f"ready-{way}"
    refuse, respond = refusing(429, b"retry-after-ms: 300"), two.second.response
    two.first.response = two.second.response = refuse
    assert_raised(way, way.ask(question(two, way, model)), 429)
    two.first.response = two.second.response = respond
    outcome = way.ask(question(two, way, model, retries=3))
    assert text_of(way.sdk, outcome.response) == "Hello there"


@pytest.mark.parametrize("way", RETRYING[1::2], ids=str)
def test_the_sdk_shows_who_responded(two: Two, way: Way) -> None:
    """Nothing of the first provider's refusal is in the response."""
    two.first.response = refusing(500, b"x-of: first")
    outcome = way.ask(question(two, way, "shown"))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    two.first.response = two.second.response = refusing(400)
    headers = way.ask(question(two, way, "shown")).headers
    assert "x-of" not in headers
    assert (headers["x-llmproxy-provider"], headers["x-llmproxy-attempts"]) == (f"{way.sdk}-1", "1")
