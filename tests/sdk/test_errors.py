"""Errors surface as the SDK's own exceptions: those of the provider as they came, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.sdk.conftest import NARROW_KEY
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
from tests.sdk.stage import Stage
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
def test_error_of_the_provider_is_handed_on(
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


def text_without_ids(error: Any) -> Any:
    """Return what an error says."""
    return error.error if isinstance(error, ollama.ResponseError) else plain(error.body)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_retry_after_of_the_provider_is_visible(way: Way, proxy: Daemon) -> None:
    """A 429 says when to come back, where the SDK's own retries look for it."""
    outcome = way.ask(Question(base=route(proxy, way.sdk), model="demo-429"))
    assert outcome.headers["retry-after"] == "1"
    assert "x-should-retry" not in outcome.headers


@pytest.mark.parametrize("way", [way for way in WHOLES if way.sdk != "ollama"], ids=str)
def test_sdk_follows_a_retry_after_through_the_proxy(
    way: Way, stage: Stage, stage_proxy: Daemon
) -> None:
    """A caller that retries by itself (Ollama's never does) gets the response that comes then."""

    def refuse_once(wire: Wire, request: Received) -> None:
        if len(stage.received) > 1:
            accept(wire, request)
        else:
            wire.send(b"HTTP/1.1 429 Slow Down\r\nretry-after-ms: 10\r\ncontent-length: 0\r\n\r\n")

    accept, stage.response = stage.response, refuse_once
    outcome = way.ask(Question(base=route(stage_proxy, way.sdk), retries=1))
    assert text_of(way.sdk, outcome.response) == "Hello there"
    assert [request.values(b"x-stainless-retry-count") for request in stage.received] == [
        [b"0"],
        [b"1"],
    ]


# Ours


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_wrong_key_is_refused(way: Way, proxy: Daemon) -> None:
    """401, with what is wrong and not with the key."""
    outcome = way.ask(Question(base=route(proxy, way.sdk), key="a-wrong-key"))
    text = assert_ours(way, outcome, 401, "unknown_key", proxy)
    assert "not one of this proxy's client keys" in text
    assert outcome.headers["www-authenticate"] == "Bearer"
    assert "a-wrong-key" not in text + str(proxy.log)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_key_is_refused_where_nobody_is_anonymous(way: Way, proxy: Daemon) -> None:
    """401 where a key is needed and none is shown."""
    outcome = way.ask(Question(base=route(proxy, way.sdk), key=None))
    assert "No key was given" in assert_ours(way, outcome, 401, "no_key", proxy)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_key_is_served_where_everybody_may_call(way: Way, open_proxy: Daemon) -> None:
    """Who shows no key is the client "anonymous" there, and who shows one is known by it."""
    base = route(open_proxy, way.sdk)
    nobody, known = way.ask(Question(base=base, key=None)), way.ask(Question(base=base))
    assert text_of(way.sdk, nobody.response) == text_of(way.sdk, known.response) != ""
    assert access_line(open_proxy, nobody.session)["client"] == "anonymous"
    assert access_line(open_proxy, known.session)["client"] == "team"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_wrong_key_is_refused_where_everybody_may_call(way: Way, open_proxy: Daemon) -> None:
    """A wrong key is a mistake there, too, and not the same as none."""
    outcome = way.ask(Question(base=route(open_proxy, way.sdk), key="a-wrong-key"))
    assert_ours(way, outcome, 401, "unknown_key", open_proxy)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_model_that_is_not_for_the_client_is_forbidden(way: Way, proxy: Daemon) -> None:
    """403 for another model, while the client's own is served on the same route."""
    base = route(proxy, way.sdk)
    assert way.ask(Question(base=base, key=NARROW_KEY)).response
    outcome = way.ask(Question(base=base, key=NARROW_KEY, model="demo-20tps"))
    assert "may not use this model" in assert_ours(way, outcome, 403, "model_forbidden", proxy)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_route_that_is_not_for_the_client_is_forbidden(way: Way, proxy: Daemon) -> None:
    """403 on a route that the client's own list does not name."""
    outcome = way.ask(Question(base=route(proxy, f"event-{way.sdk}"), key=NARROW_KEY))
    assert "may not use this route" in assert_ours(way, outcome, 403, "route_forbidden", proxy)


@pytest.mark.parametrize("way", [way for way in WAYS if way.sdk == "openai"], ids=str)
def test_unknown_route_is_not_found(way: Way, proxy: Daemon) -> None:
    """404 where no route leads; only there is the shape always OpenAI's."""
    outcome = way.ask(Question(base=route(proxy, "nowhere")))
    assert "No route leads to this path" in assert_ours(way, outcome, 404, "no_route", proxy)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_missing_prefix_is_told_in_the_dialect_of_the_path(way: Way, proxy: Daemon) -> None:
    """A base URL without its route gets a 404 that the SDK can read, whichever SDK it is."""
    outcome = way.ask(Question(base=f"http://127.0.0.1:{proxy.port}"))
    assert "No route leads to this path" in assert_ours(way, outcome, 404, "no_route", proxy)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_body_over_the_limit_of_the_route_is_refused(way: Way, proxy: Daemon) -> None:
    """413 where the question is longer than the route takes."""
    small = route(proxy, f"small-{way.sdk}")
    assert way.ask(Question(base=small)).response
    outcome = way.ask(Question(base=small, said="word " * 500))
    assert "1024 bytes" in assert_ours(way, outcome, 413, "body_too_large", proxy)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_full_memory_is_told_with_a_time_to_come_back(way: Way, open_proxy: Daemon) -> None:
    """503 where the proxy holds as much as it may; the next, shorter question is answered."""
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
def test_sdk_does_not_repeat_what_may_have_been_done(
    sdk: str, stage: Stage, stage_proxy: Daemon
) -> None:
    """Where a provider took the request and hung up, the SDK's own retries stand back."""

    def hang_up(wire: Wire, request: Received) -> None:
        raise EOFError("the provider ends its connection")

    stage.response = hang_up
    way = Way(sdk, is_async=False, stream=False)
    outcome = way.ask(Question(base=route(stage_proxy, sdk), retries=2))
    assert_ours(way, outcome, 502, "upstream_broken", stage_proxy)
    assert outcome.headers["x-should-retry"] == "false"
    assert len(stage.received) == 1


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_response_that_is_not_http_is_a_bad_gateway(
    way: Way, stage: Stage, stage_proxy: Daemon
) -> None:
    """502 where the provider's head cannot be read; nothing of it reaches the caller."""

    def babble(wire: Wire, request: Received) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nno")
        wire.wait_closed()

    stage.response = babble
    outcome = way.ask(Question(base=route(stage_proxy, way.sdk)))
    assert "not valid HTTP" in assert_ours(way, outcome, 502, "upstream_protocol", stage_proxy)
