"""The ports of one process: which are opened, reported and closed, and in which order.

A port stays open for as long as each configuration names its endpoint in the same words; what is
new is opened before anything is closed (ADR-0014).  The admin site's ports are closed last, so that
an operator sees the process shut down.  How an endpoint becomes a listening socket is
``server/listen.py``'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from twisted.internet.defer import Deferred, DeferredList, maybeDeferred
from twisted.logger import Logger

from llmproxy.config import Config
from llmproxy.server.listen import close, is_inherited, listen, share, unclaimed
from llmproxy.server.site import Site
from llmproxy.server.tls import ListenerTls

_log = Logger()


class Place(NamedTuple):
    """An endpoint, and what is there.

    Attributes:
        whose: reached by clients (``proxy``) or by operators (``admin``).
        text: the endpoint, as the file has it.
        site: serves its connections.
        tls: ends TLS on them, where it is to be ended.
    """

    whose: Literal["proxy", "admin"]
    text: str
    site: Site
    tls: ListenerTls | None = None


class Listener(NamedTuple):
    """A place, and the port that listens there."""

    place: Place
    port: Any


class Listeners:
    """What one process listens on.

    Args:
        reactor: listens.
        site: serves clients.
        admin: serves operators.
        metrics: serves Prometheus, where it has a listener of its own.
        direct: with the transports of ``net/``; else with Twisted's own.

    Attributes:
        proxy: the ports that clients reach, those that end TLS behind the others.
        admin: the ports that operators reach.
        addresses: the host and port of each of them, Unix sockets left out; the list is never
            another one.
    """

    def __init__(
        self, reactor: Any, *, site: Site, admin: Site, metrics: Site, direct: bool
    ) -> None:
        self._reactor = reactor
        self._site, self._admin, self._metrics = site, admin, metrics
        self._direct = direct
        self._open: list[Listener] = []
        self._unreported: list[Listener] = []
        self._given: set[int] = set()
        self.proxy: list[Any] = []
        self.admin: list[Any] = []
        self.addresses: list[tuple[str, int]] = []

    # -- from one configuration to the next -----------------------------------------------------

    def prepare(self, config: Config, tls: ListenerTls | None) -> list[Listener]:
        """Return a listener for each endpoint of ``config``, opened where it is not open.

        Nobody is accepted before the reactor's next turn.

        Args:
            tls: ends TLS where it is to be ended; another one is another place.

        Raises:
            OSError: an address cannot be bound; nothing stays open that was not.
            ValueError: an endpoint is none.
        """
        left, listeners = list(self._open), list[Listener]()
        try:
            for place in self._places(config, tls):
                found = next((one for one in left if one.place == place), None)
                if found is None:
                    found = Listener(place, self._listen(place, reuse_port=config.proxy.reuse_port))
                else:
                    left.remove(found)
                listeners.append(found)
        except BaseException:
            self.abandon(listeners)
            raise
        return listeners

    def abandon(self, listeners: list[Listener]) -> None:
        """Close what :meth:`prepare` opened for nothing."""
        for listener in listeners:
            if listener not in self._open:
                maybeDeferred(listener.port.stopListening)

    def use(self, listeners: list[Listener], *, reuse_port: bool) -> None:
        """Listen there, and nowhere else; connections that were accepted elsewhere go on."""
        before, self._open = self._open, listeners
        self._unreported = [one for one in listeners if one not in before]
        self._given.update(port.given for _, port in listeners if port.given is not None)
        self.proxy[:] = [port for place, port in listeners if place.whose == "proxy"]
        self.admin[:] = [port for place, port in listeners if place.whose == "admin"]
        self.addresses[:] = [
            (where.host, where.port)
            for where in (port.getHost() for _, port in listeners)
            if hasattr(where, "port")
        ]
        for place, port in listeners:
            if place.whose == "proxy":
                share(port, place.text, reuse_port=reuse_port)
        for listener in before:
            if listener not in listeners:
                _log.info(
                    "{site} listens no more on {address}",
                    site=listener.place.whose,
                    address=_in_words(listener.port.getHost()),
                )
                _close(listener)

    def report(self) -> None:
        """Write to the log where the process listens; each port is reported once."""
        for place, port in self._unreported:
            where = port.getHost()
            tls = place.tls is not None
            _log.info(
                "{site} listens on {address} with TLS" if tls else "{site} listens on {address}",
                site=place.whose,
                tls=tls,
                address=_in_words(where),
                port=getattr(where, "port", None),
            )
        self._unreported = []

    def _places(self, config: Config, tls: ListenerTls | None) -> list[Place]:
        proxy, admin = config.proxy, config.admin
        places = [Place("proxy", text, self._site) for text in proxy.listen]
        places += [Place("proxy", text, self._site, tls) for text in proxy.listen_tls]
        places.append(Place("admin", admin.listen, self._admin))
        if admin.metrics_listen is not None:
            places.append(Place("admin", admin.metrics_listen, self._metrics))
        return places

    def _listen(self, place: Place, *, reuse_port: bool) -> Any:
        if place.whose == "admin":
            return listen(self._reactor, place.text, place.site)
        return listen(
            self._reactor,
            place.text,
            place.site,
            tls=place.tls,
            direct=self._direct,
            reuse_port=reuse_port,
        )

    # -- the end --------------------------------------------------------------------------------

    def close_proxy(self) -> Deferred[Any]:
        """Accept no more clients; fires when nobody listens for them here.

        A socket from systemd is closed here, too: if systemd closes its own, clients are refused.
        """
        closed = self._close_all("proxy")
        for descriptor in self._given:
            os.close(descriptor)
        self._given.clear()
        return closed

    def close_admin(self) -> Deferred[Any]:
        """Be seen no more."""
        return self._close_all("admin")

    def _close_all(self, whose: Literal["proxy", "admin"]) -> Deferred[Any]:
        return DeferredList([_close(one) for one in self._open if one.place.whose == whose])


def mistakes(config: Config, environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong if systemd holds the port and the configuration does not know it.

    Both ways to run the daemon are enabled then, or the file is that of the other way: each process
    would bind the port for itself, and all but one would fail.

    Args:
        config: what the file says.
        environ: where systemd says what it has handed over.
    """
    proxy, admin = config.proxy, config.admin
    texts = [*proxy.listen, *proxy.listen_tls, admin.listen, admin.metrics_listen or ""]
    return [
        f"proxy.listen: expected an endpoint such as systemd:domain=INET:name={name}, because "
        "systemd handed over that socket; without one, disable the .socket unit, llmproxy.target "
        "and the instances, and start llmproxy.service"
        for name in unclaimed(texts, environ, pid=os.getpid())
    ]


def _in_words(where: Any) -> str:
    """Return an address of Twisted's as people write it."""
    host = getattr(where, "host", None)
    if host is None:
        name = getattr(where, "name", None)
        return f"unix:{os.fsdecode(name)}" if name else str(where)
    return f"[{host}]:{where.port}" if ":" in host else f"{host}:{where.port}"


def _close(listener: Listener) -> Deferred[Any]:
    return close(listener.port, inherited=is_inherited(listener.place.text))
