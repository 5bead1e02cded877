"""The real daemon for tests: ``twistd -n llmproxy`` as a child, on ports of its own choice."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.support.sockets import WAIT

ROOT = Path(__file__).parents[2]

UNTUNED = os.environ.get("LLMPROXY_TEST_TUNED") == "off"
"""The daemon runs on Twisted's own loop, transports and TLS layer."""

HEADER = """\
[proxy]
{proxy}
[admin]
listen = "tcp:0:interface=127.0.0.1"
{admin}
[trace]
jsonl = "{trace}"
"""

# What systemd does for a service with a socket (sd_listen_fds(3)): its descriptor is number 3.
_HAND_OVER = """\
import os, sys
given = int(sys.argv[1])
if given != 3:
    os.dup2(given, 3)
    os.close(given)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def twistd(config: Path, *options: str) -> list[str]:
    """Return the command that starts a daemon."""
    program = str(Path(sys.executable).parent / "twistd")
    return [program, "-n", "--pidfile=", *options, "llmproxy", "--config", str(config)]


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a program of this tree."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


class Daemon:
    """A spawned ``twistd -n llmproxy``; leaving the context stops it with SIGTERM, then by force.

    Args:
        folder: where its configuration, trace and credentials lie.
        config: further tables of the configuration.
        proxy: further keys of ``[proxy]``; by default a client without a key is anonymous.
        admin: further keys of ``[admin]``.
        environ: further environment variables.
        instance: its name among several.
        command: returns the command that starts it with a configuration.
        inherit: a listening socket that it is handed as systemd does; the names of those are the
            environment's ``LISTEN_FDNAMES``.

    Attributes:
        port: the proxy's port, and ``tls_port`` that where it ends TLS; 0 where there is none.
        admin_port: the admin site's.
        log: the log lines so far, decoded.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        proxy: str = "anonymous = true",
        admin: str = "",
        environ: dict[str, str] | None = None,
        instance: str = "0",
        inherit: socket.socket | None = None,
        command: Callable[[Path], list[str]] = twistd,
    ) -> None:
        self.folder = folder
        self.trace_path = folder / "trace.jsonl"
        self.config_path = folder / "llmproxy.toml"
        self._plain = "listen = []" not in proxy
        self._tls = "listen_tls" in proxy
        if "listen = " not in proxy:
            proxy = f'listen = ["tcp:0:interface=127.0.0.1"]\n{proxy}'
        if UNTUNED and "tuned_loop" not in proxy:
            proxy = f"tuned_loop = false\n{proxy}"
        header = HEADER.format(proxy=proxy, admin=admin, trace=self.trace_path)
        self.config_path.write_text(header + config, encoding="utf-8")
        self._environ = environment(**(environ or {}))
        self.log: list[dict[str, Any]] = []
        self.port = self.tls_port = self.admin_port = 0
        self._changed = threading.Condition()
        self._instance = instance
        self._inherit = inherit
        self._command = command
        self._may_read = threading.Event()
        self._may_read.set()

    def __enter__(self) -> Self:
        command = self._command(self.config_path)
        handed = []
        if self._inherit is not None:
            handed = [self._inherit.fileno()]
            command = [sys.executable, "-c", _HAND_OVER, str(handed[0]), *command]
        self.process = subprocess.Popen(
            [*command, "--instance", self._instance],
            pass_fds=handed,
            cwd=self.folder,
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            if self._plain:
                self.port = self.wait_log("listens", site="proxy", tls=False)["port"]
            if self._tls:
                self.tls_port = self.wait_log("listens", site="proxy", tls=True)["port"]
            self.admin_port = self.wait_log("listens", site="admin")["port"]
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._may_read.set()
            self._reader.join(WAIT)
            assert self.process.stdout is not None
            assert self.process.stderr is not None
            self.process.stdout.close()
            self.errors = self.process.stderr.read()
            self.process.stderr.close()
        if kind is None:
            broken = [line for line in self.log if line["level"] in ("error", "critical")]
            assert not broken, broken
            assert not self.errors, self.errors

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._may_read.wait()
            with self._changed:
                self.log.append(json.loads(line))
                self._changed.notify_all()

    def wait_log(self, text: str, **fields: Any) -> dict[str, Any]:
        """Wait for a log line whose message holds ``text`` and which has these fields."""

        def found() -> dict[str, Any] | None:
            for line in self.log:
                if text in line["message"] and fields.items() <= line.items():
                    return line
            return None

        with self._changed:
            self._changed.wait_for(lambda: found() or not self._reader.is_alive(), WAIT)
            line = found()
        if line is None:
            errors = ""
            if self.process.poll() is not None and self.process.stderr is not None:
                errors = self.process.stderr.read()
            raise TimeoutError(f"no {text!r} with {fields} in the log: {self.log} {errors}")
        return line

    def wait_ended(self, count: int) -> list[dict[str, Any]]:
        """Wait until ``count`` requests have ended; return their access lines."""

        def ended() -> list[dict[str, Any]]:
            return [line for line in self.log if line["logger"] == "llmproxy.access"]

        with self._changed:
            enough = self._changed.wait_for(lambda: len(ended()) >= count, WAIT)
            lines = ended()
        if not enough:
            raise TimeoutError(f"{len(lines)} of {count} requests ended: {lines}")
        return lines

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Let nobody read its standard output, which is a pipe that is soon full."""
        assert self.process.stdout is not None
        self._may_read.clear()
        fcntl.fcntl(self.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        try:
            yield
        finally:
            self._may_read.set()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def admin(self, path: str) -> str:
        """Read a path of the admin site."""
        url = f"http://127.0.0.1:{self.admin_port}{path}"
        with urllib.request.urlopen(url, timeout=WAIT) as response:
            text: str = response.read().decode()
        return text

    def metrics(self) -> dict[str, float]:
        """Return the metrics by their name with labels, as the text format writes them."""
        lines = self.admin("/metrics").splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def take_errors(self) -> list[str]:
        """Take the errors out of the log, where they would fail the test; return what they say."""
        errors = [line for line in list(self.log) if line["level"] in ("error", "critical")]
        for line in errors:
            self.log.remove(line)
        return [line["message"] for line in errors]

    def usage(self, *arguments: str) -> Any:
        """Return what ``llmproxy usage`` reports of the running daemon."""
        command = [sys.executable, "-m", "llmproxy.cli.main", "usage", "--json"]
        command += ["--config", str(self.config_path), *arguments]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(ended.stdout)

    def descriptors(self) -> set[int]:
        """Return the descriptors that it has open."""
        return {int(name) for name in os.listdir(f"/proc/{self.process.pid}/fd")}

    @contextmanager
    def limited(self, kind: int, most: int) -> Iterator[None]:
        """Let it have no more of a resource, such as ``resource.RLIMIT_FSIZE``."""
        before = resource.prlimit(self.process.pid, kind)
        resource.prlimit(self.process.pid, kind, (most, before[1]))
        try:
            yield
        finally:
            resource.prlimit(self.process.pid, kind, before)

    def traces(self) -> list[dict[str, Any]]:
        """Return the records that are in the trace file by now; half a line is not there yet."""
        whole = self.trace_path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]


def provider_table(name: str, *keys: str, url: str = "URL", dialect: str = "openai") -> str:
    """Return one provider, with further lines."""
    lines = (f"[providers.{name}]", f'url = "{url}"', f'dialect = "{dialect}"', *keys)
    return "\n".join(lines) + "\n"


def route_table(path: str, provider: str, *keys: str) -> str:
    """Return one route, with further lines."""
    lines = ("[[routes]]", f'path = "{path}"', f'providers = ["{provider}"]', *keys)
    return "\n".join(lines) + "\n"


def provider_config(
    url: str, *, dialect: str = "openai", path: str = "/p", provider: str = "", route: str = ""
) -> str:
    """Return one provider and one route to it, with further keys of each."""
    return provider_table("p", provider, url=url, dialect=dialect) + route_table(path, "p", route)
