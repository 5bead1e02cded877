"""The state of the process: in one line for ``systemctl status``, in a row for operators."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from llmproxy.admin.overview import Draining, ProcessRow, Reloaded
from llmproxy.config.values import show_instant
from llmproxy.gateway.recorder import Recorder
from llmproxy.ops.drain import Drain
from llmproxy.ops.reload import Reload
from llmproxy.server.site import Site
from llmproxy.version import version


class Status:
    """Makes both from what the parts hold.

    Args:
        site: the site that clients are connected to.
        recorder: knows which requests are being served.
        drain: how the process shuts down.
        reload: whether the last reload went well.
        wall: seconds since the epoch.
        instance: this process's name among several.
    """

    def __init__(
        self,
        site: Site,
        recorder: Recorder,
        drain: Drain,
        reload: Reload,
        wall: Callable[[], float],
        instance: str = "0",
    ) -> None:
        self._site = site
        self._recorder = recorder
        self._drain = drain
        self._reload = reload
        self._wall = wall
        self._instance = instance
        self._started = wall()

    def __call__(self) -> str:
        """Return the line, as it is now."""
        if self._drain.begun:
            return self._draining()
        line = f"{self._recorder.running} streams, {len(self._site.connections)} connections"
        failed = "" if self._reload.succeeded else ", the last reload FAILED (see the log)"
        return f"{line}, version {version()}{failed}"

    def row(self) -> ProcessRow:
        """Return what is known of the process, for its admin site."""
        drain, now = self._drain, self._wall()
        draining = Draining(drain.remaining, round(drain.remaining_s, 3)) if drain.begun else None
        return ProcessRow(
            version=version(),
            instance=self._instance,
            time=show_instant(now),
            started=show_instant(self._started),
            uptime_s=round(now - self._started, 3),
            connections=len(self._site.connections),
            draining=draining,
            reload=Reloaded(self._reload.succeeded, show_instant(self._reload.succeeded_at)),
        )

    def _draining(self) -> str:
        left = f"draining: {self._drain.remaining} streams are left"
        if not self._drain.remaining_s:
            return left
        until = datetime.fromtimestamp(self._wall() + self._drain.remaining_s, UTC)
        return f"{left}, to be cut at {until:%H:%M:%S} UTC"
