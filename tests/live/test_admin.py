"""The admin site: what it shows, to whom, and that it only shows (design 12)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import UNTUNED, Daemon, provider_config
from tests.support.live_proxy import Response, read_response, until
from tests.support.sockets import connect, request


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon of which only the admin site is asked."""
    config = provider_config("http://127.0.0.1:1")
    with Daemon(tmp_path_factory.mktemp("admin"), config) as daemon:
        yield daemon


def ask(port: int, sent: bytes) -> Response:
    """Send one request to an admin site."""
    with connect(port) as client:
        client.send(sent)
        return read_response(client)


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/livez", b"text/plain; charset=utf-8", b"alive\n"),
        ("/readyz", b"text/plain; charset=utf-8", b"ready\n"),
        ("/livez?verbose", b"text/plain; charset=utf-8", b"alive\n"),
    ],
)
def test_health_is_shown(daemon: Daemon, path: str, kind: bytes, body: bytes) -> None:
    """The response is one word, is never cached, and has no Server field."""
    got = ask(daemon.admin_port, request("GET", path))
    assert (got.status, got.body) == (200, body)
    assert got.values(b"content-type") == [kind]
    assert got.values(b"cache-control") == [b"no-store"]
    assert got.values(b"server") == []


@pytest.mark.parametrize(
    "path", ["/nothing", "/livez/", "/livez/x", "/metrics/x", "/-/pace", "/p/x", "//livez"]
)
def test_there_is_nothing_else(daemon: Daemon, path: str) -> None:
    """Every other path is a 404 in JSON, also one that a route of the proxy takes."""
    got = ask(daemon.admin_port, request("GET", path))
    assert got.status == 404
    assert got.values(b"content-type") == [b"application/json"]
    assert got.json()["error"]["message"]


def test_the_admin_pages_are_not_on_the_proxys_port(daemon: Daemon) -> None:
    """There they are paths like others, which no route takes."""
    for path in ("/livez", "/metrics", "/config"):
        assert ask(daemon.port, request("GET", path)).status == 404


def test_a_listener_for_metrics_shows_nothing_else(tmp_path: Path) -> None:
    """/metrics, /livez and /readyz alone, for a Prometheus on another host."""
    admin = 'metrics_listen = "tcp:0:interface=127.0.0.1"'
    with Daemon(tmp_path, provider_config("http://127.0.0.1:1"), admin=admin) as daemon:

        def ports() -> set[int]:
            return {line["port"] for line in daemon.log if line.get("site") == "admin"}

        (other,) = until(lambda: ports() - {daemon.admin_port}, "both listen")
        for path in ("/metrics", "/livez", "/readyz"):
            assert ask(other, request("GET", path)).status == 200
        assert ask(other, request("GET", "/config")).status == 404
        assert ask(daemon.admin_port, request("GET", "/config")).status == 200


@pytest.mark.parametrize("host", ["rebound.example", "rebound.example:9080", "127.0.0.1.nip.io"])
def test_a_page_of_somebody_elses_name_reads_no_configuration(daemon: Daemon, host: str) -> None:
    """A name can point here for a moment (DNS rebinding); probes and scrapes may use any."""
    for path, status in (("/config", 421), ("/metrics", 200), ("/livez", 200)):
        sent = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
        assert ask(daemon.admin_port, sent.encode()).status == status


@pytest.mark.skipif(UNTUNED, reason="Twisted's own loop is not watched")
def test_what_makes_turns_long_is_named_where_that_is_asked_for(tmp_path: Path) -> None:
    """With the names of the program's parts; by default there is neither page nor metric."""
    config = provider_config("http://127.0.0.1:1")
    with Daemon(tmp_path, config, proxy="anonymous = true\nwatch_turns = true") as watched:
        assert ask(watched.port, request("POST", "/p/x", body=b"{}")).status == 502
        until(lambda: watched.metrics()["llmproxy_turn_seconds_count"] > 2, "turns are counted")
        found = ask(watched.admin_port, request("GET", "/turns")).json()
    names = {row["name"] for row in found["calls"] if row["count"]}
    assert {"a request begins", "a record is closed", "a slice of the metrics"} <= names
    assert {"Port doRead", "ClientConnection doRead", "timers"} <= names
    assert any(name.startswith("timer ") for name in names)


def test_turns_are_not_watched_by_default(daemon: Daemon) -> None:
    """There is neither page nor metric."""
    assert ask(daemon.admin_port, request("GET", "/turns")).status == 404
    assert "llmproxy_turn_seconds_count" not in daemon.metrics()
