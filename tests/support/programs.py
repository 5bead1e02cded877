"""Programs of others that a test runs."""

from __future__ import annotations

import contextlib
import socket
import subprocess
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
def running_program(command: list[str], port: int) -> Iterator[None]:
    """Run a program; within, it listens on its port."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:

        def listens() -> bool:
            assert process.poll() is None, f"{command} ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        try:
            until(listens, f"{command} listens")
            yield
        finally:
            process.terminate()
            process.wait(WAIT)
