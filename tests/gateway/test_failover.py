"""Which candidate is asked, in which order, and what is left of the others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from twisted.internet.error import ConnectionDone
from twisted.logger import LogLevel, capturedLogs, formatEvent

from llmproxy.errors import ProxyError, upstream_broken, upstream_timeout, upstream_unreachable
from tests.gateway.played import BODY, JSON, PlayedGateway, PlayedResponse
from tests.support.live_proxy import write_credential
from tests.support.sockets import request

OTHERS = "".join(
    f'[providers.{name}]\nurl = "https://{name}.example"\ndialect = "openai"\nMORE\n'
    for name in "qr"
)


def played(
    *, route: str = "", provider: str = "", candidates: str = "p q", more: str = ""
) -> PlayedGateway:
    """A route with several candidates, each of which has the same keys."""
    return PlayedGateway(
        candidates=candidates,
        route=route,
        provider=provider,
        more=OTHERS.replace("MORE", provider) + more,
    )


def fail(gateway: PlayedGateway, error: ProxyError) -> None:
    """Let the attempt that is under way fail."""
    gateway.asked.response.errback(error)
    gateway.clock.advance(0)


def names(gateway: PlayedGateway) -> list[str]:
    """The providers that were asked, in order."""
    return [one.provider for one in gateway.upstream.asked]


def refuse(
    gateway: PlayedGateway, code: int, body: bytes, *fields: tuple[bytes, bytes]
) -> PlayedResponse:
    """Let the attempt that is under way be refused, with a whole body."""
    response = gateway.response(code, (b"content-length", b"%d" % len(body)), *fields)
    if response.body is not None:
        response.push(body)
        response.end()
    return response


def serve(gateway: PlayedGateway, *call: str) -> str:
    """Let one request come in and be served; return by whom."""
    gateway.call("POST", "/p/v1", *call)
    gateway.response().end()
    gateway.transport.take()
    gateway.clock.advance(0)
    return str(gateway.asked.provider)


def test_the_next_one_is_asked_after_a_failure() -> None:
    """With the same body; the record names both, and the client is told."""
    gateway = played()
    gateway.call()
    fail(gateway, upstream_unreachable("no"))
    assert names(gateway) == ["p", "q"]
    gateway.response(200).end()
    _, fields, _ = gateway.got()
    assert (fields[b"x-llmproxy-provider"], fields[b"x-llmproxy-attempts"]) == (b"q", b"2")
    trace = gateway.trace()
    tried = [(one.provider, one.outcome) for one in trace.attempts]
    assert tried == [("p", "upstream_unreachable"), ("q", "ok")]
    assert (trace.provider, trace.end_reason) == ("q", "complete")
    assert gateway.value("upstream_attempts_total", provider="p", outcome="upstream_unreachable")


def test_a_candidates_model_is_its_own() -> None:
    """What the first one was asked for does not reach the second one."""
    gateway = played(route='override = { p = { model = "one" }, q = { model = "two" } }')
    gateway.call()
    first = gateway.asked.body
    fail(gateway, upstream_unreachable("no"))
    models = [json.loads(body)["model"] for body in (first, gateway.asked.body)]
    assert models == ["one", "two"]


def test_a_refusal_that_is_the_last_response_reaches_the_client() -> None:
    """With its own head and body, although another candidate was tried after it."""
    gateway = played()
    gateway.call()
    refuse(gateway, 503, b"busy", (b"x-of", b"p"))
    assert names(gateway) == ["p", "q"]
    fail(gateway, upstream_unreachable("no"))
    status, fields, body = gateway.got()
    assert (status, fields[b"x-of"], body) == (503, b"p", b"busy")
    assert (fields[b"x-llmproxy-provider"], fields[b"x-llmproxy-attempts"]) == (b"p", b"2")
    trace = gateway.trace()
    assert (trace.provider, trace.status, trace.end_reason) == ("p", 503, "upstream_refused")


def test_of_two_refusals_the_later_one_reaches_the_client() -> None:
    """The earlier one is let go of."""
    gateway = played()
    gateway.call()
    first = gateway.response(500)  # whose body does not end
    refuse(gateway, 429, b"later")
    status, _, body = gateway.got()
    assert (status, body) == (429, b"later")
    assert first.aborts
    assert gateway.trace().provider == "q"


def test_a_refusal_is_dropped_once_somebody_responds() -> None:
    """Its connection is closed, where its body had not ended."""
    gateway = played()
    gateway.call()
    first = gateway.response(500)
    gateway.response(200).end()
    assert gateway.got()[0] == 200
    assert first.aborts
    gateway.trace()


def test_a_large_refusal_is_held_up_to_a_bound() -> None:
    """Behind 64 KiB its provider is not read on; all of it reaches the client in the end."""
    gateway = played()
    gateway.call()
    first = gateway.response(503)
    pieces = [bytes([number]) * 16384 for number in range(8)]
    first.push(*pieces[:4])
    assert first.transport.producerState == "paused"
    fail(gateway, upstream_unreachable("no"))
    assert first.transport.producerState == "producing"
    first.push(*pieces[4:])
    first.end()
    _, _, body = gateway.got()
    assert b"".join(pieces) == b"".join(_chunks(body))
    assert gateway.trace().status == 503


def _chunks(body: bytes) -> list[bytes]:
    found = []
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size, 16)
        found.append(rest[:length])
        body = rest[length + 2 :]
    return found


@pytest.mark.parametrize(
    ("error", "retry_on", "goes_on"),
    [
        (upstream_broken("x"), "", False),
        (upstream_broken("x"), '["reset"]', True),
        (upstream_broken("x", may_have_run=False), "", True),
        (upstream_broken("x", may_have_run=False), '["reset"]', False),
        (upstream_timeout("first_byte", may_have_run=True), "", False),
        (upstream_timeout("first_byte", may_have_run=True), '["timeout"]', True),
        (upstream_timeout("connect", may_have_run=False), "", True),
        (upstream_timeout("connect", may_have_run=False), "[]", False),
        (upstream_unreachable("x"), "[503]", False),
    ],
)
def test_what_may_have_run_is_not_run_twice(
    error: ProxyError, retry_on: str, goes_on: bool
) -> None:
    """Unless the operator says so."""
    gateway = played(route=f"retry_on = {retry_on}" if retry_on else "")
    gateway.call()
    fail(gateway, error)
    assert (names(gateway) == ["p", "q"]) is goes_on
    if not goes_on:
        assert gateway.refusal() == (error.status, error.reason)


def test_an_error_after_which_nobody_may_be_asked_beats_a_refusal() -> None:
    """The second provider may have done the work, and the client must not repeat it."""
    gateway = played()
    gateway.call()
    refuse(gateway, 503, b"busy")
    fail(gateway, upstream_timeout("first_byte", may_have_run=True))
    status, fields, _ = gateway.got()
    assert (status, fields[b"x-should-retry"]) == (504, b"false")


def test_a_client_that_leaves_ends_all_of_it() -> None:
    """The attempt under way is cancelled, the refusal let go of, and nobody else is asked."""
    gateway = played(candidates="p q r")
    gateway.call()
    first = gateway.response(500)
    gateway.transport.end(ConnectionDone())
    gateway.clock.advance(0)
    assert gateway.upstream.cancelled == 1
    assert names(gateway) == ["p", "q"]
    assert first.aborts
    assert gateway.trace().end_reason == "client_gone"


def test_total_goes_on_over_all_attempts() -> None:
    """It is the request's, not an attempt's."""
    gateway = played(route='timeouts = { total = "3s" }')
    gateway.call()
    gateway.clock.advance(2)
    fail(gateway, upstream_unreachable("no"))
    gateway.clock.advance(2)
    assert gateway.refusal() == (504, "upstream_timeout")
    assert gateway.upstream.cancelled == 1


def test_a_body_that_streams_is_sent_once() -> None:
    """Where a provider has some of it, nobody else can have it; before that, the next one does."""
    gateway = played()
    gateway.call("POST", "/p/v1", "Content-Type: audio/wav", "Content-Length: 100", body=b"")
    gateway.send(b"x" * 50)
    fail(gateway, upstream_unreachable("no"))
    assert names(gateway) == ["p", "q"]
    upload = gateway.asked.body
    upload.startProducing(_Taking())
    fail(gateway, upstream_broken("x", may_have_run=False))
    assert gateway.refusal() == (502, "upstream_broken")


class _Taking:
    """A consumer that takes everything."""

    def registerProducer(self, producer: object, streaming: bool) -> None:
        """There is nothing to do."""

    def unregisterProducer(self) -> None:
        """There is nothing to do."""

    def write(self, data: bytes) -> None:
        """Take it."""


# --- health ---------------------------------------------------------------------------------------


def test_a_provider_that_fails_is_left_alone_and_probed() -> None:
    """Five failures open its circuit; when it is over, one request probes."""
    gateway = played()
    for _ in range(5):
        gateway.call()
        fail(gateway, upstream_unreachable("no"))
        gateway.response().end()
        gateway.transport.take()
    gateway.upstream.asked.clear()
    assert serve(gateway) == "q"
    assert names(gateway) == ["q"], "nobody asked p"
    skipped = gateway.sink.traces[-1].attempts[0]
    assert (skipped.provider, skipped.outcome, skipped.cause) == ("p", "skipped", "cooling")
    gateway.clock.advance(15)
    assert serve(gateway) == "p"
    assert serve(gateway) == "p"


def test_where_all_cool_down_the_client_is_told_when_to_come_again() -> None:
    """The soonest time counts; nobody is asked."""
    gateway = played()
    gateway.call()
    gateway.response(429, (b"retry-after", b"20")).end()
    gateway.response(429, (b"retry-after", b"9")).end()
    gateway.transport.take()
    gateway.upstream.asked.clear()
    gateway.call()
    status, fields, body = gateway.got()
    assert (status, fields[b"x-llmproxy-error"]) == (429, b"all_cooling")
    assert fields[b"retry-after"] == b"9"
    assert fields[b"retry-after-ms"] == b"9000"
    assert json.loads(body)["error"]["message"]
    assert names(gateway) == []
    gateway.clock.advance(9)
    assert serve(gateway) == "q"


def test_what_others_were_refused_is_asked_when_nobody_else_is_left() -> None:
    """A request that is too large for all providers closes none of them to other clients."""
    other = hashlib.sha256(b"other").hexdigest()
    gateway = played(more=f'[clients.other]\nkeys = ["sha256:{other}"]\n')
    gateway.call()
    gateway.response(429, (b"retry-after", b"20")).end()
    gateway.response(429, (b"retry-after", b"9")).end()
    gateway.transport.take()
    gateway.upstream.asked.clear()
    gateway.send(request("POST", "/p/v1", "X-Api-Key: other", JSON, body=BODY))
    assert names(gateway) == ["q"], "the one that is ready first"
    fail(gateway, upstream_unreachable("no"))
    assert names(gateway) == ["q", "p"]
    gateway.response().end()
    assert gateway.got()[0] == 200
    tried = [(one.provider, one.outcome) for one in gateway.sink.traces[-1].attempts]
    skipped = [("p", "skipped"), ("q", "skipped")]
    assert tried == [*skipped, ("q", "upstream_unreachable"), ("p", "ok")]


def test_a_single_candidate_is_asked_whatever_is_known_of_it() -> None:
    """Its own response says more than the proxy could."""
    gateway = PlayedGateway(provider="health = { failures = 1 }")
    for _ in range(5):
        gateway.call()
        gateway.response(429, (b"retry-after", b"20")).end()
        assert gateway.got()[0] == 429
        gateway.call()
        fail(gateway, upstream_unreachable("no"))
        assert gateway.refusal() == (502, "upstream_unreachable")


def test_a_cooldown_is_for_one_model() -> None:
    """Another model of the same provider is asked at once."""
    gateway = played()
    gateway.call()
    gateway.response(429, (b"retry-after", b"20")).end()
    gateway.response().end()
    gateway.transport.take()
    gateway.upstream.asked.clear()
    assert serve(gateway) == "q"
    gateway.call(body=b'{"model": "another"}')
    assert gateway.asked.provider == "p"


def test_a_refused_caller_of_his_own_account_cools_nobody_down() -> None:
    """With pass_credential a 429 is the caller's, not the proxy's."""
    gateway = played(provider="pass_credential = true")
    gateway.send(request("POST", "/p/v1", "X-Llmproxy-Key: key", JSON, body=BODY))
    gateway.response(429, (b"retry-after", b"20")).end()
    gateway.response().end()
    gateway.transport.take()
    gateway.upstream.asked.clear()
    gateway.send(request("POST", "/p/v1", "X-Llmproxy-Key: key", JSON, body=BODY))
    assert names(gateway) == ["p"]


# --- who is first ---------------------------------------------------------------------------------


def test_weights_decide_who_is_first() -> None:
    """Two for the one, one for the other."""
    gateway = played(route='balance = "weighted"\noverride = { p = { weight = 2 } }')
    assert "".join(serve(gateway) for _ in range(6)) == "pqppqp"


def test_the_least_busy_is_first() -> None:
    """A stream that runs counts until it has ended."""
    gateway = played(route='balance = "least_busy"')
    gateway.call()
    first = gateway.response()
    gateway.connect()
    assert serve(gateway) == "q"
    assert serve(gateway) == "q"
    first.end()
    assert serve(gateway) == "p"


def test_a_session_stays_where_it_is_served() -> None:
    """Sessions are apart, and requests without one go as the balance says."""
    gateway = played(route='balance = "weighted"\nsticky = "session"')
    by_session = {name: serve(gateway, f"X-Session-Id: {name}") for name in ("a", "b")}
    assert by_session == {"a": "p", "b": "q"}
    for _ in range(3):
        assert {n: serve(gateway, f"X-Session-Id: {n}") for n in ("a", "b")} == by_session
    assert {serve(gateway) for _ in range(2)} == {"p", "q"}


@pytest.mark.parametrize("provider", ["", "max_streams = 9"])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_a_session_that_stays_takes_no_turn(turns: int, provider: str) -> None:
    """However many requests a session has, the next session begins at the next provider."""
    gateway = played(route='balance = "weighted"\nsticky = "session"', provider=provider)
    for name, at in zip("abcd", "pqpq", strict=True):
        assert {serve(gateway, f"X-Session-Id: {name}") for _ in range(turns)} == {at}


def test_sessions_of_an_ill_provider_move_to_all_others() -> None:
    """A session that has to move takes a turn like a new one."""
    gateway = played(
        route='balance = "weighted"\nsticky = "session"',
        candidates="p q r",
        provider="health = { failures = 1, window = '1m', open_for = '1m' }",
    )
    at = {name: serve(gateway, f"X-Session-Id: {name}") for name in "abcdefghijkl"}
    first, *others = [name for name, provider in at.items() if provider == "p"]
    assert len(others) == 3
    gateway.call("POST", "/p/v1", f"X-Session-Id: {first}")
    assert gateway.asked.provider == "p"
    fail(gateway, upstream_unreachable("no"))
    gateway.response().end()
    gateway.transport.take()
    moved = {name: serve(gateway, f"X-Session-Id: {name}") for name in others}
    assert set(moved.values()) == {"q", "r"}
    assert {name: serve(gateway, f"X-Session-Id: {name}") for name in others} == moved


def test_who_moves_after_a_failure_stays_there() -> None:
    """The cache is at the second provider now."""
    gateway = played(route='sticky = "client"')
    assert serve(gateway) == "p"
    gateway.call()
    fail(gateway, upstream_unreachable("no"))
    gateway.response().end()
    gateway.transport.take()
    assert serve(gateway) == "q"
    gateway.clock.advance(3599)
    gateway.connect()
    assert serve(gateway) == "q"
    gateway.clock.advance(3600)
    gateway.connect()
    assert serve(gateway) == "p", "an hour after its last use it is forgotten"


def test_a_refusal_of_the_callers_own_fault_moves_nobody() -> None:
    """A 400 is no failure of the provider's."""
    gateway = played(route='sticky = "client"\nbalance = "weighted"')
    assert serve(gateway) == "p"
    gateway.call()
    gateway.response(400).end()
    gateway.transport.take()
    assert serve(gateway) == "p"


# --- places ---------------------------------------------------------------------------------------


def test_a_full_provider_is_passed_over() -> None:
    """The stream at the first one holds its only place."""
    gateway = played(provider="max_streams = 1")
    gateway.call()
    first = gateway.response()
    gateway.connect()
    assert serve(gateway) == "q"
    tried = [(one.provider, one.outcome, one.cause) for one in gateway.sink.traces[0].attempts]
    assert tried == [("p", "skipped", "busy"), ("q", "ok", None)]
    first.end()
    gateway.clock.advance(0)
    assert serve(gateway) == "p"


def test_where_all_are_full_and_nobody_queues_it_is_a_503() -> None:
    """With a time to come again."""
    gateway = played(provider="max_streams = 1")
    for _ in range(2):
        gateway.call()
        gateway.response()
        gateway.connect()
    gateway.call()
    status, fields, _ = gateway.got()
    assert (status, fields[b"x-llmproxy-error"]) == (503, b"provider_busy")
    assert fields[b"retry-after"] == b"1"


QUEUE = 'max_streams = 1\nqueue = { size = 2, timeout = "10s" }'


def queued() -> tuple[PlayedGateway, PlayedResponse]:
    """A provider whose only place is taken, and one request in its queue, on a new connection."""
    gateway = PlayedGateway(provider=QUEUE)
    gateway.call()
    first = gateway.response()
    gateway.connect()
    gateway.call()
    assert len(gateway.upstream.asked) == 1
    return gateway, first


def test_a_request_waits_for_a_place() -> None:
    """It is sent when the place is free; the record says how long it waited."""
    gateway, first = queued()
    gateway.clock.advance(4)
    first.end()
    gateway.clock.advance(0)
    assert len(gateway.upstream.asked) == 2
    gateway.response().end()
    assert gateway.got()[0] == 200
    assert [trace.queued_s for trace in gateway.sink.traces] == [0, 4]


def test_a_request_that_waits_too_long_is_refused() -> None:
    """And the record says so."""
    gateway, _ = queued()
    gateway.clock.advance(10)
    assert gateway.refusal() == (503, "queue_timeout")
    assert gateway.sink.traces[-1].queued_s == 10


def test_a_client_that_leaves_the_queue_frees_its_place_there() -> None:
    """At once, and nobody is asked for it."""
    gateway, first = queued()
    gateway.transport.end(ConnectionDone())
    gateway.clock.advance(0)
    assert gateway.sink.traces[-1].end_reason == "client_gone"
    first.end()
    gateway.clock.advance(1)
    assert len(gateway.upstream.asked) == 1
    gateway.connect()
    assert serve(gateway) == "p"


def test_the_time_in_the_queue_is_nobodys_slowness() -> None:
    """first_byte is the upstream's, and begins when the request is sent."""
    gateway, first = queued()
    gateway.clock.advance(9)
    first.end()
    gateway.clock.advance(0)
    assert gateway.asked.timeouts.first_byte == 600


# --- switches and credentials ---------------------------------------------------------------------


def test_a_provider_that_is_switched_off_is_passed_over() -> None:
    """The next one is asked; where all are off, the client is told so."""
    gateway = played()
    switches = gateway.gateway.standing.switches
    switches.disable("p", None, None, "somebody")
    assert serve(gateway) == "q"
    skipped = gateway.sink.traces[-1].attempts[0]
    assert (skipped.provider, skipped.outcome, skipped.cause) == ("p", "skipped", "disabled")
    switches.disable("q", "m", 20, "somebody")
    gateway.call()
    assert gateway.refusal() == (503, "provider_disabled")
    gateway.call(body=b'{"model": "another"}')
    assert gateway.asked.provider == "q"


def test_a_single_provider_that_is_switched_off_is_not_asked() -> None:
    """And is again once its time is over."""
    gateway = PlayedGateway()
    gateway.gateway.standing.switches.disable("p", None, 20, "somebody")
    gateway.call()
    status, fields, _ = gateway.got()
    assert (status, fields[b"retry-after"]) == (503, b"20")
    gateway.clock.advance(20)
    assert serve(gateway) == "p"


@pytest.mark.parametrize("code", [401, 403])
def test_a_refused_credential_is_passed_over_whatever_retry_on_says(
    code: int, tmp_path: Path
) -> None:
    """It is the proxy's own fault, not the caller's."""
    secret = write_credential(tmp_path, "key", "sk-secret")
    for credential, expected in (("", ["p"]), ('credential = "key"', ["p", "q"])):
        gateway = played(route="retry_on = []", provider=credential, more=secret)
        gateway.call()
        gateway.response(code).end()
        assert names(gateway) == expected


def test_a_refused_credential_is_logged_once_a_minute(tmp_path: Path) -> None:
    """Loud, but not once for each request; nobody but the operator can mend it."""
    secret = write_credential(tmp_path, "key", "sk-secret")
    gateway = played(provider='credential = "key"', more=secret)
    with capturedLogs() as logs:
        for _ in range(4):
            gateway.connect()
            gateway.call()
            gateway.response(403).end()
            gateway.response().end()
            gateway.clock.advance(25)
    said = [formatEvent(event) for event in logs if event["log_level"] is LogLevel.warn]
    assert said == ["providers.p: the provider refuses the proxy's credential (403)"] * 2


def test_a_403_leaves_nobody_alone(tmp_path: Path) -> None:
    """It is often about one model, and says nothing of the provider."""
    secret = write_credential(tmp_path, "key", "sk-secret")
    gateway = played(provider='credential = "key"', more=secret)
    for _ in range(20):
        gateway.call()
        gateway.response(403).end()
        gateway.response().end()
        gateway.transport.take()
    gateway.upstream.asked.clear()
    gateway.call()
    assert names(gateway) == ["p"]


# --- what an attempt leaves behind ----------------------------------------------------------------


def test_an_upload_that_is_cut_off_is_its_clients_own_matter() -> None:
    """A provider that resets large bodies can be reached by the others all the same."""
    gateway = played(candidates="p")
    for _ in range(5):
        gateway.call()
        fail(gateway, upstream_broken("reset", may_have_run=False))
        gateway.transport.take()
    p = gateway.config.providers["p"]
    health = gateway.gateway.standing.health
    assert health.wait(p, "c", "m").own == 15
    assert health.wait(p, "another", "m").own == 0


DRAIN = 'on_disconnect = "drain"'
CHAT = "/p/v1/chat/completions"


def test_nobody_is_asked_for_a_client_that_is_gone() -> None:
    """A route that reads on for tokens cancels where no provider is at work."""
    gateway = played(route=DRAIN)
    gateway.call("POST", CHAT)
    gateway.upstream.begins = False  # the second one is being connected
    gateway.response(503).end()
    gateway.transport.end(ConnectionDone())
    gateway.clock.advance(0)
    assert gateway.upstream.cancelled == 1
    assert gateway.trace().end_reason == "client_gone"


def test_what_was_not_sent_whole_is_no_work() -> None:
    """The provider broke off before it had all of the request; the next one refused it."""
    gateway = PlayedGateway(
        candidates="p q", more=OTHERS.replace("MORE", ""), client="tokens_per_minute = 100000"
    )
    gateway.call("POST", CHAT)
    fail(gateway, upstream_broken("reset", may_have_run=False))
    refuse(gateway, 400, b"no")
    assert gateway.trace().counted_tokens == 0


# --- ends -----------------------------------------------------------------------------------------


def test_a_failure_after_the_client_left_asks_nobody_else() -> None:
    """Its response was awaited for its tokens; a refusal has none."""
    gateway = played(route=DRAIN)
    gateway.call("POST", CHAT)
    gateway.transport.end(ConnectionDone())
    gateway.clock.advance(0)
    assert gateway.upstream.cancelled == 0
    gateway.response(503)
    assert names(gateway) == ["p"]
    assert gateway.trace().end_reason == "client_gone"


def test_a_broken_connection_after_the_client_left_asks_nobody_else() -> None:
    """Neither does an error."""
    gateway = played(route=DRAIN + '\nretry_on = ["reset"]')
    gateway.call("POST", CHAT)
    gateway.transport.end(ConnectionDone())
    gateway.clock.advance(0)
    fail(gateway, upstream_broken("reset"))
    assert names(gateway) == ["p"]
    assert gateway.trace().end_reason == "client_gone"


def test_who_waited_for_a_place_asks_nobody_that_is_to_be_left_alone() -> None:
    """Both providers were refusing in the meantime."""
    gateway = played(provider=QUEUE)
    responses = []
    for _ in range(2):
        gateway.call()
        responses.append(gateway.response())
        gateway.connect()
    gateway.call()
    standing = gateway.gateway.standing
    for provider in gateway.config.providers.values():
        standing.health.cool_down(provider, "c", "m", 20, 429)
    gateway.clock.advance(4)
    for response in responses:
        response.end()
    gateway.clock.advance(0)
    assert gateway.refusal() == (429, "all_cooling")
    assert len(gateway.upstream.asked) == 2
    assert [standing.places.at(name).busy for name in "pq"] == [0, 0]
    attempts = gateway.sink.traces[-1].attempts
    assert [one.cause for one in attempts] == ["cooling", "cooling"]


def test_a_full_queue_is_passed_over() -> None:
    """The next provider's queue has room."""
    gateway = played(provider='max_streams = 1\nqueue = { size = 1, timeout = "10s" }')
    responses = []
    for _ in range(2):
        gateway.call()
        responses.append(gateway.response())
        gateway.connect()
    for _ in range(2):
        gateway.call()
        gateway.connect()
    assert gateway.gateway.standing.places.queued() == {"p": 1, "q": 1, "r": 0}
    responses[1].end()
    gateway.clock.advance(0)
    assert names(gateway) == ["p", "q", "q"]


def test_a_refusal_reaches_the_client_whatever_error_comes_last() -> None:
    """Also where nobody would have been asked after that error."""
    gateway = played(candidates="p q r", route="retry_on = [503]")
    gateway.call()
    refuse(gateway, 503, b"busy")
    fail(gateway, upstream_unreachable("no"))
    status, _, body = gateway.got()
    assert (status, body) == (503, b"busy")
    assert names(gateway) == ["p", "q"]
    assert gateway.trace().provider == "p"


def test_what_the_last_provider_may_have_done_beats_a_refusal_with_reset_too() -> None:
    """An SDK would ask again after the refusal."""
    gateway = played(route='retry_on = ["reset", 503]')
    gateway.call()
    refuse(gateway, 503, b"busy")
    fail(gateway, upstream_broken("reset"))
    status, fields, _ = gateway.got()
    assert (status, fields[b"x-should-retry"]) == (502, b"false")


def test_a_provider_that_is_full_for_a_moment_keeps_its_sessions() -> None:
    """Only a failure moves them."""
    gateway = played(provider="max_streams = 1", route='sticky = "client"')
    gateway.call()
    first = gateway.response()
    gateway.connect()
    assert serve(gateway) == "q"
    first.end()
    gateway.clock.advance(0)
    assert serve(gateway) == "p"


def test_who_was_at_a_provider_that_the_route_has_no_more_moves() -> None:
    """A reload took it out of the route."""
    gateway = played(route='sticky = "client"\nbalance = "weighted"')
    gateway.gateway.standing.stickiness.remember(("p", "c"), "gone", 3600)
    assert {serve(gateway) for _ in range(4)} == {"p"}


def test_the_time_for_all_of_it_is_the_providers_that_is_asked() -> None:
    """Counted from the beginning of the request."""
    gateway = PlayedGateway(
        candidates="p q", more=OTHERS.replace("MORE", 'timeouts = { total = "5s" }')
    )
    gateway.call()
    gateway.clock.advance(3)
    fail(gateway, upstream_unreachable("no"))
    gateway.clock.advance(2)
    assert gateway.refusal() == (504, "upstream_timeout")
    assert gateway.upstream.cancelled == 1


def test_after_a_refusal_too_a_provider_that_refused_others_is_asked() -> None:
    """Nobody else is left, and this client it has not refused."""
    gateway = played()
    q = gateway.config.providers["q"]
    gateway.gateway.standing.health.cool_down(q, "another", "m", 20, 429)
    gateway.call()
    refuse(gateway, 503, b"busy")
    assert names(gateway) == ["p", "q"]
    gateway.response(200).end()
    assert gateway.got()[0] == 200


def test_who_was_late_in_the_queue_may_ask_again() -> None:
    """No provider has done anything."""
    gateway = PlayedGateway(provider=QUEUE, route='timeouts = { total = "3s" }')
    gateway.call()
    gateway.response()
    gateway.connect()
    gateway.call()
    gateway.clock.advance(3)
    status, fields, _ = gateway.got()
    assert (status, fields[b"x-llmproxy-error"]) == (504, b"upstream_timeout")
    assert b"x-should-retry" not in fields
