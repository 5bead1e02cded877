"""The state of the process in one line, as ``systemctl status`` shows it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from llmproxy.gateway.recorder import Recorder
from llmproxy.ops.drain import Drain
from llmproxy.ops.reload import Reload
from llmproxy.server.site import Site
from llmproxy.version import version


class Status:
    """Makes the line from what the parts hold.

    Args:
        site: the site that clients are connected to.
        recorder: knows which requests are being served.
        drain: how the process shuts down.
        reload: whether the last reload went well.
        wall: seconds since the epoch.
    """

    def __init__(
        self,
        site: Site,
        recorder: Recorder,
        drain: Drain,
        reload: Reload,
        wall: Callable[[], float],
    ) -> None:
        self._site = site
        self._recorder = recorder
        self._drain = drain
        self._reload = reload
        self._wall = wall

    def __call__(self) -> str:
        """Return the line, as it is now."""
        if self._drain.begun:
            return self._draining()
        line = f"{self._recorder.running} streams, {len(self._site.connections)} connections"
        failed = "" if self._reload.succeeded else ", the last reload FAILED (see the log)"
        return f"{line}, version {version()}{failed}"

    def _draining(self) -> str:
        left = f"draining: {self._drain.remaining} streams are left"
        if not self._drain.remaining_s:
            return left
        until = datetime.fromtimestamp(self._wall() + self._drain.remaining_s, UTC)
        return f"{left}, to be cut at {until:%H:%M:%S} UTC"
