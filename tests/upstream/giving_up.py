"""A provider and our side of the wire, for requests that are given up."""

from __future__ import annotations

import os
import select
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from llmproxy.config import Config, parse
from llmproxy.upstream.client import Upstream
from llmproxy.upstream.response import Response
from tests.support.fake_transport import until
from tests.support.kernel import held
from tests.support.sockets import WAIT, Provider, Wire
from tests.support.tls import Authority

CLOCK: Any = reactor
SAMPLES = 20
MOST = 1.0
"""Seconds that the median may take on a machine that is busy; the promise is a tenth of it."""

STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDS = select.POLLRDHUP | select.POLLHUP | select.POLLERR


def config_for(url: str, authority: Authority) -> Config:
    """Return a configuration with one provider."""
    return parse(
        f"""
        [proxy]
        listen = ["tcp:0"]
        anonymous = true
        [admin]
        listen = "tcp:0"
        [providers.p]
        url = "{url}"
        dialect = "openai"
        ca = "{authority.ca_path}"
        [[routes]]
        path = "/"
        providers = ["p"]
        """,
        environ={},
    )


def assert_quick(took: list[float], node: Any) -> None:
    """Check the median of what was measured, in seconds, and write it into the test's report."""
    assert len(took) == SAMPLES
    median = statistics.median(took)
    node.user_properties.append(("median_ms", f"{median * 1000:.3f}"))
    assert median < MOST


class Stage:
    """One provider that follows ``script``, and our side of the wire.

    Attributes:
        reached: set by the script where the phase is one that the provider sees.
        ended: when the provider saw the end of its connection, in seconds.
    """

    def __init__(self, authority: Authority, *, tls: bool, silent: bool = False) -> None:
        context = authority.server() if tls and not silent else None
        self.provider = Provider(self._serve, tls=context, receive_buffer=4096)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://localhost:{self.provider.port}"
        self.config = config_for(self.url, authority)
        self.reached = threading.Event()
        self.over = threading.Event()
        self.ended = 0.0
        self.script: Callable[[Wire], None] = lambda wire: None

    def upstream(self) -> Upstream:
        """Return our side."""
        return Upstream(CLOCK, time.monotonic, self.config)

    def send(self, upstream: Upstream, method: str = "GET", body: Any = b"") -> Deferred[Response]:
        """Send a request."""
        return upstream.send(
            self.config.providers["p"],
            method,
            b"/",
            [],
            body,
            credential=b"",
            timeouts=self.config.timeouts,
        )

    def _serve(self, wire: Wire) -> None:
        self.script(wire)
        self.reached.set()
        poll = select.poll()
        poll.register(wire.sock.fileno(), ENDS)
        # The end is seen behind whatever lies unread, in the turn in which the kernel has it.
        assert poll.poll(WAIT * 1000)
        self.ended = time.monotonic()
        self.over.set()


def descriptors() -> int:
    """Return how many files and sockets the process has open."""
    return len(os.listdir("/proc/self/fd"))


async def assert_nothing_left(upstream: Upstream, port: int, timers: int) -> None:
    """No connection, no timed call and no socket to the provider stays behind."""
    await until(lambda: not any(upstream.counts().values()))
    await until(lambda: not held(peer=port).sockets)
    assert len(CLOCK.getDelayedCalls()) <= timers + 1  # the wait's own turn is one
