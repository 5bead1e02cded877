"""Handlers and routers: what a plain handler allows, and which handler a request finds."""

from __future__ import annotations

import pytest
from twisted.internet.task import Clock

from llmproxy.server.handler import Handler, Router
from llmproxy.server.site import Site
from tests.server.caller import WaitingHandler
from tests.support.fake_transport import FakeTransport
from tests.support.sockets import request


def response_to(router: Router, data: bytes) -> bytes:
    """Return the response to these bytes."""
    clock, transport = Clock(), FakeTransport()
    transport.connect(Site(router, clock, clock.seconds, wall=clock.seconds).buildProtocol(None))
    transport.protocol.dataReceived(data)
    return transport.take()


@pytest.mark.parametrize(
    ("method", "target", "found"),
    [
        ("GET", "/page", "page"),
        ("POST", "/page?x=/else", "page"),
        ("GET", "/page/", "default"),
        ("GET", "/page/x", "default"),
        ("GET", "//page", "default"),
        ("GET", "/pag%65", "default"),
        ("GET", "xpage", "default"),
        ("GET", "/", "default"),
        ("CONNECT", "host:443", "connect"),
        ("CONNECT", "/page", "connect"),
        ("CONNECT", "http://host/", "connect"),
        ("GET", "http://host/", "urls"),
        ("POST", "HTTP://host", "urls"),
        ("GET", "https://host/page", "urls"),
        ("GET", "/http://host/", "default"),
        ("OPTIONS", "*", "default"),
        ("GET", "http:/page", "default"),
    ],
)
def test_a_request_finds_its_handler(method: str, target: str, found: str) -> None:
    """By its method, by its exact path without the query, by a whole URL, else by default."""
    handlers = {name: WaitingHandler() for name in ("default", "page", "connect", "urls")}
    router = Router(
        handlers["default"],
        {b"/page": handlers["page"]},
        {b"CONNECT": handlers["connect"]},
        handlers["urls"],
    )
    response_to(router, request(method, target))
    assert [name for name, handler in handlers.items() if handler.requests] == [found]


def test_a_handler_takes_no_body_by_default() -> None:
    """A handler that does not override the limit refuses every body."""

    class Plain(WaitingHandler):
        body_limit = Handler.body_limit
        holds_body = Handler.holds_body

    handler = Plain()
    response_to(Router(handler), request("POST", "/", "Content-Length: 1"))
    refusal = handler.requests[0].refusal
    assert refusal is not None
    assert refusal.status == 413


@pytest.mark.parametrize("target", ["?x", "*", "x", "http:/x", "x://", "http://"])
def test_every_target_finds_a_handler(target: str) -> None:
    """Also one without a path: what is wrong with it is the handler's to say."""
    handlers = [WaitingHandler(), WaitingHandler()]
    response_to(Router(handlers[0], urls=handlers[1]), request("GET", target))
    assert [len(one.requests) for one in handlers] == ([0, 1] if "://" in target else [1, 0])
