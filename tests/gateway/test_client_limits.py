"""Limits of clients on the way of a request: what it holds, and what every end gives back."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from llmproxy.errors import upstream_broken, upstream_unreachable
from tests.gateway.played import SSE, PlayedGateway, PlayedResponse
from tests.support.fake_transport import FIN, RESET

CHAT = "/p/v1/chat/completions"
KIND = (b"content-type", b"application/json")
WHOLE = (
    b'{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":30,"completion_tokens":12}}'
)
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
EARLY = b'data: {"choices":[{"delta":{"content":"a"}}],"usage":{"prompt_tokens":30}}\n\n'
COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":12}}\n\n'
DONE = b"data: [DONE]\n\n"
FAILED = b'data: {"error":{"message":"no"}}\n\n'
ALL = "max_streams = 2\nrequests_per_minute = 5\ntokens_per_minute = 5000\ntokens_per_day = 9000\n"
GUESS = 1000 + len(b'{"model": "m", "stream": true}') // 4
"""What is reserved where nothing is known."""


def left(played: PlayedGateway) -> dict[str, int]:
    """Return what the client has left of each limit."""
    return {limit: count for (_, limit), count in played.gateway.limits.remaining().items()}


def limited(client: str = ALL, route: str = "", more: str = "") -> PlayedGateway:
    """Return a gateway whose client has limits."""
    played = PlayedGateway(client=client, route=route, more=more)
    played.gateway.limits.follow({"c": played.client})
    return played


def whole(played: PlayedGateway) -> None:
    """Let one request be served in full."""
    played.call(target=CHAT)
    response = played.response(200, KIND)
    response.push(WHOLE)
    response.end()
    assert played.got()[0] == 200


# --- every end ------------------------------------------------------------------------------------


def begun(played: PlayedGateway) -> PlayedResponse:
    """Begin a stream that reports some of its usage."""
    response = played.begun(SSE, target=CHAT)
    response.push(EARLY)
    return response


def cancelled(played: PlayedGateway) -> None:
    """The client leaves within a stream."""
    begun(played)
    played.transport.end(FIN)


def cut(played: PlayedGateway) -> None:
    """The proxy ends its connections within a stream."""
    begun(played)
    played.site.cut()


def after_many_events(played: PlayedGateway) -> None:
    """The client takes a long stream and leaves before its last event."""
    response = begun(played)
    for _ in range(2000):
        response.push(EVENT)
        played.transport.take()
    played.transport.end(FIN)


def ended(played: PlayedGateway, *events: bytes, error: Exception | None = None) -> None:
    """Begin a stream, and let it end so."""
    response = played.begun(SSE, target=CHAT)
    response.push(*events)
    response.end(error)


def never_asked(played: PlayedGateway) -> None:
    """The provider cannot be reached."""
    played.upstream.error = upstream_unreachable("no")
    played.call(target=CHAT)


def refused(played: PlayedGateway, status: int) -> None:
    """The provider says that it did not do the work."""
    played.call(target=CHAT)
    played.asked.began()  # as on a second connection, where the first one had been closed
    response = played.response(status, KIND)
    response.push(b"{}")
    response.end()


def refused_and_left(played: PlayedGateway) -> None:
    """The client leaves within a refusal."""
    played.call(target=CHAT)
    played.response(500, KIND).push(b"{}")
    played.transport.end(FIN)


def left_early(played: PlayedGateway, *, begins: bool = True) -> None:
    """The client leaves before the head, or before the provider was asked."""
    played.upstream.begins = begins
    played.call(target=CHAT)
    played.transport.end(RESET)


def too_late(played: PlayedGateway) -> None:
    """The request takes longer than ``total``."""
    played.call(target=CHAT)
    played.clock.advance(50)


def rejected_later(played: PlayedGateway) -> None:
    """The request cannot be sent to the candidate."""
    played.call(target=CHAT + "?model=other")


def drained(played: PlayedGateway) -> None:
    """The client leaves, and the response is read on; only then is the slot free."""
    response = begun(played)
    played.transport.end(FIN)
    assert left(played)["max_streams"] == 1
    response.push(COUNTS, DONE)
    response.end()


ENDS: dict[str, tuple[Callable[[PlayedGateway], object], str, int]] = {
    "whole": (whole, "complete", 42),
    "a whole stream": (lambda p: ended(p, EVENT, COUNTS, DONE), "complete", 42),
    "a stream that reports nothing": (lambda p: ended(p, EVENT, DONE), "complete", GUESS),
    "cancelled": (cancelled, "client_gone", GUESS),
    "cancelled after many events": (after_many_events, "client_gone", 2001),
    "cancelled before the head": (left_early, "client_gone", GUESS),
    "never asked": (lambda p: left_early(p, begins=False), "client_gone", 0),
    "drained": (drained, "client_gone", 42),
    "broken": (lambda p: ended(p, EARLY, error=upstream_broken("x")), "upstream_broken", GUESS),
    "failed": (lambda p: ended(p, EARLY, FAILED), "upstream_failed", GUESS),
    "unfinished": (lambda p: ended(p, EARLY), "unfinished", GUESS),
    "unreachable": (never_asked, "upstream_unreachable", 0),
    "refused": (lambda p: refused(p, 429), "upstream_refused", 0),
    "redirected": (lambda p: refused(p, 307), "complete", 0),
    "refused and left": (refused_and_left, "client_gone", 0),
    "late": (too_late, "upstream_timeout", GUESS),
    "cut by the proxy": (cut, "drained", GUESS),
    "rejected later": (rejected_later, "rejected", 0),
}
"""The ends of a request: how each comes about, its end reason, and the tokens that count."""


@pytest.mark.parametrize("case", ENDS)
def test_every_end_gives_back_what_was_held(case: str) -> None:
    """The slot is free, nothing stays reserved, and the record says what counts."""
    play, end, tokens = ENDS[case]
    override = "[routes.override]\np = { model = 'n' }\n" if case == "rejected later" else ""
    timeouts = '[routes.timeouts]\ntotal = "50s"\n' if case == "late" else ""
    drains = 'on_disconnect = "drain"\n' if case == "drained" else ""
    played = limited(route=drains + override + timeouts)
    play(played)
    trace = played.trace()
    assert (trace.end_reason, trace.counted_tokens) == (end, tokens)
    assert left(played) == {
        "max_streams": 2,
        "requests_per_minute": 4,
        "tokens_per_minute": 5000 - tokens,
        "tokens_per_day": 9000 - tokens,
    }


def test_a_request_holds_a_slot_and_its_usual_cost() -> None:
    """From the choice of the route to the end; a whole usage makes the cost known."""
    played = limited()
    whole(played)
    response = played.begun(SSE, target=CHAT)
    assert left(played) == {
        "max_streams": 1,
        "requests_per_minute": 3,
        "tokens_per_minute": 5000 - 42 - 42,
        "tokens_per_day": 9000 - 42 - 42,
    }
    assert b"x-llmproxy-remaining" not in played.got()[1], "refusals alone say it"
    response.push(DONE)
    response.end()


def test_what_was_asked_for_is_not_what_is_reserved() -> None:
    """``max_tokens`` is a bound and no estimate: it would fill a budget at nothing spent."""
    played = limited("tokens_per_minute = 2100\n")
    body = b'{"model": "m", "max_tokens": 1000000, "max_completion_tokens": 1000000}'
    for _ in range(2):
        played.call(target=CHAT, body=body)
        played.connect()
    assert left(played) == {"tokens_per_minute": 2100 - 2 * (1000 + len(body) // 4)}
    assert len(played.upstream.asked) == 2


def test_parallel_requests_do_not_go_past_a_budget() -> None:
    """What runs counts at its usual cost; the provider is not asked beyond the budget."""
    played = limited("tokens_per_minute = 150\n")
    whole(played)
    statuses = []
    for _ in range(5):
        played.connect()
        played.call(target=CHAT)
        statuses.append(played.got()[0] if played.transport.writes else None)
    assert statuses == [None, None, 429, 429, 429]
    assert len(played.upstream.asked) == 3
    for asked in played.upstream.asked[1:]:
        response = PlayedResponse(200, (KIND,))
        asked.response.callback(response)
        response.push(WHOLE)
        response.end()
    assert left(played) == {"tokens_per_minute": 150 - 3 * 42}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "shape"),
    [
        ("openai", ("error", "type", "rate_limit_error")),
        ("openai", ("error", "code", "limited")),
        ("anthropic", ("error", "type", "rate_limit_error")),
        ("ollama", ("error",)),
        ("gemini", ("error", "status", "RESOURCE_EXHAUSTED")),
    ],
)
def test_a_refusal_has_the_shape_of_the_dialect(dialect: str, shape: tuple[str, ...]) -> None:
    """It says which limit, when to come again and what is left; the provider is not asked."""
    played = PlayedGateway(provider=f'dialect = "{dialect}"', client="requests_per_minute = 1\n")
    played.gateway.limits.follow({"c": played.client})
    played.call(target="/p/v1/else")
    played.connect()
    played.clock.advance(0.5)
    played.call(target="/p/v1/else")
    status, fields, body = played.got()
    assert status == 429
    assert fields[b"x-llmproxy-error"] == b"limited"
    assert fields[b"x-llmproxy-limit"] == b"requests_per_minute"
    assert (fields[b"retry-after"], fields[b"retry-after-ms"]) == (b"60", b"59500")
    assert fields[b"x-llmproxy-remaining"] == b"requests_per_minute=0"
    assert b"x-should-retry" not in fields
    assert not [name for name in fields if b"ratelimit" in name]
    found = json.loads(body)
    for name in shape[:2]:
        found = found[name]
    assert (found == shape[2]) if len(shape) > 2 else "1 request in a minute" in found
    assert len(played.upstream.asked) == 1
    (trace,) = played.sink.traces
    assert (trace.end_reason, trace.error, trace.status) == ("rejected", "limited", 429)
    assert trace.counted_tokens is None


def test_a_spent_day_is_no_reason_to_retry() -> None:
    """An SDK would wait for hours, or ask again and again."""
    played = limited("tokens_per_day = 1\n")
    whole(played)
    played.call(target=CHAT)
    status, fields, _ = played.got()
    assert (status, fields[b"x-llmproxy-limit"]) == (429, b"tokens_per_day")
    assert fields[b"retry-after"] == b"%d" % (86400 - 1_700_000_000 % 86400)
    assert fields[b"x-should-retry"] == b"false"


def test_what_finds_no_route_costs_nothing() -> None:
    """404 and 403 come before the limits; so does a body that is refused."""
    played = limited("max_streams = 1\nrequests_per_minute = 1\nmodels = ['m']\n")
    for call in (
        lambda: played.call(target="/nowhere"),
        lambda: played.call(target=CHAT, body=b'{"model": "other"}'),
        lambda: played.call(target=CHAT, body=b"{"),
    ):
        call()
        assert played.got()[0] in (400, 403, 404)
        played.connect()
    assert left(played) == {"max_streams": 1, "requests_per_minute": 1}


def test_a_list_of_models_costs_a_request_and_no_tokens() -> None:
    """It is served while the tokens are spent."""
    played = limited("requests_per_minute = 3\ntokens_per_day = 1\nmax_streams = 1\n")
    whole(played)
    played.call("GET", "/p/v1/models", body=b"")
    assert left(played) == {"max_streams": 0, "requests_per_minute": 1, "tokens_per_day": 0}
    response = played.response(200, KIND)
    response.push(b"{}")
    response.end()
    assert played.sink.traces[-1].counted_tokens is None


def test_what_cannot_be_read_costs_no_tokens() -> None:
    """Nobody would ever know what it did cost; it is a request all the same."""
    played = limited("requests_per_minute = 3\ntokens_per_day = 1\n")
    played.call(target="/p/v1/files")
    assert left(played) == {"requests_per_minute": 2, "tokens_per_day": 1}


def test_a_preflight_counts_for_nothing() -> None:
    """A browser asks whether it may ask; no client is known by then."""
    played = limited("requests_per_minute = 1\n", route='allowed_origins = ["https://a.example"]\n')
    fields = ("Origin: https://a.example", "Access-Control-Request-Method: POST")
    played.call("OPTIONS", CHAT, *fields, body=b"")
    assert played.got()[0] == 204
    assert left(played) == {"requests_per_minute": 1}


def test_an_image_is_not_guessed_as_text() -> None:
    """The size of a form says nothing of tokens."""
    played = limited("tokens_per_day = 100000\nmodels = ['m']\n")  # so that the form is held
    part = b'--x\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    form = part % (b"model", b"m") + part % (b"image", b"\0" * 90_000) + b"--x--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=x"
    played.call("POST", "/p/v1/images/edits", kind, body=form)
    assert left(played) == {"tokens_per_day": 99_000}


def test_a_list_of_our_own_is_a_request_too() -> None:
    """No provider is asked for it, and it takes the place of one that is."""
    own = 'models = ["m"]\nmodels_list = "configured"'
    played = limited("requests_per_minute = 1\n", own)
    played.call("GET", "/p/v1/models", body=b"")
    assert played.got()[0] == 200
    assert left(played) == {"requests_per_minute": 0}
    played.call("GET", "/p/v1/models", body=b"")
    assert played.refusal() == (429, "limited")
    assert played.upstream.asked == []


def test_a_client_without_limits_has_no_lease() -> None:
    """And hears nothing of limits."""
    played = PlayedGateway()
    response = played.begun(KIND, target=CHAT)
    (exchange,) = played.recorder.exchanges
    assert exchange.lease is None
    response.push(WHOLE)
    response.end()
    assert b"x-llmproxy-remaining" not in played.got()[1]
    assert played.trace().counted_tokens is None
    assert left(played) == {}
