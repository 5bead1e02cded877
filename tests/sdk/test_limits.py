"""A client's limits, as SDKs see them: their own exception, and their own retries."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.sdk.directed_provider import DirectedProvider
from tests.sdk.sdks import WAYS, Question, Way, access_line, route, text_of, trace_of
from tests.sdk.test_errors import assert_raised
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.live_proxy import client_config, post, until
from tests.support.sockets import WAIT, Provider, Received, Wire, connect

TRYING = [Way(sdk, is_async=False, stream=True) for sdk in ("openai", "anthropic")]
"""A way of each SDK that tries again by itself."""

LIMITS = {
    "minute": (WAYS, "requests_per_minute = 1"),
    "day": (TRYING, "tokens_per_day = 1"),
    "slots": (TRYING, "max_streams = 1"),
}
"""The clients: one for each way, so that no test is in the way of another."""


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DirectedProvider]:
    """A proxy whose clients have limits, in front of a provider that responds shortly."""
    directed = DirectedProvider()
    with Provider(directed.play) as provider:
        config = "".join(
            provider_table(sdk, url=provider.url, dialect=sdk) + route_table(f"/{sdk}", sdk)
            for sdk in ("openai", "anthropic", "ollama")
        )
        for name, (ways, limit) in LIMITS.items():
            config += "".join(
                client_config(f"{name}-{way}", f"{name}-{way}", limit) for way in ways
            )
        folder = tmp_path_factory.mktemp("limited")
        with Daemon(folder, config, proxy="") as directed.proxy:
            yield directed


def refusals(daemon: Daemon, client: str) -> float:
    """Return how often a client was refused."""
    counted = daemon.metrics().items()
    return sum(n for name, n in counted if f'limited_total{{client="{client}"' in name)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_refusal_is_the_sdks_own_exception(way: Way, limited: DirectedProvider) -> None:
    """It has the time to wait where the SDK looks for it, and the reason in its own words."""
    proxy, key = limited.proxy, f"minute-{way}"
    question = Question(base=route(proxy, way.sdk), key=key)
    began = time.monotonic()
    served = way.ask(question)
    assert text_of(way.sdk, served.response) == "Hello there"
    outcome = way.ask(question)
    passed = time.monotonic() - began
    assert_raised(way, outcome, 429)
    headers = outcome.headers
    assert headers["x-llmproxy-limit"] == "requests_per_minute"
    assert headers["x-llmproxy-remaining"] == "requests_per_minute=0"
    assert 60 - passed <= int(headers["retry-after"]) <= 60
    assert int(headers["retry-after"]) - 1 < int(headers["retry-after-ms"]) / 1000
    assert "x-should-retry" not in headers
    assert not [name for name in headers if "ratelimit" in name.lower()]
    assert "1 request in a minute" in str(outcome.failure)
    line = access_line(proxy, outcome.session)
    assert (line["error"], line["client"]) == ("limited", key)


@contextmanager
def a_request_under_way(limited: DirectedProvider, key: str) -> Iterator[None]:
    """Hold a client's only slot until the client was refused once."""
    held = threading.Event()
    respond = limited.response

    def hold(theirs: Wire, request: Received) -> None:
        limited.response = respond
        held.set()
        theirs.wait_closed()
        raise EOFError("the request was cancelled")

    def leave_when_refused() -> None:
        until(lambda: refusals(limited.proxy, key), "a refusal")
        wire.close()

    with connect(limited.proxy.port) as wire:
        limited.response = hold
        wire.send(post("/openai/v1/chat/completions", b'{"model":"m"}', f"x-api-key: {key}"))
        assert held.wait(WAIT)
        leaving = threading.Thread(target=leave_when_refused)
        leaving.start()
        yield
        leaving.join()


@pytest.mark.parametrize("way", TRYING, ids=str)
def test_the_sdks_own_retry_passes(way: Way, limited: DirectedProvider) -> None:
    """It waits for as long as it is told, and then there is a slot."""
    key = f"slots-{way}"
    with a_request_under_way(limited, key):
        began = time.monotonic()
        question = Question(base=route(limited.proxy, way.sdk), key=key, retries=1)
        outcome = way.ask(question)
        waited = time.monotonic() - began
    assert text_of(way.sdk, outcome.response) == "Hello there"
    assert 1 <= waited < 10
    assert refusals(limited.proxy, key) == 1


@pytest.mark.parametrize("way", TRYING, ids=str)
def test_a_spent_day_is_reported_at_once(
    way: Way, limited: DirectedProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SDK that tries again by itself would sleep for hours, or ask again and again."""
    sleep = time.sleep

    def sleep_a_little(seconds: float) -> None:
        assert seconds < 10, f"the SDK sleeps for {seconds} s"
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep_a_little)
    if time.time() % 86400 > 86400 - 90:
        pytest.skip("the day is over before an SDK loses its patience")
    key = f"day-{way}"
    question = Question(base=route(limited.proxy, way.sdk), key=key, retries=2)
    served = way.ask(question)
    assert text_of(way.sdk, served.response) == "Hello there"
    assert trace_of(limited.proxy, served.session)["counted_tokens"] >= 1
    outcome = way.ask(question)
    assert_raised(way, outcome, 429)
    assert outcome.headers["x-llmproxy-limit"] == "tokens_per_day"
    assert outcome.headers["x-should-retry"] == "false"
    assert refusals(limited.proxy, key) == 1
