"""The configurations of docs/in-front with the real programs: what operators copy must stream."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    begin,
    open_live_proxy,
    post,
    read_stepwise,
    trace_of,
    until,
)
from tests.support.scripts import DONE, SSE, event, keep_replying
from tests.support.sockets import WAIT, Wire, chunked
from tests.support.tls import Authority

DOCS = Path(__file__).parents[2] / "docs" / "in-front"
_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
EVENTFUL = ONE_ROUTE.replace('path = "/p"', 'path = "/p"\nerror_event = true')
PLAIN = 'listen = ["tcp:0:interface=127.0.0.1"]\nanonymous = true'
"""What llmproxy listens on."""


class Front:
    """One program in front of a daemon, with its configuration of the docs.

    Its listener is a socket file, and its key is the test's own; all else is as an operator has it.

    Args:
        folder: where its files are.
        live: the daemon.
        authority: issues its certificate.
    """

    command: str
    options: tuple[str, ...]
    file: str
    listens = PLAIN

    def __init__(self, folder: Path, live: LiveProxy, authority: Authority) -> None:
        self.folder = folder
        self.live = live
        self.path = folder / "front.sock"
        self._context = authority.client()
        key, certificate = authority.key_and_certificate()
        both = folder / "both.pem"
        both.write_bytes(certificate.read_bytes() + key.read_bytes())
        text = (DOCS / self.file).read_text()
        for there, here in (
            ("127.0.0.1:8080", f"127.0.0.1:{live.daemon.port}"),
            ("/etc/ssl/llm.key", str(key)),
            ("/etc/ssl/llm.pem", str(both)),
            *self.changes(),
        ):
            assert there in text or there.startswith("/etc"), there
            text = text.replace(there, here)
        (folder / self.file).write_text(text)

    def changes(self) -> tuple[tuple[str, str], ...]:
        """Return what stands where it listens, and what stands there in the test."""
        raise NotImplementedError

    @classmethod
    def program(cls) -> str | None:
        """Return the program's path, or None where it is not installed."""
        return shutil.which(cls.command, path=_PATH)

    def __enter__(self) -> Front:
        """Start it."""
        environment = {**os.environ, "HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder)}
        command = [str(self.program()), *self.options, str(self.folder / self.file)]
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

        def listens() -> bool:
            if self._process.poll() is not None:
                raise AssertionError(self._process.communicate()[1].decode())
            with suppress(OSError), self.connect():
                return True
            return False

        until(listens, f"{self.command} listens")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self._process.terminate()
        self._process.communicate(timeout=WAIT)

    def connect(self) -> Wire:
        """Connect to it, with TLS."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT)
        try:
            sock.connect(str(self.path))
            return Wire(
                self._context.wrap_socket(
                    sock, server_hostname="localhost", suppress_ragged_eofs=True
                )
            )
        except OSError:
            sock.close()
            raise


class Nginx(Front):
    """nginx."""

    command, options, file = "nginx", ("-e", "stderr", "-c"), "nginx.conf"

    def changes(self) -> tuple[tuple[str, str], ...]:
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {self.folder}/{kind};\n" for kind in kinds)
        main = f"daemon off; master_process off; pid {self.folder}/pid;\nevents {{}}"
        return (
            ("listen 443 ssl", f"listen unix:{self.path} ssl"),
            ("events {}", main),
            ("http {", f"http {{\naccess_log off;\n{temporary}"),
        )


class HaProxy(Front):
    """HAProxy, which says by the PROXY protocol who calls."""

    command, options, file = "haproxy", ("-db", "-f"), "haproxy.cfg"
    listens = PLAIN.replace("tcp:", "haproxy:tcp:")

    def changes(self) -> tuple[tuple[str, str], ...]:
        return ((":443 ssl", f"unix@{self.path} ssl"),)


class Caddy(Front):
    """Caddy."""

    command, options, file = "caddy", ("run", "--adapter", "caddyfile", "--config"), "Caddyfile"

    def changes(self) -> tuple[tuple[str, str], ...]:
        site = f"https:// {{\n\tbind unix/{self.path}"
        return (("llm.example.com {", f"{{\n\tadmin off\n\tauto_https off\n}}\n{site}"),)


@pytest.fixture(scope="module", params=[Nginx, HaProxy, Caddy], ids=lambda kind: kind.command)
def front(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    """Each program, in front of a daemon of its own."""
    kind: type[Front] = request.param
    if kind.program() is None:
        pytest.skip(f"{kind.command} is not installed")
    folder = tmp_path_factory.mktemp(kind.command)
    with (
        open_live_proxy(folder, EVENTFUL, proxy=kind.listens) as live,
        kind(folder, live, Authority(folder)) as front,
    ):
        yield front


def test_each_event_passes_before_the_next_is_sent(front: Front) -> None:
    """Nothing is held back on the way."""
    chunks = [*map(event, range(3)), DONE]
    turn = front.live.stream(*chunks)
    with begin(front.connect(), "/p/x", b"{}", "Accept-Encoding: gzip") as client:
        read_stepwise(client, turn, *chunks, b"")


@pytest.mark.parametrize("end", ["fin", "reset"])
def test_a_broken_stream_is_seen(front: Front, end: str) -> None:
    """By its missing end, or at least by the event that ``error_event`` adds."""
    turn = front.live.break_off(end, SSE, chunked(event(0)))
    with begin(front.connect(), f"/p/{end}") as client:
        assert client.read_chunk() == event(0)
        turn.give()
        assert b'"upstream_broken"' in client.read_chunk()
        try:
            is_whole = client.read_chunk() == b""
        except (EOFError, ConnectionError):
            is_whole = False
    assert not is_whole or front.command == "caddy"  # 2.6.2; a newer one breaks it


def test_a_client_that_leaves_is_noticed(front: Front) -> None:
    """While the provider sends, through each of them, and its connection is dropped."""
    ended = front.live.flood()
    with begin(front.connect(), "/p/leaves") as client:
        client.read_chunk()
    assert ended.read() == "cut"


def test_connections_are_used_again_and_uploads_pass(front: Front) -> None:
    """A body of 3 MB is not refused on the way, and one client connection serves several calls."""
    front.live.script = keep_replying
    body = b'{"x":"' + b"y" * 3_000_000 + b'"}'
    with front.connect() as client:
        for _ in range(3):
            client.send(post("/p/upload", body))
            _, fields = client.read_head()
            assert client.read_body(fields) == b"ok"


def test_who_calls_is_recorded(front: Front) -> None:
    """The program itself, or whom it names: that of a socket file has no address."""
    front.live.script = keep_replying
    with front.connect() as client:
        client.send(post("/p/who", b"{}"))
        _, fields = client.read_head()
        client.read_body(fields)
    assert trace_of(front.live.daemon, path="/p/who")["peer"] == "127.0.0.1"
