"""How a process that is told to stop comes to rest: refuse, wait, cut.

A drain begins once: listeners are closed, idle connections too, running answers go on.  It is over
when the last client connection is gone, or cuts what is left at its deadline, or at once when it is
asked to.  Only sites are known here, not what they serve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from llmproxy.front.http import Site

_log = Logger()


class Drain:
    """The end of one process's life.

    Args:
        site: the site that clients are connected to.
        reactor: keeps the deadline.
        timeout: seconds that running answers are waited for.
        running: how many requests are being served now.
    """

    def __init__(
        self, site: Site, reactor: Any, timeout: float, running: Callable[[], int]
    ) -> None:
        self._site = site
        self._reactor = reactor
        self._timeout = timeout
        self._running = running
        self._cut = 0
        self.begun = False

    def begin(self) -> Deferred[None]:
        """Refuse new work and wait for what runs.

        Returns:
            fires when no client connection is left.  It never fails.
        """
        self.begun = True
        ended_before = self._site.ended
        _log.info("draining: {running} requests are being served", running=self._running())
        deadline = self._reactor.callLater(self._timeout, self.cut)
        self._site.drain()

        def rested(_: None) -> None:
            if deadline.active():
                deadline.cancel()
            finished = self._site.ended - ended_before - self._cut
            _log.info("drained: {finished} finished, {cut} cut", finished=finished, cut=self._cut)

        return self._site.when_empty().addCallback(rested)

    def cut(self) -> None:
        """Drop what still runs, now."""
        self._cut += self._running()
        self._site.cut()
