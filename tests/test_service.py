"""Signals as calls on the reactor's thread."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from llmproxy.service import take_signals

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Give the signals back."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@ensureDeferred
async def test_each_signal_is_a_call_of_its_own() -> None:
    """The calls are made in the reactor's next turn, and not while other code runs."""
    calls: list[str] = []
    both: Deferred[None] = Deferred()

    def second() -> None:
        calls.append("second")
        both.callback(None)

    take_signals(reactor, {signal.SIGUSR1: lambda: calls.append("first"), signal.SIGUSR2: second})
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert calls == []
    await both
    assert calls == ["first", "second"]
