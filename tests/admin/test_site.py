"""The admin site: what it shows, to whom it says no, and that nothing there changes anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from twisted.internet.task import Clock

from llmproxy.admin.site import admin_router
from llmproxy.config import Limits, Timeouts
from llmproxy.record.metrics import Metrics
from llmproxy.server.site import Site
from tests.support.fake_transport import FakeTransport
from tests.support.sockets import request


class Admin:
    """An admin site and one connection to it."""

    def __init__(self, *, config: bool = True) -> None:
        self.ready = True
        self.shown: Any = {"proxy": {"via": "us"}}
        self.metrics = Metrics("1.2.3")
        clock = Clock()
        site = Site(
            admin_router(
                ready=lambda: self.ready,
                registry=self.metrics.registry,
                config=(lambda: self.shown) if config else None,
            ),
            clock,
            clock.seconds,
            Timeouts(),
            Limits(),
            wall=lambda: 1.0,
        )
        self.transport = FakeTransport()
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


def test_whoever_answers_is_alive() -> None:
    """``/livez`` says so, ready or not."""
    admin = Admin()
    for admin.ready in (True, False):
        status, fields, body = admin.get("/livez")
        assert (status, body) == (200, "alive\n")
        assert fields["content-type"] == "text/plain; charset=utf-8"


def test_ready_is_what_is_said_now() -> None:
    """``/readyz`` follows, on the same connection."""
    admin = Admin()
    assert admin.get("/readyz")[0] == 200
    admin.ready = False
    assert admin.get("/readyz")[0] == 503
    admin.ready = True
    assert admin.get("/readyz")[0] == 200


def test_metrics_in_the_text_format() -> None:
    """Prometheus's own format, where nothing else is asked for."""
    status, fields, body = Admin().get("/metrics")

    assert status == 200
    assert fields["content-type"].startswith("text/plain")
    families = {family.name: family for family in parse_text(body)}
    assert families["llmproxy_build_info"].samples[0].labels == {"version": "1.2.3"}


def test_metrics_as_openmetrics() -> None:
    """Where the scraper asks for it, with its own type."""
    _, fields, body = Admin().get(
        "/metrics", "Accept: application/openmetrics-text; version=1.0.0, text/plain;q=0.5"
    )

    assert fields["content-type"].startswith("application/openmetrics-text")
    assert "llmproxy_build_info" in {family.name for family in parse_openmetrics(body)}


def test_the_configuration_is_shown_as_it_is_now() -> None:
    """``/config`` is JSON, made when it is asked for."""
    admin = Admin()
    admin.shown = {"proxy": {"via": "them"}}
    status, fields, body = admin.get("/config")

    assert (status, fields["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"proxy": {"via": "them"}}


def test_a_listener_for_metrics_alone_shows_no_configuration() -> None:
    """Without a configuration to show there is no such path."""
    admin = Admin(config=False)

    assert admin.get("/config")[0] == 404
    for path in ("/livez", "/readyz", "/metrics"):
        assert admin.get(path)[0] == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/config"])
def test_head_is_get_without_a_body(path: str) -> None:
    """The fields are the same, its length included."""
    admin = Admin()
    _, got, body = admin.get(path)
    status, head, nothing = admin.get(path, method="HEAD")

    assert (status, nothing) == (200, "")
    assert head["content-type"] == got["content-type"]
    assert int(got["content-length"]) == len(body)
    if path != "/metrics":
        assert head == got


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/config"])
def test_a_query_changes_nothing(path: str) -> None:
    """Whatever stands behind the question mark."""
    assert Admin().get(path + "?x=/y")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"])
@pytest.mark.parametrize("path", ["/livez", "/metrics", "/config"])
def test_nothing_here_is_changed(path: str, method: str) -> None:
    """Any other method is a 405 that says which are served."""
    status, fields, body = Admin().get(path, method=method)

    assert (status, fields["allow"]) == (405, "GET, HEAD")
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/", "/x", "/livez/", "/livez/x", "/metrics/y", "//livez", "/livez%2f", "/LIVEZ"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_there_is_nothing_else(path: str, method: str) -> None:
    """404 in JSON, also below a path that there is."""
    status, fields, body = Admin().get(path, method=method)

    assert (status, fields["content-type"]) == (404, "application/json")
    assert json.loads(body)["error"]["message"]


def test_responses_are_not_kept_by_anybody() -> None:
    """What was true is not shown again, and nothing of Twisted's is added."""
    for path in ("/livez", "/metrics", "/else"):
        _, fields, _ = Admin().get(path)
        assert fields["cache-control"] == "no-store"
        assert set(fields) <= {"content-type", "content-length", "cache-control"}


def test_a_body_is_not_read() -> None:
    """Whoever sends one is answered, and the connection is closed."""
    admin = Admin()
    admin.get("/livez", body=b"x" * 100)

    assert {"half", "lose"} & set(admin.transport.calls)


def test_what_is_not_http_is_refused_with_todays_date() -> None:
    """As on any other listener."""
    admin = Admin()
    admin.channel.dataReceived(b"nonsense\r\n\r\n")
    response = admin.transport.take()
    assert response.startswith(b"HTTP/1.1 400 ")
    assert b"\r\ndate: Thu, 01 Jan 1970 00:00:01 GMT\r\n" in response
