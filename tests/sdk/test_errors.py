"""Errors surface as the SDK's own exceptions: those of the provider as they came, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.sdk.conftest import NARROW_KEY
from tests.sdk.directed_provider import DirectedProvider
from tests.sdk.sdks import (
    SDKS,
    WAYS,
    WHOLES,
    Outcome,
    Question,
    Way,
    access_line,
    plain,
    route,
    text_of,
    trace_of,
)
from tests.support.daemon import Daemon
from tests.support.demo import Demo
from tests.support.sockets import Received, Wire

EXCEPTIONS: Mapping[str, Mapping[int, type[Exception]]] = {
    "openai": {
        401: openai.AuthenticationError,
        403: openai.PermissionDeniedError,
        404: openai.NotFoundError,
        413: openai.APIStatusError,
        429: openai.RateLimitError,
        500: openai.InternalServerError,
        502: openai.InternalServerError,
        503: openai.InternalServerError,
    },
    "anthropic": {
        401: anthropic.AuthenticationError,
        403: anthropic.PermissionDeniedError,
        404: anthropic.NotFoundError,
        413: anthropic.RequestTooLargeError,
        429: anthropic.RateLimitError,
        500: anthropic.InternalServerError,
        502: anthropic.InternalServerError,
        503: anthropic.ServiceUnavailableError,
    },
}
"""What each SDK raises by status; Ollama's has one exception, which has the status."""

ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    502: "api_error",
    503: "overloaded_error",
}


def assert_raised(way: Way, outcome: Outcome, status: int) -> None:
    """The SDK raised exactly the exception that it has for the status."""
    error = outcome.failure
    expected = EXCEPTIONS.get(way.sdk, {}).get(status, ollama.ResponseError)
    assert error.status_code == status
    assert type(error) is expected


def assert_ours(way: Way, outcome: Outcome, status: int, reason: str, proxy: Daemon) -> str:
    """The error is the proxy's, in the SDK's own words and shapes; returns what it says."""
    assert_raised(way, outcome, status)
    error, headers = outcome.failure, outcome.headers
    assert headers["x-llmproxy-error"] == reason
    request_id = headers["x-llmproxy-request-id"]
    line = access_line(proxy, outcome.session)
    assert (line["id"], line["status"], line["error"]) == (request_id, status, reason)
    assert line["is_complete"] is False
    if way.sdk == "ollama":
        text = error.error
    elif way.sdk == "openai":
        assert error.request_id == request_id
        assert error.code == reason
        text = error.body["message"]
    else:
        assert error.request_id == error.body["request_id"] == request_id
        assert error.type == ANTHROPIC_TYPES[status]
        text = error.api_message
    assert isinstance(text, str)
    return text


def assert_the_providers(way: Way, outcome: Outcome, status: int) -> None:
    """The error is the provider's own, with its id; ours only stands beside it."""
    assert_raised(way, outcome, status)
    assert "x-llmproxy-error" not in outcome.headers
    assert outcome.headers["x-llmproxy-request-id"]
    if way.sdk == "ollama":
        assert outcome.headers["x-request-id"].startswith("req_")
    else:
        assert outcome.failure.request_id.startswith("req_")


# Those of the provider


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("model", "status"),
    [("no-such-model", 404), ("demo-429", 429), ("demo-500", 500), ("demo-503", 503)],
)
def test_error_of_the_provider_is_forwarded(
    way: Way, model: str, status: int, demo: Demo, proxy: Daemon
) -> None:
    """The SDK raises what it raises without the proxy, and the record says who refused."""
    direct = way.ask(Question(base=demo.url, model=model))
    outcome = way.ask(Question(base=route(proxy, way.sdk), model=model))
    assert_the_providers(way, outcome, status)
    assert type(outcome.failure) is type(direct.failure)
    assert text_without_ids(outcome.failure) == text_without_ids(direct.failure)
    line = access_line(proxy, outcome.session)
    assert (line["end_reason"], line["status"]) == ("upstream_refused", status)
    if status == 429:  # where the SDK's own retries look for it
        assert outcome.headers["retry-after"] == "1"
        assert "x-should-retry" not in outcome.headers


def text_without_ids(error: Any) -> Any:
    """Return what an error says."""
    return error.error if isinstance(error, ollama.ResponseError) else plain(error.body)


@pytest.mark.parametrize("way", [way for way in WHOLES if way.sdk != "ollama"], ids=str)
def test_sdk_follows_a_retry_after_through_the_proxy(way: Way, directed: DirectedProvider) -> None:
    """A caller that retries by itself (Ollama's never does) gets the response that comes then."""

    def refuse_once(wire: Wire, request: Received) -> None:
        if len(directed.received) > 1:
            accept(wire, request)
        else:
            wire.send(b"HTTP/1.1 429 Slow Down\r\nretry-after-ms: 10\r\ncontent-length: 0\r\n\r\n")

    accept, directed.response = directed.response, refuse_once
    outcome = way.ask(Question(base=route(directed.proxy, way.sdk), retries=1))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    assert [request.values(b"x-stainless-retry-count") for request in directed.received] == [
        [b"0"],
        [b"1"],
    ]


# Ours


REJECTED: Mapping[str, tuple[str, Mapping[str, Any], int, str, str]] = {
    "a wrong key": ("{}", {"key": "a-wrong-key"}, 401, "unknown_key", "not one of this proxy's"),
    "no key": ("{}", {"key": None}, 401, "no_key", "No key was given"),
    "a model that is not for the client": (
        "{}",
        {"key": NARROW_KEY, "model": "demo-20tps"},
        403,
        "model_forbidden",
        "may not use this model",
    ),
    "a route that is not for the client": (
        "event-{}",
        {"key": NARROW_KEY},
        403,
        "route_forbidden",
        "may not use this route",
    ),
    "a path without a route": ("", {}, 404, "no_route", "No route leads to this path"),
    "a body over the limit of the route": (
        "small-{}",
        {"said": "word " * 500},
        413,
        "body_too_large",
        "1024 bytes",
    ),
}
"""What is rejected: the route, what is asked there, status, reason and words of the error."""


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("case", REJECTED)
def test_rejection_is_the_sdks_own_exception(way: Way, case: str, proxy: Daemon) -> None:
    """The error has the shape of the route's dialect, or where there is no route of the path's.

    It does not repeat the key.
    """
    name, question, status, reason, words = REJECTED[case]
    outcome = way.ask(Question(base=route(proxy, name.format(way.sdk)).rstrip("/"), **question))
    assert words in assert_ours(way, outcome, status, reason, proxy)
    assert ("www-authenticate" in outcome.headers) is (status == 401)
    assert "a-wrong-key" not in str(outcome.failure) + str(proxy.log)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_limits_of_client_and_route_let_the_rest_pass(way: Way, proxy: Daemon) -> None:
    """The client's own model and a short question are served on the same routes."""
    assert way.ask(Question(base=route(proxy, way.sdk), key=NARROW_KEY)).response
    assert way.ask(Question(base=route(proxy, f"small-{way.sdk}"))).response


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_key_is_served_where_everybody_may_call(way: Way, open_proxy: Daemon) -> None:
    """Who shows no key is the client "anonymous" there, and who shows one is known by it."""
    base = route(open_proxy, way.sdk)
    nobody, known = way.ask(Question(base=base, key=None)), way.ask(Question(base=base))
    assert text_of(way.sdk, nobody.response) == text_of(way.sdk, known.response) != ""
    assert access_line(open_proxy, nobody.session)["client"] == "anonymous"
    assert access_line(open_proxy, known.session)["client"] == "team"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_full_memory_is_reported_with_a_time_to_come_back(way: Way, open_proxy: Daemon) -> None:
    """503 where the proxy holds as much as it may; the next, shorter question is served."""
    base = route(open_proxy, way.sdk)
    outcome = way.ask(Question(base=base, said="word " * 8000))
    assert_ours(way, outcome, 503, "memory_full", open_proxy)
    assert outcome.headers["retry-after"] == "1"
    assert way.ask(Question(base=base)).response


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_provider_that_is_not_there_is_a_bad_gateway(
    way: Way, proxy: Daemon, closed_url: str
) -> None:
    """502 that names no address; the record has it, and the SDK may try again."""
    outcome = way.ask(Question(base=route(proxy, f"gone-{way.sdk}")))
    text = assert_ours(way, outcome, 502, "upstream_unreachable", proxy)
    port = closed_url.rpartition(":")[2]
    assert "cannot be reached" in text
    assert port not in text
    assert "x-should-retry" not in outcome.headers
    trace = trace_of(proxy, outcome.session)
    assert trace["end_reason"] == "upstream_unreachable"
    assert [attempt["outcome"] for attempt in trace["attempts"]] == ["upstream_unreachable"]


@pytest.mark.parametrize("sdk", SDKS)
def test_sdk_does_not_repeat_what_may_have_been_done(sdk: str, directed: DirectedProvider) -> None:
    """The SDK does not retry where a provider took the request and hung up."""

    def hang_up(wire: Wire, request: Received) -> None:
        raise EOFError("the provider ends its connection")

    directed.response = hang_up
    way = Way(sdk, is_async=False, stream=False)
    outcome = way.ask(Question(base=route(directed.proxy, sdk), retries=2))
    assert_ours(way, outcome, 502, "upstream_broken", directed.proxy)
    assert outcome.headers["x-should-retry"] == "false"
    assert len(directed.received) == 1
