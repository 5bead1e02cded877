"""Programs of others that a test runs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
from collections.abc import Iterator

from tests.support.live_proxy import until
from tests.support.sockets import WAIT


def free_port() -> int:
    """Return a port that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def running_program(
    command: list[str], port: int, environment: dict[str, str] | None = None
) -> Iterator[None]:
    """Run a program; within, it listens on its port.

    Args:
        command: its words.
        port: of loopback.
        environment: the whole of it; by default that of the tests.
    """
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        ) as process,
    ):

        def listens() -> bool:
            if process.poll() is not None:
                said.seek(0)
                raise AssertionError(f"{command} ended: {said.read().decode(errors='replace')}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), WAIT):
                return True
            return False

        try:
            until(listens, f"{command} listens")
            yield
        finally:
            process.terminate()
            process.wait(WAIT)
