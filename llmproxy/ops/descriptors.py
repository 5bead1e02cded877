"""How many file descriptors the process may open, against how many it may need.

A limit that is too low shows under load, as connections that fail one by one; here it is raised, or
told, at the start.
"""

from __future__ import annotations

import resource

from twisted.logger import Logger

RESERVE = 512
"""Descriptors for all else: listeners, the admin site, files, clients that are turned away."""

_log = Logger()


def needed(max_connections: int) -> int:
    """Return how many descriptors so many clients may need: each its own and a provider's."""
    return 2 * max_connections + RESERVE


def raise_limit(max_connections: int) -> None:
    """Raise the soft limit to what ``max_connections`` may need, or as far as the hard one allows.

    Where that is not enough the log says so.

    Raises:
        OSError: the limit cannot be raised although the hard one would allow it.
    """
    want = needed(max_connections)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = want if hard == resource.RLIM_INFINITY else min(want, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        except (OSError, ValueError) as error:
            raise OSError(
                f"the limit of file descriptors cannot be raised from {soft} to {allowed}: {error}"
            ) from error
    if allowed < want:
        _log.warn(
            "{allowed} file descriptors are allowed, and max_connections = {connections} may need "
            "{needed}: raise LimitNOFILE, or lower max_connections",
            allowed=allowed,
            connections=max_connections,
            needed=want,
        )
