"""Programs of others that a test runs."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from tests.support.live_proxy import until
from tests.support.sockets import WAIT

_LOWEST_PORT, _HIGHEST_PORT = 10_240, 32_768
_returned: set[int] = set()


def free_port() -> int:
    """Return a port that nobody has now."""
    (port,) = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Return so many ports that nobody has now, and that were not returned before.

    They are none of those that kernels choose for outgoing connections: until the program listens,
    some time goes by, and other tests connect.
    """
    found: list[int] = []
    while len(found) < count:
        port = _LOWEST_PORT + secrets.randbelow(_HIGHEST_PORT - _LOWEST_PORT)
        with socket.socket() as sock, contextlib.suppress(OSError):
            if port not in _returned:
                sock.bind(("127.0.0.1", port))
                _returned.add(port)
                found.append(port)
    return found


@contextlib.contextmanager
def running_program(
    command: list[str], port: int | Sequence[int], environment: dict[str, str] | None = None
) -> Iterator[None]:
    """Run a program; within, it listens on its port, or its ports.

    Args:
        command: its words.
        port: of loopback, or several.
        environment: the whole of it; by default that of the tests.
    """
    ports = [port] if isinstance(port, int) else port
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
            with contextlib.suppress(OSError):
                for one in ports:
                    socket.create_connection(("127.0.0.1", one), WAIT).close()
                return True
            return False

        try:
            until(listens, f"{command} listens")
            yield
        finally:
            process.terminate()
            process.wait(WAIT)
