"""The admin site: what it shows, what it refuses, and that no request changes anything."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.task import Clock

from llmproxy.admin.site import admin_router
from llmproxy.config import Limits, Timeouts
from llmproxy.record.metrics import Metrics
from llmproxy.server.site import Site
from tests.support.fake_transport import FakeTransport
from tests.support.sockets import request

CLIENT = IPv4Address("TCP", "127.0.0.1", 40000)


class Admin:
    """An admin site and one connection to it."""

    def __init__(self, *, config: bool = True, address: Any = CLIENT) -> None:
        self.ready = True
        self.hosts: tuple[str, ...] = ()
        self.shown: Any = {"proxy": {"via": "us"}}
        self.clients: Any = []
        self.metrics = Metrics("1.2.3")
        clock = Clock()
        site = Site(
            admin_router(
                ready=lambda: self.ready,
                registry=self.metrics.registry,
                config=(lambda: self.shown) if config else None,
                clients=(lambda: self.clients) if config else None,
                hosts=lambda: self.hosts,
            ),
            clock,
            clock.seconds,
            Timeouts(),
            Limits(),
            wall=lambda: 1.0,
        )
        self.transport = FakeTransport()
        self.transport.peerAddr = address
        self.channel = site.buildProtocol(None)
        self.transport.connect(self.channel)

    def get(
        self, target: str, *fields: str, method: str = "GET", body: bytes = b""
    ) -> tuple[int, dict[str, str], str]:
        """Return status, fields and body of a response."""
        self.channel.dataReceived(request(method, target, *fields, body=body))
        head, _, rest = self.transport.take().decode().partition("\r\n\r\n")
        first, *lines = head.split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        return int(first.split()[1]), {name: value for name, _, value in pairs}, rest


def test_livez_is_always_alive() -> None:
    """``/livez`` does not depend on readiness."""
    admin = Admin()
    for admin.ready in (True, False):
        status, fields, body = admin.get("/livez")
        assert (status, body) == (200, "alive\n")
        assert fields["content-type"] == "text/plain; charset=utf-8"


def test_readyz_follows_readiness() -> None:
    """``/readyz`` changes on the same connection."""
    admin = Admin()
    for admin.ready, status in ((True, 200), (False, 503), (True, 200)):
        assert admin.get("/readyz")[0] == status


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/openmetrics-text;q=0", "text/plain"),
        ("application/openmetrics-text; version=1.0.0; q=0.000, */*", "text/plain"),
        ("application/openmetrics-text;Q=0 ;version=1.0.0", "text/plain"),
        ("text/plain;version=0.0.4, application/openmetrics-text; q = 0.", "text/plain"),
        ("application/openmetrics-text;q=0.001", "application/openmetrics-text"),
        ("application/openmetrics-text;q=0.5,text/plain;q=0", "application/openmetrics-text"),
        ("application/openmetrics-text;q=0, text/plain;version=1.0.0;q=0", "text/plain"),
    ],
)
def test_a_format_that_is_refused_is_not_sent(accept: str, kind: str) -> None:
    """A weight of zero says "not acceptable" (RFC 9110, section 12.4.2)."""
    status, fields, _ = Admin().get("/metrics", f"Accept: {accept}")
    assert (status, fields["content-type"].partition(";")[0]) == (200, kind)


@pytest.mark.parametrize(
    ("accept", "kind", "parse"),
    [
        ((), "text/plain", parse_text),
        (
            ("Accept: application/openmetrics-text; version=1.0.0, text/plain;q=0.5",),
            "application/openmetrics-text",
            parse_openmetrics,
        ),
    ],
)
def test_metrics_have_the_format_of_the_accept_field(
    accept: tuple[str, ...], kind: str, parse: Callable[[str], Iterable[Any]]
) -> None:
    """The default is Prometheus's own format."""
    status, fields, body = Admin().get("/metrics", *accept)

    assert status == 200
    assert fields["content-type"].startswith(kind)
    families = {family.name: family for family in parse(body)}
    (build,) = (one for name, one in families.items() if name.startswith("llmproxy_build"))
    assert build.samples[0].labels == {"version": "1.2.3"}


def test_the_present_configuration_is_shown() -> None:
    """``/config`` is JSON, made for each request."""
    admin = Admin()
    admin.shown = {"proxy": {"via": "them"}}
    status, fields, body = admin.get("/config")

    assert (status, fields["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"proxy": {"via": "them"}}


def test_what_clients_use_is_shown() -> None:
    """``/clients`` is JSON, made for each request."""
    admin = Admin()
    admin.clients = [{"client": "a", "limits": {"max_streams": {"limit": 2}}}]
    status, fields, body = admin.get("/clients")

    assert (status, fields["content-type"]) == (200, "application/json")
    assert json.loads(body) == admin.clients


def test_a_listener_for_metrics_alone_shows_no_configuration() -> None:
    """``/config`` and ``/clients`` are 404 there, and the other paths stay."""
    admin = Admin(config=False)

    assert admin.get("/config")[0] == admin.get("/clients")[0] == 404
    for path in ("/livez", "/readyz", "/metrics"):
        assert admin.get(path)[0] == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/config", "/clients"])
def test_head_is_get_without_a_body_or_query(path: str) -> None:
    """The fields are the same, with the length of the body; a query changes nothing."""
    admin = Admin()
    _, got, body = admin.get(path + "?x=/y")
    status, head, nothing = admin.get(path, method="HEAD")

    assert (status, nothing) == (200, "")
    assert head["content-type"] == got["content-type"]
    assert int(got["content-length"]) == len(body)
    if path != "/metrics":
        assert head == got


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
@pytest.mark.parametrize("path", ["/livez", "/metrics", "/config"])
def test_other_methods_are_refused(path: str, method: str) -> None:
    """The response is 405, with the served methods in ``allow``."""
    status, fields, body = Admin().get(path, method=method)

    assert (status, fields["allow"]) == (405, "GET, HEAD")
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/", "/x", "/livez/", "/livez/x", "/metrics/y", "//livez", "/livez%2f", "/LIVEZ"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths_are_not_found(path: str, method: str) -> None:
    """The response is 404 in JSON, below an existing path, too."""
    status, fields, body = Admin().get(path, method=method)

    assert (status, fields["content-type"]) == (404, "application/json")
    assert json.loads(body)["error"]["message"]


def test_responses_are_not_cached() -> None:
    """Each response has ``no-store``, and no field of Twisted's is added."""
    for path in ("/livez", "/metrics", "/else"):
        _, fields, _ = Admin().get(path)
        assert fields["cache-control"] == "no-store"
        assert set(fields) <= {"content-type", "content-length", "cache-control"}


def test_a_body_is_not_read() -> None:
    """The client gets its response, and the connection is closed."""
    admin = Admin()
    admin.get("/livez", body=b"x" * 100)

    assert {"half", "close"} & set(admin.transport.calls)


def test_a_malformed_request_is_refused_with_the_date() -> None:
    """The response is 400, as on any other listener."""
    admin = Admin()
    admin.channel.dataReceived(b"nonsense\r\n\r\n")
    response = admin.transport.take()
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b"\r\ndate: Thu, 01 Jan 1970 00:00:01 GMT\r\n" in response


def with_host(admin: Admin, host: str, path: str = "/config", method: str = "GET") -> int:
    """Return the status of a request to this host."""
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
    admin.channel.dataReceived(head.encode())
    return int(admin.transport.take().split()[1])


OURS = [
    *(
        "127.0.0.1",
        "127.0.0.1:9080",
        "[::1]:9080",
        "[::ffff:127.0.0.1]",
        "10.1.2.3:80",
        "localhost.",
    ),
    *("LOCALHOST", "admin.localhost", "llmproxy:9080", "Admin.Example:9080", "admin.example."),
    "",
]
FOREIGN = [
    *("evil.example", "evil.example:9080", "evil.example.", "127.0.0.1.evil.example"),
    *("localhost.evil.example", "evil-localhost.example", "x.admin.example", "127.0.0.1.nip.io"),
]


@pytest.mark.parametrize("host", OURS)
def test_the_configuration_is_shown_to_whoever_names_the_admin_site(host: str) -> None:
    """That is an address, a name without a dot, one of ``admin.hosts``, or this machine's name."""
    admin = Admin()
    admin.hosts = ("admin.example",)
    assert with_host(admin, host) == with_host(admin, host, method="HEAD") == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_the_configuration_is_not_shown_to_a_page_of_another_name(host: str) -> None:
    """Whoever owns a name can let it point here, and its pages read what a browser gets (421)."""
    admin = Admin()
    admin.hosts = ("admin.example",)
    assert with_host(admin, host) == with_host(admin, host, method="POST") == 421
    assert with_host(admin, host, "/clients") == 421
    for path in ("/livez", "/readyz", "/metrics"):
        assert with_host(admin, host, path) == 200


def test_the_hosts_follow_the_configuration_and_unix_sockets_need_none() -> None:
    """No browser reaches a Unix socket, and none speaks HTTP/1.0 without a Host."""
    admin = Admin()
    assert with_host(admin, "a.example") == 421
    admin.hosts = ("a.example",)
    assert with_host(admin, "a.example") == 200
    admin.channel.dataReceived(b"GET /config HTTP/1.0\r\n\r\n")
    assert admin.transport.take().startswith(b"HTTP/1.1 200 ")
    local = Admin(address=UNIXAddress("/run/x"))
    assert with_host(local, "any.example") == 200


def test_this_machines_name_is_the_admin_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not be written into the file."""
    monkeypatch.setattr(socket, "gethostname", lambda: "Gate.Corp.example")
    assert with_host(Admin(), "gate.corp.example:9080") == 200
