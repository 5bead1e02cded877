"""The fixtures that hand out our parts, or with ``--stock`` Twisted's and treq's own."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import serverFromString
from twisted.web import server
from twisted.web.resource import Resource

from llmproxy.config import Limits, Timeouts
from llmproxy.server.handler import Router
from llmproxy.server.site import Site
from llmproxy.service import ProxyService
from tests.support.kernel import held
from tests.support.tls import Authority
from tests.traps.parts import (
    OurSender,
    Ports,
    Sender,
    StockPump,
    StockSender,
    Upstream,
    our_config,
)
from tests.traps.resources import Serving
from tests.traps.waits import until

TOWARDS_CLIENTS = ("request_head", "request_body", "client_stall")
"""Our deadlines that stock parts have their one idle timer for."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Write the row that a test is for into the report, for ``test_stock.py``."""
    # Twisted's own endpoints hand pyOpenSSL what it will not take for ever.
    item.add_marker(pytest.mark.filterwarnings("ignore:Passing pyOpenSSL:DeprecationWarning"))
    for mark in item.iter_markers("trap"):
        item.user_properties.append(("trap", mark.args[0]))


@pytest.fixture
def stock(request: pytest.FixtureRequest) -> bool:
    """Whether the scenario meets Twisted's and treq's own parts."""
    return bool(request.config.getoption("--stock"))


@pytest.fixture
def patience(stock: bool) -> float:
    """Seconds after which what has not happened counts as never; on stock parts it never does."""
    return 1.0 if stock else 10.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Issues the certificates of both sides."""
    return Authority(tmp_path)


Cleanup = Callable[[], Any]


@pytest.fixture
def cleanups() -> Iterator[list[Cleanup]]:
    """What is to be called behind the test, last one first; each may return a Deferred."""
    calls: list[Cleanup] = []
    yield calls
    while calls:
        pytest_twisted.blockon(maybeDeferred(calls.pop()))


@pytest.fixture
def upstream(stock: bool, cleanups: list[Cleanup]) -> Upstream:
    """``upstream(url, ca=None, …)``: what sends requests to the provider at ``url``.

    ``connect`` is how long that may take to connect, in seconds; ``pool_idle`` how long it keeps
    an idle connection, for which stock parts have no setting that is read from anywhere.
    """

    def make(
        url: str,
        ca: Path | None = None,
        *,
        connect: float | None = None,
        pool_idle: float | None = None,
    ) -> Sender:
        sender: Sender
        if stock:
            sender = StockSender(reactor, url, ca, connect)
        else:
            given = {"connect": connect, "pool_idle": pool_idle}
            lines = [f'{k} = "{v * 1000:.0f}ms"' for k, v in given.items() if v is not None]
            config = our_config(url, ca=ca, more="\n".join(["[timeouts]", *lines]))
            sender = OurSender(reactor, config)
        cleanups.append(sender.close)
        return sender

    return make


@pytest.fixture
def front(stock: bool, authority: Authority, cleanups: list[Cleanup]) -> Ports:
    """``front(resource, tls=False, …)``: listens, serves ``resource`` and returns the port.

    ``client_deadline`` is how long a head, a body and a client that takes nothing may last, in
    seconds; stock parts have one timer for all.
    """

    def listen(
        resource: Resource, *, tls: bool = False, client_deadline: float | None = None
    ) -> int:
        site: Any
        if stock:
            site = _stock_site(resource, client_deadline)
        else:
            site = Site(
                Router(Serving(resource)),
                reactor,
                time.monotonic,
                _timeouts(client_deadline),
                Limits(),
                wall=lambda: 0.0,
            )
        return _listen(site, _address(authority, tls=tls), cleanups).port

    return listen


@pytest.fixture
def proxy(stock: bool, authority: Authority, cleanups: list[Cleanup]) -> Ports:
    """``proxy(url, …)``: a whole proxy in front of ``url``, under ``/p``; returns its port.

    ``ca`` is whom it trusts, ``tls`` ends TLS on its listener, ``send_buffer`` is the kernel's for
    each client in bytes, ``silence`` the seconds after which a silent provider is given up,
    ``client_deadline`` is as for ``front``.  ``deadlines`` are further ones of ours, in TOML, and
    ``body_limit`` is in bytes; stock parts have none that they could be.
    """

    def start(
        url: str,
        *,
        ca: Path | None = None,
        tls: bool = False,
        send_buffer: int = 0,
        silence: float | None = None,
        client_deadline: float | None = None,
        deadlines: str = "",
        body_limit: int = 0,
    ) -> int:
        address = _address(authority, tls=tls)
        if stock:
            pump = StockPump(reactor, url, ca, silence)
            cleanups.append(pump.pool.closeCachedConnections)
            listening = _listen(_stock_site(pump, client_deadline), address, cleanups)
        else:
            if silence is not None:
                deadlines = f'idle = "{silence * 1000:.0f}ms"'
            lines = [f"timeouts = {{ {deadlines} }}"] if deadlines else []
            if body_limit:
                lines.append(f'request_body = "{body_limit}B"')
            if client_deadline is not None:
                each = [f'{name} = "{client_deadline * 1000:.0f}ms"' for name in TOWARDS_CLIENTS]
                lines += ["[timeouts]", *each]
            config = our_config(url, ca=ca, listen=address, more="\n".join(lines))
            service = ProxyService(config, reactor, handle_signals=False)
            service.privilegedStartService()
            service.startService()
            cleanups.append(service.stopService)
            (listening,) = (_Port(port) for port in service.proxy_ports)
        if send_buffer:
            listening.set_send_buffer(send_buffer)
        return listening.port

    return start


def _stock_site(resource: Resource, deadline: float | None) -> server.Site:
    return server.Site(resource, **({} if deadline is None else {"timeout": deadline}))


def _timeouts(deadline: float | None) -> Timeouts:
    return Timeouts(**({} if deadline is None else dict.fromkeys(TOWARDS_CLIENTS, deadline)))


class _Port:
    """A listening port of Twisted's."""

    def __init__(self, listening: Any) -> None:
        self._listening = listening
        self.port: int = listening.getHost().port

    def set_send_buffer(self, size: int) -> None:
        """Set what the kernel takes for each connection that is accepted from now on."""
        self._listening.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


def _address(authority: Authority, *, tls: bool) -> str:
    if not tls:
        return "tcp:0:interface=127.0.0.1"
    key, certificate = authority.key_and_certificate()
    return f"ssl:0:interface=127.0.0.1:privateKey={key}:certKey={certificate}"


def _listen(site: Any, address: str, cleanups: list[Cleanup]) -> _Port:
    found: list[Any] = []
    serverFromString(reactor, address).listen(site).addCallback(found.append)
    (listening,) = found
    port = _Port(listening)
    # Whoever served a client that has left learns of it a turn later.
    cleanups.append(
        lambda: Deferred.fromCoroutine(until(lambda: not held(local=port.port).sockets))
    )
    cleanups.append(listening.stopListening)
    return port
