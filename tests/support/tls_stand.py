"""A daemon that ends TLS, a provider behind it, and what an operator does to its certificate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.daemon import Daemon, provider_config
from tests.support.keypairs import LISTEN_TLS, Issued, Vault, shown_to
from tests.support.reloads import (
    expect_failures,
    fail_to_reload,
    failures,
    hang_up,
    reload,
)
from tests.support.sockets import Provider, Script, Wire, chunked, connect, request
from tests.support.stage import DONE, LAST, OK, SSE, Turn, client_config, event, read_got

KEY = "a-client-of-the-proxys"
"""What a client may show; without it, it is anonymous."""

PROXY = "anonymous = true\n" + LISTEN_TLS
EXPIRES = 'llmproxy_certificate_not_after_timestamp_seconds{certificate="listen_tls"}'


EVENTS = [event(0), event(1), event(2), DONE]
"""What the provider streams."""


def response(wire: Wire) -> None:
    """A provider's script: answer one request."""
    wire.read_request()
    wire.send(OK)


class Stand:
    """A daemon that ends TLS, what it shows, and a provider behind it.

    Attributes:
        script: what the provider plays on each connection from now on; ``ok`` by default.
        shown: what the daemon was started with.
    """

    def __init__(self, folder: Path, *, more: str = "", proxy: str = PROXY) -> None:
        self.vault = Vault(folder)
        self.shown = self.vault.put()
        self.script: Script = response
        self.provider = Provider(lambda wire: self.script(wire))
        config = self.vault.config + provider_config(self.provider.url)
        config += client_config("team", KEY) + more
        self.daemon = Daemon(folder, config, proxy=proxy)

    def stream(self) -> Turn:
        """Let the provider stream from now on, three events and the end; each takes a turn."""
        turn = Turn()

        def script(wire: Wire) -> None:
            wire.read_request()
            wire.send(SSE)
            for piece in EVENTS:
                turn.take()
                wire.send(chunked(piece))
            wire.send(LAST)

        self.script = script
        return turn

    def connect(self) -> Wire:
        """Connect a client of the daemon's, by TLS."""
        return connect(self.daemon.tls_port, tls=self.vault.client())

    def seen(self) -> bytes | None:
        """Return the certificate that is shown now, as DER; a request is served on top of it."""
        with self.connect() as wire:
            wire.send(request("GET", "/p/x"))
            assert read_got(wire).body == b"ok"
            return shown_to(wire)

    def hang_up(self) -> None:
        """Send SIGHUP, as an operator does."""
        hang_up(self.daemon)

    def reload(self) -> None:
        """Send SIGHUP, and wait until it was obeyed."""
        reload(self.daemon)

    def rotate(self) -> Issued:
        """Put another certificate in the old one's place, and tell the daemon."""
        issued = self.vault.put()
        self.reload()
        return issued

    def fail_to_reload(self) -> dict[str, Any]:
        """Send SIGHUP where the files are wrong; return the line that tells it, as expected."""
        return fail_to_reload(self.daemon)

    def failures(self) -> list[dict[str, Any]]:
        """Return the lines that tell of a reload that failed."""
        return failures(self.daemon)

    def expect_failures(self, count: int) -> None:
        """Take them out of the log, where every other line at ``error`` fails the test."""
        expect_failures(self.daemon, count)


@contextmanager
def standing(folder: Path, **more: str) -> Iterator[Stand]:
    """Run a stand."""
    stand = Stand(folder, **more)
    with stand.provider, stand.daemon:
        yield stand
