"""SIGHUP: the file is read again, and what can change without a restart changes.

Trace files are opened anew first, whatever the configuration says: that is how logrotate asks.
A file with a mistake changes nothing.  What changes is the certificate of the TLS listeners and its
key; what else is new in the file waits for the next start, and the log says so.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from twisted.logger import Logger

from llmproxy.config import Config, ConfigError
from llmproxy.front.tls import ListenerTls

_log = Logger()


class Reload:
    """Reads the configuration again when it is called.

    Args:
        reread: returns the file as it is now, checked, or raises ``ConfigError``.
        running: the configuration that the process began with.
        tls: what the TLS listeners show, where there are some.
        wall: seconds since the epoch.
        reopen: opens the trace files anew.

    Attributes:
        succeeded: whether the last reading did; the start counts as one.
        succeeded_at: when the last one did that did, in seconds since the epoch.
    """

    def __init__(
        self,
        reread: Callable[[], Config],
        running: Config,
        tls: ListenerTls | None,
        wall: Callable[[], float],
        reopen: Callable[[], None],
    ) -> None:
        self._reread = reread
        self._running = running
        self._tls = tls
        self._wall = wall
        self._reopen = reopen
        self.succeeded = True
        self.succeeded_at = wall()

    def __call__(self) -> None:
        """Read the file; it never raises."""
        self._reopen()
        try:
            config = self._reread()
            keypair = config.proxy.keypair
            if self._tls is not None and keypair is not None:
                self._tls.replace(keypair)
        except (ConfigError, ValueError) as error:
            self.succeeded = False
            problems = list(getattr(error, "problems", (str(error),)))
            _log.error(
                "reload failed, nothing has changed: {why}",
                why="; ".join(problems),
                problems=problems,
            )
            return
        self.succeeded, self.succeeded_at = True, self._wall()
        waits = _without_keypair(config) != _without_keypair(self._running)
        _log.info(
            "reloaded: the certificate was read again{rest}",
            rest="; the rest of the change takes effect at the next start" if waits else "",
        )


def _without_keypair(config: Config) -> Config:
    proxy = msgspec.structs.replace(config.proxy, keypair=None)
    return msgspec.structs.replace(config, proxy=proxy)
