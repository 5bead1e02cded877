"""Giving a request up, in every phase, plain and by TLS: who sees it how soon, what is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred

from llmproxy.upstream.client import Upstream
from llmproxy.upstream.response import Response
from tests.support.fake_transport import Collector, until
from tests.support.sockets import Wire, chunked
from tests.support.tls import Authority
from tests.upstream.giving_up import (
    CLOCK,
    SAMPLES,
    STREAM,
    Stage,
    assert_nothing_left,
    assert_quick,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that the provider's certificate comes from."""
    return Authority(tmp_path_factory.mktemp("ca"))


def drop(_: object) -> None:
    """Take no interest in what was read."""


Giving = Callable[[Stage, Upstream], Any]
"""Brings a request into its phase; returns what gives it up."""


async def sending(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """Half a body is on its way; the provider takes no more of it."""
    stage.script = lambda wire: drop(wire.read_head())
    asked = stage.send(upstream, "POST", bytes(4 << 20))
    return await given_up_by_cancel(stage, asked)


async def awaiting_the_head(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The provider has the request, and sent half a head."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nX-Half: ")

    stage.script = script
    return await given_up_by_cancel(stage, stage.send(upstream))


async def awaiting_a_whole_answer(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The provider has the whole body of a request that asks for no stream, and works on it."""
    stage.script = lambda wire: drop(wire.read_request())
    return await given_up_by_cancel(stage, stage.send(upstream, "POST", b'{"stream":false}'))


async def given_up_by_cancel(stage: Stage, asked: Deferred[Response]) -> Callable[[], None]:
    """Wait for the provider to reach the phase; the Deferred is the hold on the request."""
    asked.addErrback(lambda failure: None)
    await until(stage.reached.is_set)
    return asked.cancel


async def first_chunk(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The head is in, and of the body there is nothing yet."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM)

    stage.script = script
    response = await stage.send(upstream)
    response.deliverBody(Collector())
    await until(stage.reached.is_set)
    return response.abort


async def mid_stream(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """Chunks have come, and the provider has more of them."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(STREAM, chunked(b"data: 1\n\n"))

    stage.script = script
    response = await stage.send(upstream)
    body = Collector()
    response.deliverBody(body)
    await until(lambda: body.body and stage.reached.is_set())
    return response.abort


async def handshake(stage: Stage, upstream: Upstream) -> Callable[[], None]:
    """The provider has the ClientHello and says nothing to it."""
    stage.script = lambda wire: drop(wire.receive())
    return await given_up_by_cancel(stage, stage.send(upstream))


PHASES = [sending, awaiting_the_head, first_chunk, mid_stream, awaiting_a_whole_answer]
CELLS = [(phase, tls) for phase in PHASES for tls in (False, True)] + [(handshake, True)]


@pytest.mark.parametrize(
    ("phase", "tls"),
    CELLS,
    ids=[f"{phase.__name__}, {'tls' if tls else 'plain'}" for phase, tls in CELLS],
)
@pytest_twisted.ensureDeferred
async def test_the_provider_sees_the_end_at_once(
    authority: Authority, phase: Giving, tls: bool, request: pytest.FixtureRequest
) -> None:
    """Twenty requests are given up in the same phase: each is seen at once and leaves nothing."""
    stage = Stage(authority, tls=tls, silent=phase is handshake)
    took: list[float] = []
    with stage.provider:
        upstream = stage.upstream()
        timers = len(CLOCK.getDelayedCalls())
        for _ in range(SAMPLES):
            stage.reached.clear()
            stage.over.clear()
            give_up = await phase(stage, upstream)
            began = time.monotonic()
            give_up()
            await until(stage.over.is_set)
            took.append(stage.ended - began)
            await assert_nothing_left(upstream, stage.provider.port, timers)
        assert stage.provider.accepted == SAMPLES
    assert_quick(took, request.node)
