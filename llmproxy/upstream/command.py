"""Runs the command that prints a provider's credential, for as long as it may take.

A run blocks its thread, so it has one of its own.  The command is run without a shell, in a process
group and a session of its own; nothing of its standard error is kept, because it may hold secrets
(ADR-0029).  Nothing here knows providers or when a command is run.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, cast

from llmproxy.config import Secret
from llmproxy.config.credentials import LONGEST_CREDENTIAL, credential_value
from llmproxy.config.values import Wrong

DEADLINE_S = 30.0
"""Seconds that a command may take."""

_LOOK_S = 0.05
"""Seconds between two looks at whether the command has ended, while it prints nothing."""

_DIES_IN_S = 1.0
"""Seconds in which a command that was killed is gone, on a busy machine too."""

_OURS = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS")
"""What systemd tells this process, and no other."""


class CommandFailed(Exception):
    """A command printed no credential; its text says why, and holds nothing that was printed."""


class Run:
    """One run of a command.

    Args:
        words: the program's absolute path, and its arguments.
        clock: monotonic seconds.
        environ: what the command finds in its environment.
    """

    def __init__(
        self, words: tuple[str, ...], clock: Callable[[], float], environ: Mapping[str, str]
    ) -> None:
        self._words = words
        self._clock = clock
        self._environ = {name: value for name, value in environ.items() if name not in _OURS}
        self._lock = threading.Lock()  # a process that was waited for must not be killed
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def __call__(self, deadline_s: float = DEADLINE_S) -> Secret:
        """Run it, and return what it printed.

        Raises:
            CommandFailed: it could not be run, did not end in time, ended with another status than
                0, or printed no credential.
        """
        with self._lock:
            if self._killed:
                raise CommandFailed("it was not run any more")
            try:
                process = self._process = subprocess.Popen(  # noqa: S603 - the operator wrote it
                    self._words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=self._environ,
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandFailed(f"it cannot be run ({error.strerror})") from None
        with cast("IO[bytes]", process.stdout) as output:
            try:
                printed = self._printed(process, output.fileno(), self._clock() + deadline_s)
            except CommandFailed:
                self.kill()
                with suppress(subprocess.TimeoutExpired):  # another user's cannot be killed
                    process.wait(_DIES_IN_S)
                raise
        if process.returncode < 0:
            raise CommandFailed(f"it was ended by signal {-process.returncode}")
        if process.returncode:
            raise CommandFailed(f"it ended with exit status {process.returncode}")
        try:
            return Secret(credential_value(printed, "an output"))
        except Wrong as wrong:
            raise CommandFailed(f"expected {wrong.expected}") from None

    def kill(self) -> None:
        """Kill the command with its process group, on any thread."""
        with self._lock:
            self._killed = True
            process = self._process
            if process is not None and process.returncode is None:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _printed(self, process: subprocess.Popen[bytes], output: int, until: float) -> bytes:
        """Return all that it prints until it ends; a process that it leaves behind may go on."""
        poll = select.poll()  # select() takes no descriptor above 1023
        poll.register(output, select.POLLIN)
        printed = b""
        while True:
            with self._lock:
                ended = process.poll() is not None
            if (left := until - self._clock()) <= 0 and not ended:
                raise CommandFailed("it took too long, and was killed")
            if poll.poll(0 if ended else min(left, _LOOK_S) * 1000):
                piece = os.read(output, LONGEST_CREDENTIAL + 1)
                printed += piece
                if len(printed) > LONGEST_CREDENTIAL:
                    raise CommandFailed("it printed more than 64KiB, and was killed")
                if not piece:
                    poll.unregister(output)  # from now on it only waits
            elif ended:
                return printed
