"""Refusals that come again and again: the first has a line of the log, the others are a count.

Some programs ask for the same host without end, whatever they are told.  Each refusal has its
record and is in the metrics; the log says it once a minute for each host, client and reason.  How
a request asks for a host, by CONNECT or by a whole URL, makes no difference here.  A CONNECT that
fails is like one that is refused: its client gets an error instead of a way.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.logger import Logger

_log = Logger()

_REPEATED_S = 60.0
"""Like refusals of a host and client within this time are one line of the log, and a count."""

_MOST = 1024
"""Hosts, clients and reasons that are told apart meanwhile."""


class Repeats:
    """Keeps refusals that come again and again from filling the log.

    Args:
        reactor: keeps time.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._others = 0  # refusals that were not told apart any more
        self._timer: Any = None

    def is_first(self, host: str, client: str, reason: str) -> bool:
        """Return whether this refusal has a line of its own; count it for later where not.

        Args:
            host: host and port; empty where the request names none, or none that may be shown.
            client: its name, or its address where nobody said who calls.
            reason: the word of the error.  Who mends one mistake must see the next one.
        """
        key = (host, client, reason)
        if key not in self._counts and len(self._counts) >= _MOST:
            self._others += 1
            return False
        self._counts[key] += 1
        if self._timer is None:
            self._timer = self._reactor.callLater(_REPEATED_S, self._tell)
        return self._counts[key] == 1

    def close(self) -> None:
        """Log what was counted so far: the process ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._tell()

    def _tell(self) -> None:
        self._timer = None
        counts, self._counts = self._counts, Counter()
        others, self._others = self._others, 0
        if others:
            _log.warn("{count} more requests for many hosts were refused or failed", count=others)
        for (host, client, reason), count in counts.items():
            if count > 1:
                _log.warn(
                    "{count} more requests for {host} were refused or failed within a minute "
                    "({error})",
                    count=count - 1,
                    host=host or "a target that is not shown",
                    client=client,
                    error=reason,
                )
