"""The admin site: what it shows, what it refuses, and that no request changes anything."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from twisted.internet.address import UNIXAddress

from llmproxy.config import Client
from tests.admin.one_site import BEARER, TOKEN, Admin, exchange, with_host, with_token


def test_livez_is_always_alive() -> None:
    """``/livez`` does not depend on readiness."""
    admin = Admin()
    for admin.ready in (True, False):
        status, fields, body = admin.get("/livez")
        assert (status, body) == (200, "alive\n")
        assert fields["content-type"] == "text/plain; charset=utf-8"


def test_turns_are_shown_where_they_are_watched() -> None:
    """Elsewhere there is no such page, and no histogram."""
    watching = Admin(turns=lambda: {"calls": []})
    assert json.loads(watching.get("/turns")[2]) == {"calls": []}
    assert Admin().get("/turns")[0] == 404
    assert "turn_seconds" not in watching.get("/metrics")[2]
    watching.metrics.watch_turns().observe(0.002)
    shown = watching.get("/metrics")[2]
    assert "\nllmproxy_turn_seconds_count 1.0\n" in shown
    assert '\nllmproxy_turn_seconds_bucket{le="0.001"} 0.0\n' in shown


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
    """``/clients`` has every client, those with the most streams first."""
    admin = Admin()
    limited = {"a": Client(name="a", keys=(), max_streams=2), "b": Client(name="b", keys=())}
    admin.followed = msgspec.structs.replace(admin.followed, clients=limited)
    admin.limits.follow(limited)
    admin.exchanges += [exchange(client=name) for name in ("b", "anonymous", "b", None)]
    status, fields, body = admin.get("/clients")

    assert (status, fields["content-type"]) == (200, "application/json")
    assert json.loads(body) == [
        {"client": "b", "streams": 2, "limits": {}},
        {"client": "anonymous", "streams": 1, "limits": {}},
        {
            "client": "a",
            "streams": 0,
            "limits": {"max_streams": {"limit": 2, "used": 0, "remaining": 2, "here": 0}},
        },
    ]


def test_a_listener_for_metrics_alone_shows_no_configuration() -> None:
    """``/config`` and ``/clients`` are 404 there, and the other paths stay."""
    admin = Admin(config=False)

    for path in ("/config", "/clients", "/providers", "/providers/p/disable"):
        assert admin.get(path, BEARER, method="POST")[0] == 404
        assert admin.get(path)[0] == 404
    for path in ("/livez", "/readyz", "/metrics"):
        assert admin.get(path)[0] == 200


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/metrics", "/config", "/clients", "/providers"]
)
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
@pytest.mark.parametrize("path", ["/livez", "/metrics", "/config", "/providers"])
def test_other_methods_are_refused(path: str, method: str) -> None:
    """The response is 405, with the served methods in ``allow``."""
    status, fields, body = Admin().get(path, method=method)

    assert (status, fields["allow"]) == (405, "GET, HEAD")
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "path",
    ["/index.html", "/x", "/livez/", "/livez/x", "/metrics/y", "//livez", "/livez%2f", "/LIVEZ"],
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


# --- providers ------------------------------------------------------------------------------------

ROW = {
    "name": "p",
    "dialect": "openai",
    "url": "http://p.example/v1",
    "state": "on",
    "switched_off": [],
    "connections": {"active": 0, "connecting": 0, "idle": 3},
    "up": True,
    "circuits": [],
    "cooldowns": [],
    "places": {"busy": 0, "most": None, "waiting": 0},
    "headroom": None,
}


def test_the_providers_are_shown_without_a_token() -> None:
    """In the order of the file, each with its connections and what is off."""
    admin = Admin()
    status, fields, body = admin.get("/providers")
    assert (status, fields["content-type"]) == (200, "application/json")
    first, second = json.loads(body)
    assert first == ROW
    assert (second["name"], second["connections"]["idle"]) == ("q.1", 0)


def test_a_provider_is_switched_off_and_on() -> None:
    """The response is its row; the names of providers may hold dots."""
    admin = Admin()
    status, row = admin.post("/providers/p/disable")
    assert (status, row["state"]) == (200, "off")
    (switch,) = row["switched_off"]
    assert (switch["model"], switch["until"], switch["by"]) == (None, None, "127.0.0.1")
    assert [one["state"] for one in json.loads(admin.get("/providers")[2])] == ["off", "on"]
    assert admin.post("/providers/q.1/disable")[0] == 200
    for _ in range(2):
        assert admin.post("/providers/p/enable") == (200, ROW)
    assert admin.switches.off.keys() == {("q.1", None)}


def test_a_model_is_switched_off_for_a_while() -> None:
    """The provider itself stays on; a model's name may hold what a query must encode."""
    admin = Admin()
    target = "/providers/p/disable?for=30m&model=a%2Fb%20c%26d"
    status, row = admin.post(target)
    assert (status, row["state"]) == (200, "on")
    (switch,) = row["switched_off"]
    assert (switch["model"], switch["until"]) == ("a/b c&d", "1970-01-01T00:46:40Z")
    admin.clock.advance(1799)
    assert ("p", "a/b c&d") in admin.switches.off
    admin.clock.advance(1)
    assert admin.post("/providers/p/enable?model=other") == (200, ROW)
    assert admin.switches.off == {}


@pytest.mark.parametrize(
    ("field", "status"),
    [
        ("X-None: 1", 401),
        ("Authorization: Bearer", 401),
        ("Authorization: Bearer ", 401),
        (f"Authorization: Bearer {TOKEN}x", 401),
        (f"Authorization: Bearer {TOKEN[:-1]}", 401),
        (f"Authorization: Basic {TOKEN}", 401),
        (f"Authorization: {TOKEN}", 401),
        (f"x-api-key: {TOKEN}", 401),
        ("Authorization: Bearer \u00e4", 401),
        (f"authorization: bearer {TOKEN}", 200),
        (f"Authorization: Bearer  {TOKEN} ", 200),
    ],
)
def test_a_change_needs_the_token(field: str, status: int) -> None:
    """Nothing else of the response depends on what was shown."""
    admin = Admin()
    for path in ("/providers/p/disable", "/providers/none/enable"):
        got, fields, body = admin.get(path, field, method="POST")
        assert got == (404 if "none" in path and status == 200 else status)
        assert ("www-authenticate" in fields) is (got == 401)
        assert TOKEN not in body
    assert bool(admin.switches.off) is (status == 200)


def test_without_a_token_in_the_file_nothing_can_be_changed() -> None:
    """It is a 403, whatever is shown; the token is that of the configuration in use."""
    admin = Admin()
    admin.followed = with_token(None)
    status, error = admin.post("/providers/p/disable", "Authorization: Bearer ")
    assert (status, admin.switches.off) == (403, {})
    assert "`token` in [admin]" in error["error"]["message"]
    admin.followed = with_token("other")
    assert admin.post("/providers/p/disable")[0] == 401
    assert admin.post("/providers/p/disable", "Authorization: Bearer other")[0] == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_a_change_is_a_post(method: str) -> None:
    """A link or an image of a web page changes nothing."""
    admin = Admin()
    status, fields, _ = admin.get("/providers/p/disable", BEARER, method=method)
    assert (status, fields["allow"], admin.switches.off) == (405, "POST", {})


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/providers/none/disable", 404),
        ("/providers//disable", 404),
        ("/providers/p", 404),
        ("/providers/p/", 404),
        ("/providers/p/disable/", 404),
        ("/providers/p/remove", 404),
        ("/providers/", 404),
        ("/providers/p/disable?for=30", 400),
        ("/providers/p/disable?for=off", 400),
        ("/providers/p/disable?for=", 400),
        ("/providers/p/disable?model=", 400),
        ("/providers/p/disable?model=a&model=b", 400),
        ("/providers/p/disable?models=a", 400),
        ("/providers/p/enable?for=30m", 400),
    ],
)
def test_what_is_not_understood_changes_nothing(target: str, status: int) -> None:
    """A slip in the query must not switch off more than was meant."""
    admin = Admin()
    got, error = admin.post(target)
    assert (got, admin.switches.off) == (status, {})
    assert error["error"]["message"]


@pytest.mark.parametrize("host", FOREIGN)
def test_a_page_of_another_name_changes_nothing(host: str) -> None:
    """Also if it knew the token; nor does it see the providers."""
    admin = Admin()
    assert with_host(admin, host, "/providers") == 421
    head = f"POST /providers/p/disable HTTP/1.1\r\nHost: {host}\r\n{BEARER}\r\n"
    admin.channel.dataReceived(f"{head}Content-Length: 0\r\n\r\n".encode())
    assert admin.transport.take().startswith(b"HTTP/1.1 421 ")
    assert admin.switches.off == {}
