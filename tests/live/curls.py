"""Real curls before one daemon, which listens plainly and with TLS and has two providers."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tests.live.breaks import EVENTS, ROUTES, Sent
from tests.support.daemon import Daemon, provider_table, route_table
from tests.support.keypairs import LISTEN_TLS
from tests.support.live_proxy import listener_credentials, trace_of, until
from tests.support.scripts import Turn
from tests.support.sockets import WAIT, Provider, Script, Wire
from tests.support.tls import Authority


class CurlClient(NamedTuple):
    """One curl: how it asks, and how the provider is reached that it asks for."""

    version: str
    scheme: str
    provider: str

    def __str__(self) -> str:
        return "-".join(self)


CLIENTS = [
    CurlClient(version, scheme, provider)
    for version in ("1.0", "1.1")
    for scheme in ("http", "https")
    for provider in ("plain", "tls")
]


class CurlResult(NamedTuple):
    """What curl reported: its exit code, the status, how much body came, and whether it is right.

    ``wrong`` is the body where it is not what was due, else nothing.
    """

    code: int
    status: int
    size: int
    wrong: bytes = b""


class CurlRun(NamedTuple):
    """One run of curl that has ended, and the record of its request."""

    code: int
    status: int
    body: bytes
    complaint: str
    record: dict[str, Any]

    def result(self, due: bytes) -> CurlResult:
        """Compare the body with what was due, which may be a megabyte."""
        wrong = b"" if self.body == due else self.body[:200] + b" ... " + self.body[-200:]
        return CurlResult(self.code, self.status, len(self.body), wrong)


class CurlProxy:
    """The daemon with its two listeners, and the two providers behind it.

    Attributes:
        scripts: by name, the first segment of a target, what both providers play.
    """

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.scripts: dict[str, Script] = {}
        self.authority = authority
        self.folder = folder
        self.providers = {
            "plain": Provider(self._play),
            "tls": Provider(self._play, tls=authority.server()),
        }
        config = listener_credentials(folder, authority)
        config += "".join(self._config(name) for name in self.providers)
        self.daemon = Daemon(folder, config, proxy=f"anonymous = true\n{LISTEN_TLS}")

    def _config(self, name: str) -> str:
        ca = f'ca = "{self.authority.ca_path}"\n' if name == "tls" else ""
        config = provider_table(name, ca, url=self.providers[name].url)
        routes = (route_table(f"/{name}/{at}", name, keys) for at, keys in ROUTES.items())
        return config + "".join(routes)

    def _play(self, wire: Wire) -> None:
        name = wire.read_request().target.split(b"/")[1]
        self.scripts[name.decode()](wire)

    def start(self, client: CurlClient, path: str, output: Path | str) -> subprocess.Popen[str]:
        """Start curl; it writes the body to ``output``, and the status to its standard output."""
        port = self.daemon.tls_port if client.scheme == "https" else self.daemon.port
        command = ["curl", "-q", "-sS", "-N", "--max-time", str(int(WAIT)), "--noproxy", "*"]
        command += [f"--http{client.version}", "--cacert", str(self.authority.ca_path)]
        command += ["--resolve", f"localhost:{port}:127.0.0.1", "-d", '{"stream":true}']
        command += ["-H", "Content-Type: application/json", "-w", "%{http_code} %{exitcode}"]
        command += ["-o", str(output), f"{client.scheme}://localhost:{port}{path}"]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )

    def run(self, client: CurlClient, name: str, route: str, hold: Turn | None = None) -> CurlRun:
        """Run curl to its end; with ``hold`` it stands still until the request has ended.

        Args:
            hold: given once curl stands still, whereupon the script may go on.
        """
        path = f"/{client.provider}/{route}/{name}"
        output = self.folder / name
        with self.start(client, path, output) as curl:
            try:
                if hold is not None:
                    self._hold(curl, path, output, hold)
                printed, complaint = curl.communicate(timeout=2 * WAIT)
            finally:
                curl.kill()
        status, code = map(int, printed.split())
        assert code == curl.returncode
        assert status, complaint  # there is a record of what came to a response
        body = output.read_bytes() if output.exists() else b""
        return CurlRun(code, status, body, complaint, trace_of(self.daemon, path=path))

    def _hold(self, curl: subprocess.Popen[str], path: str, output: Path, hold: Turn) -> None:
        until(lambda: output.exists() and output.read_bytes() == EVENTS, "curl has the beginning")
        curl.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(curl.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        hold.give()
        trace_of(self.daemon, path=path)
        assert output.read_bytes() == EVENTS
        curl.send_signal(signal.SIGCONT)

    def run_all(self, name: str, sent: Sent, *, held: bool = False) -> dict[CurlClient, CurlRun]:
        """Let every client ask for ``sent``, all at once.

        Args:
            held: each has read ``EVENTS`` and then nothing until its request has ended.
        """
        name = name.replace(", ", "-").replace(" ", "-")

        def run(client: CurlClient) -> CurlRun:
            turn = Turn()
            first = sent.raw[: sent.raw.find(EVENTS) + len(EVENTS)]

            def script(wire: Wire) -> None:
                wire.send(first)
                turn.take()
                sent.play(wire, after=len(first))

            own = f"{name}-{client}"
            self.scripts[own] = script if held else sent.play
            return self.run(client, own, sent.route, hold=turn if held else None)

        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            return dict(zip(CLIENTS, pool.map(run, CLIENTS), strict=True))
