"""Requests behind a CONNECT that was intercepted: whose they are, and which host they are for."""

from __future__ import annotations

from base64 import b64encode

import pytest

from llmproxy.config.host_pattern import HostPatterns
from llmproxy.gateway.admission import Rules
from llmproxy.http1.grammar import Fields
from llmproxy.server.connection import ClientConnection
from llmproxy.server.inside import Inside
from tests.gateway.played import BODY, JSON, PlayedGateway
from tests.support.sockets import request

KEY_OF_C = b"Basic " + b64encode(b"c:key")


def inside(
    *,
    authorization: bytes | None = None,
    secure: bool = True,
    name: str | None = "in.example",
    port: int = 443,
    serves_plain: bool = False,
) -> PlayedGateway:
    """Return a gateway whose client's connection was turned inside."""
    played = PlayedGateway()
    found = Inside("in.example", port, authorization=authorization, tls=None, ended=lambda _: None)
    found.is_secure, found.name = secure, name
    assert isinstance(played.channel, ClientConnection)
    played.channel.inside = found
    rules = played.gateway.rules
    hosts = HostPatterns(("in.example",))
    played.gateway.rules = Rules(rules.pseudonym, rules.guarded, rules.auth, serves_plain, hosts)
    return played


def call(played: PlayedGateway, *fields: str, host: str = "in.example") -> None:
    """Ask with nothing but these fields."""
    played.send(request("POST", "/p/v1", JSON, *fields, body=BODY, host=host))


def sent(played: PlayedGateway) -> Fields:
    """Return the fields that the provider got."""
    fields: Fields = played.asked.fields
    return fields


@pytest.mark.parametrize(
    "host", ["in.example", "IN.Example", "in.example:443", "in.example.", "in.example:"]
)
def test_the_host_of_the_connect_is_served(host: str) -> None:
    """However its name is written."""
    played = inside()
    call(played, "X-Api-Key: key", host=host)
    assert played.asked.target == b"/base/v1"


@pytest.mark.parametrize(
    "host", ["other.example", "a.in.example", "in.example:8443", "127.0.0.1", ""]
)
def test_another_host_is_421(host: str) -> None:
    """The connection was asked for, and is trusted, for one host."""
    played = inside()
    call(played, "X-Api-Key: key", host=host)
    assert played.refusal() == (421, "wrong_host")
    assert not played.upstream.asked


def test_another_port_is_the_one_of_the_connect() -> None:
    """A client names it in Host, too, or leaves it out."""
    for host in ("in.example:8443", "in.example"):
        played = inside(port=8443)
        call(played, "X-Api-Key: key", host=host)
        assert played.upstream.asked


@pytest.mark.parametrize("name", ["other.example", "a.in.example"])
def test_another_name_in_tls_is_421(name: str) -> None:
    """Its client would trust the certificate of the host that it asked for; it names another."""
    played = inside(name=name)
    call(played, "X-Api-Key: key")
    assert played.refusal() == (421, "wrong_host")


def test_no_name_in_tls_is_served() -> None:
    """SNI is no duty."""
    played = inside(name=None)
    call(played, "X-Api-Key: key")
    assert played.upstream.asked


def test_no_host_is_400() -> None:
    """HTTP/1.0 can leave it out elsewhere."""
    played = inside()
    played.send(b"GET /p/v1 HTTP/1.0\r\nX-Api-Key: key\r\n\r\n")
    assert played.refusal() == (400, "bad_host")


@pytest.mark.parametrize("serves_plain", [True, False])
def test_a_request_in_the_clear_is_served_where_the_operator_allows_it(serves_plain: bool) -> None:
    """Elsewhere it is told the URL that works, and not to come again."""
    played = inside(secure=False, name=None, serves_plain=serves_plain)
    call(played, "X-Api-Key: key")
    if serves_plain:
        assert played.upstream.asked
        return
    status, fields, body = played.got()
    assert (status, fields[b"x-llmproxy-error"]) == (403, b"plain_http")
    assert fields[b"x-should-retry"] == b"false"
    assert b"https://in.example" in body


def test_without_a_key_on_the_connect_each_request_needs_one() -> None:
    """As on any connection."""
    played = inside()
    call(played)
    assert played.refusal() == (401, "no_key")


def test_with_a_key_on_the_connect_its_client_calls_and_keys_inside_are_dropped() -> None:
    """A sandboxed program has a placeholder, which does not cross."""
    played = inside(authorization=KEY_OF_C)
    call(played, "Authorization: Bearer placeholder", "X-Api-Key: sk-ant")
    assert not {b"authorization", b"x-api-key"} & {name for name, _ in sent(played)}
    played.response(200, (b"content-length", b"0")).end()
    assert played.trace().client == "c"


def test_a_key_that_is_gone_meanwhile_is_refused() -> None:
    """Each request on a kept connection is checked anew."""
    played = inside(authorization=b"Bearer gone")
    call(played)
    assert played.refusal() == (401, "unknown_key")


def test_an_upgrade_to_http_2_is_not_taken() -> None:
    """The request is served as it is (RFC 9110, section 7.8), and the provider hears of none."""
    played = inside()
    fields = "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk"
    call(played, "X-Api-Key: key", *fields)
    assert not {b"upgrade", b"http2-settings"} & {name for name, _ in sent(played)}
