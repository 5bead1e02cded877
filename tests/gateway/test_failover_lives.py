"""Thousands of random lives among failing, full and slow providers; in the end nothing is left.

The test plays clients, providers and the clock.  A failure names the seed.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from typing import Any

from twisted.internet.error import ConnectionDone

from llmproxy.errors import upstream_broken, upstream_timeout, upstream_unreachable
from tests.gateway.played import BODY, JSON, PlayedGateway, PlayedResponse
from tests.support.sockets import request

SEED = int(os.environ["LLMPROXY_TEST_SEED"])
LIVES = 5000
NAMES = "pqr"
PROVIDER = """
max_streams = 3
queue = { size = 6, timeout = "4s" }
health = { failures = 2, window = "20s", open_for = "3s" }
"""
ROUTE = """
balance = "weighted"
sticky = "session"
sticky_for = "30s"
retry_on = ["connect", "reset", "timeout", 429, 503]
timeouts = { total = "20s" }
"""
LIMITED = f"""
[clients.limited]
keys = ["sha256:{hashlib.sha256(b"other").hexdigest()}"]
max_streams = 5
tokens_per_minute = 40000
tokens_per_day = 1000000000
"""
OTHERS = "".join(
    f'[providers.{name}]\nurl = "https://{name}.example"\ndialect = "openai"\n{PROVIDER}\n'
    for name in NAMES[1:]
)
ENDS = {"complete", "client_gone", "upstream_refused", "rejected", "upstream_timeout"} | {
    "upstream_unreachable",
    "upstream_broken",
}


class Crowd:
    """A gateway, its clients' connections, and what providers were asked and have not ended."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.gateway = PlayedGateway(
            candidates=" ".join(NAMES),
            provider=PROVIDER,
            route=ROUTE,
            more=OTHERS + LIMITED,
        )
        self.gateway.gateway.limits.follow(self.gateway.config.clients)
        self.clients: list[Any] = [self.gateway.transport]
        self.bodies: list[PlayedResponse] = []
        self.calls = 0

    def call(self) -> None:
        """Let a new client send a request."""
        gateway, session = self.gateway, self.rng.randrange(12)
        gateway.connect()
        self.clients.append(gateway.transport)
        key = self.rng.choice(("key", "key", "other"))
        fields = (f"X-Api-Key: {key}", JSON, f"X-Session-Id: {session}")
        gateway.send(request("POST", "/p/v1", *fields, body=BODY))
        self.calls += 1

    def open(self) -> list[Any]:
        """What providers were asked and have not responded to."""
        asked = self.gateway.upstream.asked
        asked[:] = [one for one in asked if not one.response.called]
        return asked

    def respond(self) -> None:
        """Let a provider respond, refuse or fail."""
        if not self.open():
            return
        one = self.rng.choice(self.open())
        kind = self.rng.random()
        if kind < 0.15:
            one.response.errback(upstream_unreachable("no"))
        elif kind < 0.25:
            run = self.rng.random() < 0.5
            one.response.errback(upstream_broken("reset", may_have_run=run))
        elif kind < 0.3:
            one.response.errback(upstream_timeout("first_byte", may_have_run=True))
        else:
            code = self.rng.choice((200, 200, 200, 400, 429, 503, 500))
            wait = (b"retry-after-ms", b"%d" % self.rng.randrange(1, 3000))
            response = PlayedResponse(code, (wait,) if code in (429, 503) else ())
            self.bodies.append(response)
            one.response.callback(response)

    def go_on(self) -> None:
        """Let a body bring something, end or break."""
        self.bodies = [one for one in self.bodies if one.body is not None and not one.aborts]
        if not self.bodies:
            return
        body = self.rng.choice(self.bodies)
        kind = self.rng.random()
        if kind < 0.5:
            body.push(b"x" * self.rng.choice((1, 100, 30_000)))
            return
        self.bodies.remove(body)
        body.end() if kind < 0.9 else body.end(upstream_broken("reset"))

    def leave(self) -> None:
        """Let a client leave, whatever it waits for."""
        if self.clients:
            self.clients.pop(self.rng.randrange(len(self.clients))).end(ConnectionDone())

    def step(self) -> None:
        """Let one of these happen."""
        kind = self.rng.random()
        if kind < 0.3:
            self.call()
        elif kind < 0.6:
            self.respond()
        elif kind < 0.85:
            self.go_on()
        elif kind < 0.9:
            self.leave()
        elif kind < 0.91:
            self.gateway.clock.advance(20)
        else:
            self.gateway.clock.advance(self.rng.choice((0, 0.1, 0.5, 1.5)))


def test_random_lives_leave_nothing_behind() -> None:
    """Every request has one record; no place, no turn, no probe and no timer is left."""
    crowd = Crowd(SEED)
    gateway, places = crowd.gateway, crowd.gateway.gateway.standing.places
    while crowd.calls < LIVES:
        crowd.step()
        for name in NAMES:
            assert 0 <= places.at(name).busy <= 3, f"seed {SEED}"
            assert len(places.at(name)) <= 6
    while crowd.clients:
        crowd.leave()
    gateway.clock.advance(0)
    for _ in range(90):
        gateway.clock.advance(1)

    traces = gateway.sink.traces
    assert len(traces) == LIVES
    assert gateway.recorder.running == 0
    left = {name: (places.at(name).busy, len(places.at(name))) for name in NAMES}
    assert left == dict.fromkeys(NAMES, (0, 0)), f"seed {SEED}"
    assert gateway.value("active_streams") == 0
    assert gateway.site.memory.held == 0
    assert not gateway.metrics.live
    assert not gateway.clock.getDelayedCalls()
    ends = Counter(trace.end_reason for trace in traces)
    assert ends.keys() == ENDS
    reasons = {trace.error for trace in traces if trace.end_reason == "rejected"}
    assert reasons >= {"queue_full", "queue_timeout", "all_cooling", "limited"}
    remaining = gateway.gateway.limits.remaining()
    assert remaining["limited", "max_streams"] == 5, f"seed {SEED}"
    assert remaining["limited", "tokens_per_minute"] == 40000, "the minute is over"
    spent = 1_000_000_000 - remaining["limited", "tokens_per_day"]
    assert spent == sum(trace.counted_tokens or 0 for trace in traces), f"seed {SEED}"
    assert any(len(trace.attempts) == 3 for trace in traces)
    for trace in traces:
        asked = [one.provider for one in trace.attempts if one.outcome != "skipped"]
        assert len(set(asked)) == len(asked), "nobody is asked twice"
