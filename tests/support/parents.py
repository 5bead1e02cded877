"""Parent proxies: one that the test plays in Python, and Debian's squid and tinyproxy."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.programs import free_port, running_program
from tests.support.sockets import WAIT, Provider, Wire

_OPENS = re.compile(rb"HTTP/1\.[01] 2")
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class PlayedParent(Provider):
    """A parent proxy that answers a CONNECT as it is told, and relays to loopback behind a 200.

    As squid and tinyproxy do, it ends both sides with a FIN, whichever ended, and however.

    Args:
        answer: to each CONNECT, in pieces that are sent apart.

    Attributes:
        heads: each CONNECT: its first line, and its fields.
    """

    def __init__(self, *answer: bytes) -> None:
        super().__init__(self._relay)
        self.answer = answer or (ESTABLISHED,)
        self.heads: queue.Queue[tuple[bytes, dict[bytes, bytes]]] = queue.Queue()

    def _relay(self, wire: Wire) -> None:
        line, fields = wire.read_head()
        assert len(dict(fields)) == len(fields)
        self.heads.put((line, dict(fields)))
        for piece in self.answer:
            wire.send(piece)
        if not _OPENS.search(b"".join(self.answer)):
            wire.wait_closed()
        else:
            self.pump(line, wire)

    def pump(self, line: bytes, wire: Wire) -> None:
        """Relay to where the line of a CONNECT says, but on loopback, until one side ends."""
        port = int(line.split(b" ")[1].rpartition(b":")[2])
        with socket.create_connection(("127.0.0.1", port), WAIT) as far:
            back = threading.Thread(target=_pump, args=(far, wire.sock), daemon=True)
            back.start()
            _pump(wire.sock, far)
            back.join(WAIT)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until the source ends; then end both, with a FIN."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for one in (source, sink):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


# --- real ones ------------------------------------------------------------------------------------

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
SQUID = shutil.which("squid", path=_PATH)
TINYPROXY = shutil.which("tinyproxy", path=_PATH)
_SQUID_PASSWORDS = "/usr/lib/squid/basic_ncsa_auth"
_SQUID_SETTINGS = Path("/etc/squid/squid.conf")

FAR_NAME = "provider.test"
"""A name of loopback that squid knows, and nobody else."""


@contextlib.contextmanager
def squid(*, user: str = "", any_port: bool = False) -> Iterator[int]:
    """Run squid as Debian configures it, on a port of loopback, which is yielded.

    Args:
        user: ``NAME:PASSWORD``, without which it refuses.
        any_port: CONNECT may go to any port; else to 443 alone.
    """
    assert SQUID is not None
    port = free_port()
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        folder.chmod(0o755)  # squid leaves root behind
        (folder / "hosts").write_text(f"127.0.0.1 {FAR_NAME} localhost\n")
        lines = [
            f"http_port 127.0.0.1:{port}",
            f"hosts_file {folder}/hosts",
            "pid_filename none",
            "access_log none",
            "cache_log /dev/null",
            "shutdown_lifetime 0 seconds",
        ]
        if any_port:
            lines.append("acl SSL_ports port 1025-65535")
        if user:
            name, _, password = user.partition(":")
            digest = hashlib.md5(password.encode(), usedforsecurity=False).hexdigest()
            (folder / "passwords").write_text(f"{name}:{digest}\n")
            lines += [
                f"auth_param basic program {_SQUID_PASSWORDS} {folder}/passwords",
                "acl known proxy_auth REQUIRED",
                "http_access deny !known",
            ]
        own = ("http_port", "include", "coredump_dir")
        lines += [
            line
            for line in _SQUID_SETTINGS.read_text().splitlines()
            if line and not line.startswith(("#", *own))
        ]
        (folder / "squid.conf").write_text("\n".join(lines) + "\n")
        with running_program([SQUID, "-N", "-f", f"{folder}/squid.conf"], port):
            yield port


@contextlib.contextmanager
def tinyproxy(*, user: str = "", more: str = "") -> Iterator[int]:
    """Run tinyproxy much as Debian configures it, on a port of loopback, which is yielded.

    Args:
        user: ``NAME:PASSWORD``, without which it refuses.
        more: another line of its configuration.
    """
    assert TINYPROXY is not None
    port = free_port()
    lines = [f"Port {port}", "Listen 127.0.0.1", "Timeout 600", "Allow 127.0.0.1", more]
    lines += ["LogLevel Critical", "MaxClients 100"]
    if user:
        lines.append("BasicAuth {} {}".format(*user.split(":")))
    with tempfile.TemporaryDirectory() as path:
        settings = Path(path) / "tinyproxy.conf"
        settings.write_text("\n".join(lines) + "\n")
        with running_program([TINYPROXY, "-d", "-c", str(settings)], port):
            yield port
