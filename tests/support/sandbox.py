"""A live proxy that intercepts hosts, and what a sandboxed program gets to know of it."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.daemon import Daemon, environment
from tests.support.live_proxy import LiveProxy, client_config
from tests.support.sockets import Wire, connect, request

KEY = "llmp_a-key-of-the-sandbox"
HOSTS = ("inference.local", "api.openai.com", "api.anthropic.com", "*.models.example")

_ROUTES = """
[providers.p]
url = "{url}"
dialect = "openai"
credential = "provider-key"
[providers.a]
url = "{url}"
dialect = "anthropic"
credential = "provider-key"
[[routes]]
path = "/v1/messages"
hosts = ["inference.local", "api.anthropic.com"]
providers = ["a"]
strip = false
name = "messages"{override}
[[routes]]
path = "/"
hosts = ["inference.local", "api.openai.com"]
providers = ["p"]
name = "native"{native}
[[routes]]
path = "/"
hosts = ["any.models.example"]
providers = ["p"]
models = ["allowed"]
name = "below"
"""


def new_authority(folder: Path, *hosts: str) -> dict[str, Any]:
    """Make an authority as an operator does; return what the command says of it."""
    command = [str(Path(sys.executable).parent / "llmproxy"), "ca", "new", str(folder), "--json"]
    for host in hosts:
        command += ["--host", host]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


class Sandbox(LiveProxy):
    """A daemon that intercepts :data:`HOSTS`, and the provider behind it.

    Args:
        url: another provider's, in place of the one that the test plays.
        override: what the messages' route overrides.
        native: further keys of the route of OpenAI's own host.

    Attributes:
        report: what ``llmproxy ca new`` says.
    """

    def __init__(
        self,
        folder: Path,
        *,
        more: str = "",
        intercept: str = "",
        proxy: str = "",
        url: str | None = None,
        override: str = "",
        native: str = "",
    ) -> None:
        super().__init__()
        self.report = new_authority(folder / "ca", *HOSTS)
        credentials = folder / "credentials"
        credentials.mkdir(mode=0o700)
        (credentials / "ca-key").write_bytes(Path(self.report["ca_key"]).read_bytes())
        (credentials / "provider-key").write_text("the-provider-s-own")
        config = f'[credentials]\ndirectory = "{credentials}"\n'
        url = url or self.provider.url
        config += _ROUTES.format(url=url, override=override, native=native)
        config += client_config("team", KEY)
        config += self.report["configuration"] + intercept + more
        self.daemon = Daemon(folder, config, proxy=proxy or "drain_timeout = '1s'")

    @property
    def trust(self) -> ssl.SSLContext:
        """What a program goes by that trusts the authority alone, strictly."""
        context = ssl.create_default_context(cafile=self.report["root"])
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    def environment(self, *, key: str | None = KEY, name: str = "team") -> dict[str, str]:
        """Return the whole environment of a sandboxed program.

        Args:
            key: that of the proxy's URL; None leaves the URL without.
            name: the client's.
        """
        at = "" if key is None else f"{name}:{key}@"
        url = f"http://{at}127.0.0.1:{self.daemon.port}"
        kept = {one: os.environ[one] for one in ("PATH", "LANG") if one in os.environ}
        return {
            **kept,
            **self.report["environment"],
            "HOME": str(self.daemon.folder),
            "HTTPS_PROXY": url,
            "https_proxy": url,
            "HTTP_PROXY": url,
            "http_proxy": url,
        }

    def tunnel(self, host: str, *fields: str, port: int = 443, key: str | None = KEY) -> Wire:
        """Ask for a way to a host, and return the connection when it is there."""
        wire = connect(self.daemon.port)
        wire.send(connect_head(host, *fields, port=port, key=key))
        head = wire.read_until(b"\r\n\r\n")
        assert head == b"HTTP/1.1 200 OK\r\n\r\n", head
        return wire

    def inside(self, host: str, *fields: str, key: str | None = KEY, name: str = "") -> Wire:
        """Return a connection with TLS to a host that is intercepted."""
        wire = self.tunnel(host, *fields, key=key)
        return Wire(self.trust.wrap_socket(wire.sock, server_hostname=name or host))


def connect_head(host: str, *fields: str, port: int = 443, key: str | None = KEY) -> bytes:
    """Return a CONNECT."""
    more = list(fields)
    if key is not None:
        more.append("Proxy-Authorization: Basic " + b64encode(f"team:{key}".encode()).decode())
    return request("CONNECT", f"{host}:{port}", *more, host=f"{host}:{port}")


@contextmanager
def open_sandbox(folder: Path, **more: Any) -> Iterator[Sandbox]:
    """Run one."""
    live = Sandbox(folder, **more)
    with live.provider, live.daemon:
        yield live
