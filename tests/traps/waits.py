"""Waiting for what happens elsewhere: in a thread, in the kernel, behind a Deferred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

P = ParamSpec("P")
T = TypeVar("T")

_CLOCK: Any = reactor
_POLL = 0.005
"""Seconds between two looks at something that changes without a notice."""


def thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
    """Do something that blocks, in a thread."""
    return deferToThread(call, *args, **kwargs)


def within(seconds: float, awaited: Deferred[T]) -> Deferred[T]:
    """Wait for at most so many seconds; then ``TimeoutError``."""
    return awaited.addTimeout(seconds, _CLOCK)


async def until(predicate: Callable[[], Any], seconds: float = 2.0) -> bool:
    """Wait until something is so; return whether it became so in time."""
    deadline = _CLOCK.seconds() + seconds
    while not predicate():
        if _CLOCK.seconds() > deadline:
            return False
        await deferLater(_CLOCK, _POLL)
    return True


async def ended(body_end: Deferred[bool], seconds: float) -> bool | None:
    """Wait for the end of a body: whether it was whole, or None where there was no end in time."""
    finished = await until(lambda: body_end.called, seconds)
    return await body_end if finished else None
