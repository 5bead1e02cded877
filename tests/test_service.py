"""Signals as calls on the reactor's thread."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from llmproxy.service import ignore_signals, take_signals

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


def test_a_signal_that_came_a_moment_too_early_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """So CPython words what nobody can catch; whatever else nobody can catch is reported on."""
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    ignore_signals(NUMBERS)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    words = ["Signal 10 ignored due to race condition", "another"]
    errors = [SimpleNamespace(exc_value=OSError(text)) for text in words]
    for error in errors:
        sys.unraisablehook(error)
    assert reported == errors[1:]
