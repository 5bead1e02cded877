"""The ports of one process: which are opened, told of and closed, and in which order.

The admin site's are closed last, so that an operator sees a process come to rest.  How an endpoint
becomes a listening socket is ``front/listen.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.logger import Logger

from llmproxy.config import Proxy
from llmproxy.front.http import Site
from llmproxy.front.listen import close, is_inherited, listen
from llmproxy.front.tls import ListenerTls

_log = Logger()


class Listeners:
    """What one process listens on.

    Args:
        reactor: listens.
        config: the endpoints that clients reach.

    Attributes:
        proxy: the ports that clients reach, those that end TLS behind the others.
        admin: the ports that operators reach.
    """

    def __init__(self, reactor: Any, config: Proxy) -> None:
        self._reactor = reactor
        self._config = config
        self.proxy: list[Any] = []
        self.admin: list[Any] = []

    def open(self, site: Site, tls: ListenerTls | None, admin: Iterable[tuple[str, Site]]) -> None:
        """Listen everywhere.

        Args:
            site: serves clients.
            tls: ends TLS where it is to be ended.
            admin: endpoints for operators, each with its site.

        Raises:
            OSError: an address cannot be bound.
            ValueError: an endpoint is none.
        """
        config = self._config
        for texts, ended in ((config.listen, None), (config.listen_tls, tls)):
            for text in texts:
                port = listen(
                    self._reactor,
                    text,
                    site,
                    tls=ended,
                    direct=config.tuned_loop,
                    reuse_port=config.reuse_port,
                )
                self.proxy.append(port)
        for text, one in admin:
            self.admin.append(listen(self._reactor, text, one))

    def tell(self) -> None:
        """Write where the process listens to the log."""
        for site, ports in (("proxy", self.proxy), ("admin", self.admin)):
            for at, port in enumerate(ports):
                where = port.getHost()
                _log.info(
                    "{site} listens on {address}",
                    site=site,
                    tls=site == "proxy" and at >= len(self._config.listen),
                    address=str(where),
                    port=getattr(where, "port", None),
                )

    def close_proxy(self) -> Deferred[Any]:
        """Accept no more clients; fires when nobody listens for them here."""
        texts = (*self._config.listen, *self._config.listen_tls)
        pairs = zip(self.proxy, texts, strict=False)  # fewer ports, where the start has failed
        return DeferredList([close(port, inherited=is_inherited(text)) for port, text in pairs])

    def close_admin(self) -> Deferred[Any]:
        """Be seen no more."""
        return DeferredList([close(port, inherited=False) for port in self.admin])
