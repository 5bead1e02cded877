"""The workload START: how long a proxy takes until it serves, and what it takes of memory then.

Each start begins with the exec of the proxy's program.  It ends when the port takes a connection,
and a second time when the proxy says ``READY=1`` as systemd wants it, if the proxy does.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.build import CannotBuildError
from bench.peers import Listen, Start
from bench.processes import Program, free_port
from bench.works import Figures

TIMES = 5

_PAUSE = 0.002
"""Seconds between two looks at the port."""

_REST = 1.0
"""Seconds after which a proxy that has started does nothing any more."""


def starts(begin: Callable[[Listen], Start], core: int, log: Path) -> Figures:
    """Start a proxy some times, one after another; return the medians.

    Args:
        begin: gives its command, from where it is to listen.
        core: the processor that it has.
        log: where its output goes.

    Raises:
        CannotBuildError: it does not start.
    """
    seen = [_start(begin, core, log) for _ in range(TIMES)]
    names = seen[0].keys()
    return {name: median(each[name] for each in seen if name in each) for name in names}


def _start(begin: Callable[[Listen], Start], core: int, log: Path) -> Figures:
    listen = Listen(free_port())
    start = begin(listen)
    with (
        TemporaryDirectory(prefix="bench-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        told = f"{folder}/notify"
        notified.bind(told)
        notified.settimeout(_REST)
        began = time.monotonic()
        environ = {**start.environ, "NOTIFY_SOCKET": told}
        with Program(start.command, core, log, environ) as proxy:
            if not proxy.wait_for(listen.port, pause=_PAUSE):
                raise CannotBuildError(f"it does not start: {proxy.last_word()}")
            found = Figures(ready_ms=(time.monotonic() - began) * 1000)
            with suppress(TimeoutError):
                while b"READY=1" not in notified.recv(4096):
                    pass
                found["notified_ms"] = (time.monotonic() - began) * 1000
            time.sleep(_REST)
            found["idle_mib"] = proxy.pss_kib() / 1024
    return found
