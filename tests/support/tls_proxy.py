"""A live proxy whose listener ends TLS, and what an operator does to its certificate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import scripts
from tests.support.daemon import Daemon, provider_config
from tests.support.keypairs import LISTEN_TLS, Issued, Vault, shown_to
from tests.support.live_proxy import LiveProxy, client_config, read_response
from tests.support.reloads import reload
from tests.support.scripts import DONE, OK, event
from tests.support.sockets import Wire, connect, request

KEY = "a-client-of-the-proxys"
"""What a client may show; without it, it is anonymous."""

PROXY = "anonymous = true\n" + LISTEN_TLS
EXPIRES = 'llmproxy_certificate_not_after_timestamp_seconds{certificate="listen_tls"}'

EVENTS = [event(0), event(1), event(2), DONE]
"""What the provider streams."""

short_reply = scripts.reply(OK)


class TlsProxy(LiveProxy):
    """A daemon that ends TLS, the certificate that it shows, and the provider behind it.

    Attributes:
        shown: the certificate that the daemon was started with.
    """

    def __init__(self, folder: Path, *, more: str = "", proxy: str = PROXY) -> None:
        super().__init__()
        self.vault = Vault(folder)
        self.shown = self.vault.put()
        self.script = short_reply
        config = self.vault.config + provider_config(self.provider.url)
        config += client_config("team", KEY) + more
        self.daemon = Daemon(folder, config, proxy=proxy)

    def connect(self, *, receive_buffer: int = 0) -> Wire:
        """Connect a client of the daemon's, by TLS."""
        tls = self.vault.client()
        return connect(self.daemon.tls_port, receive_buffer=receive_buffer, tls=tls)

    def seen(self) -> bytes | None:
        """Return the certificate that is shown now, as DER; a request is served on top of it."""
        with self.connect() as wire:
            wire.send(request("GET", "/p/x"))
            assert read_response(wire).body == b"ok"
            return shown_to(wire)

    def rotate(self) -> Issued:
        """Put another certificate in the old one's place, and tell the daemon."""
        issued = self.vault.put()
        reload(self.daemon)
        return issued


@contextmanager
def open_tls_proxy(folder: Path, **more: str) -> Iterator[TlsProxy]:
    """Run a TLS proxy."""
    live = TlsProxy(folder, **more)
    with live.provider, live.daemon:
        yield live
