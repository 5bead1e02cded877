"""What is reported to the service manager: ready, reloading, stopping, alive, and the status.

The protocol is that of sd_notify(3): one datagram of ``KEY=value`` lines to the socket that
``$NOTIFY_SOCKET`` names.  Without that variable nothing is sent, and nothing costs anything.  The
watchdog is fed from the reactor, so that systemd restarts a process whose reactor is stuck.  The
state of the process is not known here; a function that makes the status line is passed in.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from twisted.internet.task import LoopingCall
from twisted.logger import Logger

_STATUS_INTERVAL = 5.0
"""Seconds between two looks at the status line; one that is the same is not sent again."""

_STOPPING_INTERVAL = 1.0
"""The same while the process shuts down."""

_MORE_TIME = 15_000_000
"""Microseconds within which the next message comes while the process shuts down."""

_PATIENCE = 2.0
"""Seconds that a message may wait for the manager which it must not miss."""

_LONGEST = 1000
"""Most characters of a status line: systemd drops a message of more than 4 KiB."""

_AGAIN = 0.05
"""Seconds until it is tried again."""

Reloading = Callable[[], AbstractContextManager[None]]
"""What a reload opens around its work: the manager hears of its beginning and its end."""

_log = Logger()


class Notify:
    """Tells the service manager about one process.

    Args:
        environ: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` may stand.
        reactor: keeps the appointments.
        monotonic: seconds of ``CLOCK_MONOTONIC``, which is the manager's clock, too.
        status: makes the line that ``systemctl status`` shows.
        pid: this process's number.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        reactor: Any,
        monotonic: Callable[[], float],
        status: Callable[[], str],
        *,
        pid: int,
    ) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._watchdog = _watchdog(environ, pid)
        self._monotonic = monotonic
        self._status = status
        self._told = ""
        self._more = ""
        self._failing = self._stops = False
        self._socket: socket.socket | None = None
        self._reactor = reactor
        self._kept: deque[tuple[str, float]] = deque()
        self._again: Any = None
        self._looks = LoopingCall(self._tell_status)
        self._pings = LoopingCall(self._send, "WATCHDOG=1")
        self._looks.clock = self._pings.clock = reactor

    def ready(self) -> None:
        """Everything listens: report it, and begin to show the status and to feed the watchdog."""
        if not self._address:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_UNIX, kind)
        self._told = self._status()
        self._send(f"READY=1\nSTATUS={self._told}", keep=True)
        self._looks.start(_STATUS_INTERVAL, now=False)
        if self._watchdog is not None:
            self._pings.start(self._watchdog / 2)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Report that a reload begins, and at its end that the process is ready again.

        If the process shuts down meanwhile, the end is not reported.
        """
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(self._monotonic() * 1e6)}", keep=True)
        try:
            yield
        finally:
            if not self._stops:
                self._told = self._status()
                self._send(f"READY=1\nSTATUS={self._told}", keep=True)

    def stopping(self) -> None:
        """The process shuts down, which may take long: report its state, and ask for more time."""
        self._stops = True
        self._send("STOPPING=1", keep=True)
        if self._looks.running:
            self._looks.stop()
            self._more = f"EXTEND_TIMEOUT_USEC={_MORE_TIME}\n"
            self._looks.start(_STOPPING_INTERVAL)

    def close(self) -> None:
        """Send the last status, and nothing after it."""
        for call in (self._looks, self._pings):
            if call.running:
                call.stop()
        if self._socket is not None:
            if self._again is not None:
                self._again.cancel()
                self._send_kept()
            self._send(f"STATUS={self._status()}")
            if self._again is not None:
                self._again.cancel()
            self._socket.close()
            self._socket = None

    def _tell_status(self) -> None:
        if self._kept:
            return  # the next look is soon enough
        status = self._status()
        if status != self._told or self._more:
            self._told = status
            self._send(f"{self._more}STATUS={status}")

    def _send(self, text: str, *, keep: bool = False) -> None:
        """Send; a manager that takes nothing is reported in the log, once, and delays nothing.

        Args:
            text: the message.
            keep: the manager must not miss it, and gets it later if its queue is full now.  Until
                then it gets nothing else.
        """
        if self._socket is None:
            return
        if keep or not self._kept:
            self._kept.append((text, self._reactor.seconds() + _PATIENCE if keep else 0.0))
        if self._again is None:
            self._send_kept()

    def _send_kept(self) -> None:
        """Send what waits, in its order, as far as the manager takes it."""
        self._again = None
        while self._kept and self._socket is not None:
            text, until = self._kept[0]
            try:
                self._socket.sendto(text.encode("utf-8"), self._address)
            except OSError as error:
                if isinstance(error, BlockingIOError) and self._reactor.seconds() < until:
                    self._again = self._reactor.callLater(_AGAIN, self._send_kept)
                    return
                if not self._failing:
                    _log.warn("the service manager cannot be reached: {why}", why=str(error))
                self._failing = True
            else:
                self._failing = False
            self._kept.popleft()


def send_status(environ: Mapping[str, str], status: str) -> None:
    """Send a status line from a process that has no reactor, or ends before it runs.

    A manager that cannot be reached misses it.

    Args:
        environ: where ``NOTIFY_SOCKET`` may stand.
        status: one line or several, which become one; what is too long is cut.
    """
    address = _address(environ.get("NOTIFY_SOCKET", ""))
    if not address:
        return
    line = " ".join(status.split())[:_LONGEST]
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as manager, suppress(OSError):
        manager.sendto(f"STATUS={line}".encode(errors="replace"), address)


def _address(text: str) -> str:
    """Return a socket's address, a file's path or an abstract name behind an ``@``, or nothing."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else ""


def _watchdog(environ: Mapping[str, str], pid: int) -> float | None:
    """Return within how many seconds the manager wants to hear from this process, if it does."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid) or not microseconds.isdecimal():
        return None
    return int(microseconds) / 1e6 or None
