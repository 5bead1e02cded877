"""A PostgreSQL server for tests, on a Unix socket and a port, in a folder of its own."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import free_port
from tests.support.records import eventually
from tests.support.sockets import WAIT

PASSWORD = "needle-in-the-haystack"


def program(name: str) -> str | None:
    """Return where a program of PostgreSQL is; Debian keeps most of them out of the path."""
    folders = [os.environ.get("PATH", ""), *sorted(glob.glob("/usr/lib/postgresql/*/bin"))[::-1]]
    return shutil.which(name, path=os.pathsep.join(folders))


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, number)


class PostgresServer:
    """A server that is started, stopped and halted; nobody else uses it.

    Its user ``postgres`` needs no password on the Unix socket; on the port every user needs one.

    Args:
        folder: what is the server's own.

    Attributes:
        port: of loopback, and of the socket's name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        password = folder / "password"
        password.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (folder, password):
                shutil.chown(path, "nobody")
        self._run(
            *("initdb", "--no-sync", "--username=postgres", "--encoding=UTF8", "--locale=C"),
            *("--auth-local=trust", "--auth-host=scram-sha-256"),
            *(f"--pwfile={password}", "--pgdata", str(self._data)),
        )

    def url(self, database: str = "postgres", **more: str) -> str:
        """Return the URL of a database on the Unix socket."""
        pairs = {"host": str(self.folder), "port": str(self.port), **more}
        query = "&".join(f"{name}={value}" for name, value in pairs.items())
        return f"postgresql://postgres@/{database}?{query}"

    def tcp_url(self, database: str) -> str:
        """Return the URL of a database on the port, where a password is wanted."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        command = self._command("postgres", "-D", str(self._data), "-k", str(self.folder))
        command += ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
        )
        eventually(self._is_ready)

    def stop(self) -> None:
        """Break every connection off, and end."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(WAIT)
            self._process = None

    @contextlib.contextmanager
    def halted(self) -> Iterator[None]:
        """Let none of its processes run."""
        assert self._process is not None
        pids = [self._process.pid]
        self._process.send_signal(signal.SIGSTOP)  # first: it starts no other process any more
        try:
            pids += self._children()
            _signal(pids, signal.SIGSTOP)
            yield
        finally:
            _signal(pids, signal.SIGCONT)

    def database(self) -> str:
        """Make an empty database; return its name."""
        name = f"db_{secrets.token_hex(6)}"
        self.query("postgres", f"CREATE DATABASE {name}")
        return name

    def query(self, database: str, words: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with self.connected(database) as connection:
            cursor = connection.execute(words)
            return list(cursor.fetchall()) if cursor.description else []

    @contextlib.contextmanager
    def connected(self, database: str) -> Iterator[Any]:
        """Connect, as another program does."""
        import psycopg

        with contextlib.closing(psycopg.connect(self.url(database), autocommit=True)) as one:
            yield one

    def ids(self, database: str) -> list[int]:
        """Return the ids of its traces, in the order in which they were written."""
        import psycopg

        with contextlib.suppress(psycopg.errors.UndefinedTable):
            rows = self.query(database, "SELECT id FROM traces ORDER BY number")
            return [int(one) for (one,) in rows]
        return []

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        import psycopg

        with contextlib.suppress(psycopg.OperationalError):
            return self.query("postgres", "SELECT 1") == [(1,)]
        return False

    def _children(self) -> list[int]:
        assert self._process is not None
        found = []
        for path in glob.glob("/proc/[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = int(Path(path).read_text().rpartition(")")[2].split()[1])
                if parent == self._process.pid:
                    found.append(int(path.split("/")[2]))
        return found

    def _command(self, name: str, *arguments: str) -> list[str]:
        """Return a command that another user runs, as PostgreSQL does not run as root."""
        path = program(name)
        assert path is not None
        if os.geteuid() != 0:
            return [path, *arguments]
        return ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", path, *arguments]

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            self._command(name, *arguments), cwd=self.folder, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Run a server; skip where the server, or what speaks to it, is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (llmproxy[postgres])")
    if program("initdb") is None or program("postgres") is None:
        pytest.skip("no PostgreSQL server is installed (Debian: postgresql)")
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and setpriv is not installed")
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = PostgresServer(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
