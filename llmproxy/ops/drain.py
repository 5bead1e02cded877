"""How a process shuts down: refuse new work, wait for what runs, cut what is left.

A drain begins once.  Listeners and idle connections are closed, running responses go on.  The drain
is over when the last client connection has ended.  At its deadline, or when it is asked to, it cuts
the connections that are left.  What is left, and for how long, can be read at any time.  Only sites
are known here, not what they serve.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from llmproxy.server.site import Site

_REPORTED_EVERY = 10.0
"""Seconds between two lines of progress in the log."""

_log = Logger()


class Drain:
    """The shutdown of one process.

    A request counts from the end of its head, also while its body is still coming.

    Args:
        site: the site that clients are connected to.
        reactor: keeps the deadline.
        timeout: seconds that running responses are waited for; it may change until they are.

    Attributes:
        begun: whether the process is shutting down.
    """

    def __init__(self, site: Site, reactor: Any, timeout: float) -> None:
        self._site = site
        self._reactor = reactor
        self.timeout = timeout
        self._ended_before = 0
        self._deadline: Any = None
        self._finished: int | None = None
        self._cut = 0
        self.begun = False

    @property
    def remaining(self) -> int:
        """How many requests are under way; 0 while nothing is drained."""
        return self._running() if self.begun else 0

    @property
    def remaining_s(self) -> float:
        """Seconds until what is left is cut; 0 while nothing is drained."""
        if self._deadline is None or not self._deadline.active():
            return 0.0
        left: float = self._deadline.getTime() - self._reactor.seconds()
        return max(0.0, left)

    def begin(self) -> Deferred[None]:
        """Refuse new work, and wait for what runs.

        Returns:
            fires when no client connection is left.  It never fails.
        """
        self.begun = True
        self._ended_before = self._site.ended
        _log.info("draining: {running} requests are being served", running=self._running())
        self._deadline = self._reactor.callLater(self.timeout, self.cut)
        progress = LoopingCall(self._report)
        progress.clock = self._reactor
        progress.start(_REPORTED_EVERY, now=False)
        self._site.drain()

        def rested(_: None) -> None:
            progress.stop()
            if self._deadline.active():
                self._deadline.cancel()
            finished = self._ended() if self._finished is None else self._finished
            _log.info("drained: {finished} finished, {cut} cut", finished=finished, cut=self._cut)

        return self._site.when_empty().addCallback(rested)

    def cut(self) -> None:
        """Drop what still runs, now."""
        if self._finished is None:
            self._finished = self._ended()  # what is cut counts as ended, too
        self._cut += self._running()
        self._site.cut()

    def _running(self) -> int:
        connections = self._site.connections
        return sum(not request.is_over for channel in connections for request in channel.requests)

    def _ended(self) -> int:
        return self._site.ended - self._ended_before

    def _report(self) -> None:
        if self._finished is not None:
            return  # it was cut, and the last line follows
        _log.info(
            "draining: {remaining} requests are left, to be cut in {seconds} s",
            remaining=self.remaining,
            seconds=round(self.remaining_s),
        )
