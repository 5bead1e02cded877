"""The objects, descriptors and timed calls that lives may leave behind in a process."""

from __future__ import annotations

import gc
import os
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from llmproxy.gateway.exchange import Exchange
from llmproxy.net.timers import Timers
from llmproxy.policy.limits import Lease
from llmproxy.server.connection import ClientConnection
from llmproxy.server.request import Request
from llmproxy.server.upload import Upload
from llmproxy.stream.relay import Relay
from llmproxy.stream.tap import StreamAccumulator
from llmproxy.upstream.dialer import Dial
from llmproxy.upstream.http1 import Connection
from llmproxy.upstream.request_body import HeldBody, Sending
from llmproxy.upstream.response import Response

CLOCK: Any = reactor

PASSING = (
    ClientConnection,
    Request,
    Exchange,
    Lease,
    Upload,
    Relay,
    StreamAccumulator,
    Response,
    HeldBody,
    Sending,
    Dial,
    Connection,
)
"""The classes of a request; no object of them may stay after it."""


class Everything(NamedTuple):
    """The objects of a request, descriptors by kind, and timed calls in this process."""

    objects: Counter[str]
    files: Counter[str]
    calls: set[Any]

    def more_than(self, before: Everything) -> Everything:
        """Return the difference from an earlier state."""
        return Everything(
            self.objects - before.objects, self.files - before.files, self.calls - before.calls
        )


NOTHING = Everything(Counter(), Counter(), set())


async def everything() -> Everything:
    """Count the objects, descriptors and timed calls of this process."""
    await deferLater(CLOCK, 0)  # closing ends in the next turn
    return Everything(_passing_objects(), _open_files(), delayed_calls())


def _passing_objects() -> Counter[str]:
    """Count the objects of these classes, and Deferreds."""
    gc.collect()
    kinds = (*PASSING, Deferred)
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in kinds)


def _open_files() -> Counter[str]:
    """Count the open descriptors of this process by target; sockets count by kind only.

    Twisted keeps one on ``/dev/null`` in reserve from the first time that it listens.
    """
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is closed by now
            found[os.readlink(f"/proc/self/fd/{name}").partition("[")[0]] += 1
    del found[os.devnull]
    return found


def delayed_calls() -> set[Any]:
    """Return the functions that the reactor will call."""
    return {call.func for call in CLOCK.getDelayedCalls() if not _is_idle_bell(call)}


def _is_idle_bell(call: Any) -> bool:
    """Return whether ``Timers`` keeps this call although nothing waits for it."""
    owner = getattr(call.func, "__self__", None)
    return isinstance(owner, Timers) and not call.args[1]
