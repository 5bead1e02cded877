"""Giving a request up before it has a connection: while its name is looked up, or none accepts."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import pytest_twisted

from llmproxy.upstream import client
from llmproxy.upstream.resolver import Resolver
from tests.support.fake_transport import until
from tests.support.sockets import WAIT
from tests.support.tls import Authority
from tests.upstream.giving_up import (
    CLOCK,
    SAMPLES,
    Stage,
    assert_nothing_left,
    assert_quick,
    config_for,
    descriptors,
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that the provider's certificate comes from."""
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def hanging_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let every name hang in the resolver until the test is over; the names, in order."""
    over = threading.Event()
    asked: list[str] = []

    def getaddrinfo(host: str, *_: Any) -> list[Any]:
        asked.append(host)
        over.wait(WAIT)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(client, "Resolver", partial(Resolver, getaddrinfo=getaddrinfo))
    yield asked
    over.set()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest_twisted.ensureDeferred
async def test_a_request_that_waits_for_a_name_is_given_up_at_once(
    authority: Authority, tls: bool, hanging_names: list[str], request: pytest.FixtureRequest
) -> None:
    """Its caller is told in the same turn, nothing is left, and nothing is connected to later."""
    stage = Stage(authority, tls=tls)
    took: list[float] = []
    with stage.provider:
        upstream = stage.upstream()
        timers = len(CLOCK.getDelayedCalls())
        for _ in range(SAMPLES):
            asked = stage.send(upstream)
            await until(lambda: hanging_names)
            assert upstream.counts()["p", "connecting"] == 1
            began = time.monotonic()
            asked.addErrback(lambda failure: took.append(time.monotonic() - began))  # noqa: B023 - used at once
            asked.cancel()
            await assert_nothing_left(upstream, stage.provider.port, timers)
        assert hanging_names == ["localhost"]
        assert stage.provider.accepted == 0
    assert_quick(took, request.node)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest_twisted.ensureDeferred
async def test_a_connection_that_does_not_come_about_is_given_up_at_once(
    authority: Authority, tls: bool, request: pytest.FixtureRequest
) -> None:
    """The socket whose SYN nobody answers is closed as soon as nobody waits for it."""
    took: list[float] = []
    with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for filler in (one, two):  # the queue is full now: further SYNs are not answered
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        stage = Stage(authority, tls=tls)
        stage.provider._listener.close()  # this one is not asked
        scheme = "https" if tls else "http"
        stage.config = config_for(f"{scheme}://127.0.0.1:{port}", authority)
        upstream = stage.upstream()
        timers = len(CLOCK.getDelayedCalls())
        before = descriptors()
        for _ in range(SAMPLES):
            asked = stage.send(upstream)
            asked.addErrback(lambda failure: None)
            # Twisted connects in the next turn; the other call is the wait's own.
            await until(lambda: len(CLOCK.getDelayedCalls()) <= timers + 1)
            assert upstream.counts()["p", "connecting"] == 1
            assert descriptors() == before + 1
            began = time.monotonic()
            asked.cancel()
            await until(lambda: descriptors() == before)
            took.append(time.monotonic() - began)
            await assert_nothing_left(upstream, -1, timers)
    assert_quick(took, request.node)
