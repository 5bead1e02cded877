"""The signals that the process takes, each as a call on the reactor's thread.

A handler of Python's runs between any two instructions of the main thread; what it may do safely is
ask the reactor to do the rest.  Which signals there are, and what they mean, is decided by whoever
passes the calls in.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any


def take_signals(reactor: Any, calls: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """From now on let each of these signals be a call; one that comes early is done later."""
    for number, call in calls.items():
        signal.signal(number, partial(_pass_on, reactor, call))


def _pass_on(reactor: Any, call: Callable[[], None], *_: object) -> None:
    reactor.callFromThread(call)
