"""What of a provider's response reaches the client, and the one field that is added (design 5)."""

from __future__ import annotations

import gzip

import brotli
import pytest

from tests.support.live_proxy import (
    LiveProxy,
    chunked_response,
    live_fixture,
    read_response,
    response,
)
from tests.support.scripts import LAST, OK
from tests.support.sockets import Wire, request

OURS = [b"x-llmproxy-request-id", b"x-llmproxy-provider", b"x-llmproxy-attempts"]
"""What the proxy adds to a response."""

live = live_fixture()


def test_fields_cross_in_order_with_their_values_unchanged(live: LiveProxy) -> None:
    """The provider's own fields arrive byte for byte, with our id behind them and nothing else."""
    _, got = live.ask(
        request("GET", "/p/x"),
        response(
            429,
            "Server: provider/1",
            "Date: Fri, 01 Jan 2038 00:00:00 GMT",
            "Content-Type: application/json",
            "x-request-id: req_1",
            "Request-Id: req_2",
            "Retry-After: 7",
            "X-RateLimit-Remaining-Requests: 0",
            "anthropic-ratelimit-tokens-limit: 1",
            "openai-processing-ms: 12",
            "Set-Cookie: a=1; Path=/",
            "Set-Cookie: b=2",
            "X-Odd: \xe4  b\tc",
            "X-Empty:",
            "x-dup: 1",
            "X-Dup: 2",
            "x-should-retry: true",
            body=b'{"error":{}}',
        ),
    )
    ours = [got.fields.pop()[0] for _ in OURS]
    assert ours[::-1] == OURS
    assert got.status == 429
    assert got.fields == [
        (b"server", b"provider/1"),
        (b"date", b"Fri, 01 Jan 2038 00:00:00 GMT"),
        (b"content-type", b"application/json"),
        (b"x-request-id", b"req_1"),
        (b"request-id", b"req_2"),
        (b"retry-after", b"7"),
        (b"x-ratelimit-remaining-requests", b"0"),
        (b"anthropic-ratelimit-tokens-limit", b"1"),
        (b"openai-processing-ms", b"12"),
        (b"set-cookie", b"a=1; Path=/"),
        (b"set-cookie", b"b=2"),
        (b"x-odd", b"\xe4  b\tc"),
        (b"x-empty", b""),
        (b"x-dup", b"1"),
        (b"x-dup", b"2"),
        (b"x-should-retry", b"true"),
        (b"content-length", b"12"),
    ]
    assert got.body == b'{"error":{}}'


def test_nothing_of_our_own_server_leaks_in(live: LiveProxy) -> None:
    """A bare response stays bare: no Server, no Date, no type that nobody gave."""
    _, got = live.ask(request("GET", "/p/x"))
    assert [name for name, _ in got.fields] == [b"content-length", *OURS]


def test_hop_by_hop_fields_and_those_of_the_providers_host_stay_here(live: LiveProxy) -> None:
    """Nominees of Connection, hop-by-hop fields, Alt-Svc, HSTS and forged fields are dropped."""
    _, got = live.ask(
        request("GET", "/p/x"),
        response(
            200,
            "Connection: X-One",
            "x-one: 1",
            "Keep-Alive: timeout=5",
            "Proxy-Authenticate: Basic",
            "Trailer: x-end",
            "TE: trailers",
            "Upgrade: h2c",
            "Alt-Svc: h3=:443",
            "Strict-Transport-Security: max-age=1",
            "X-LLMProxy-Error: forged",
            "x-llmproxy-request-id: forged",
            "X-Kept: 1",
        ),
    )
    names = [name for name, _ in got.fields]
    assert names == [b"x-kept", b"content-length", *OURS]
    assert got.values(b"x-llmproxy-request-id") != [b"forged"]


STATUSES = "200 201 202 206 207 299 300 400 401 402 403 404 418 429 500 503 529 599"
REDIRECTS = "301 302 303 307 308"


@pytest.mark.parametrize("status", [*map(int, f"{STATUSES} {REDIRECTS}".split())])
def test_a_status_is_exact(live: LiveProxy, status: int) -> None:
    """Its body follows it; an error is recorded as the provider's, and no redirect is followed."""
    before = live.provider.accepted
    location = f"{live.provider.url}/elsewhere"
    raw = response(status, f"Location: {location}", body=b"text")
    _, got = live.ask(request("GET", "/p/x"), raw)
    assert (got.status, got.body, got.error) == (status, b"text", None)
    assert got.values(b"location") == [location.encode()]
    assert live.provider.accepted == before + 1
    record = live.trace(got)
    assert (record["status"], record["error"]) == (status, None)
    assert record["end_reason"] == ("complete" if status < 400 else "upstream_refused")


@pytest.mark.parametrize("coding", ["gzip", "br"])
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_an_encoded_body_is_exact(live: LiveProxy, kind: str, coding: str) -> None:
    """The coding and the bytes under it are forwarded untouched."""
    text = b'data: {"text":"hello hello hello"}\n\n' * 50
    body = gzip.compress(text, mtime=0) if coding == "gzip" else brotli.compress(text)
    reply = chunked_response(body[:7], body[7:], kind=kind).replace(
        b"Connection:", f"Content-Encoding: {coding}\r\nConnection:".encode()
    )
    _, got = live.ask(request("GET", "/p/x", "Accept-Encoding: gzip, br"), reply)
    assert got.values(b"content-encoding") == [coding.encode()]
    assert got.body == body


def test_a_cookie_is_not_remembered(live: LiveProxy) -> None:
    """What one caller is given goes out on nobody's next request."""
    live.ask(request("GET", "/p/x"), response(200, "Set-Cookie: tenant=a; Path=/"))
    got, _ = live.ask(request("GET", "/p/x"))
    assert got.values(b"cookie") == []


def test_a_response_to_head_has_a_length_and_no_body(live: LiveProxy) -> None:
    """The connection serves the next request at once."""

    def script(wire: Wire) -> None:
        assert wire.read_request().method == b"HEAD"
        wire.send(response(200, "Content-Type: text/plain")[:-4].replace(b": 0", b": 1234"))
        wire.send(b"\r\n\r\n")

    live.script = script
    with live.connect() as client:
        client.send(request("HEAD", "/p/x"))
        got = read_response(client, bodiless=True)
        assert got.status == 200
        assert got.values(b"content-length") == [b"1234"]
        live.reply(OK)
        client.send(request("GET", "/p/x"))
        assert read_response(client).body == b"ok"


@pytest.mark.parametrize("status", [204, 304])
def test_a_response_without_a_body_has_no_framing_added(live: LiveProxy, status: int) -> None:
    """204 and 304 end with their head, and the connection goes on."""
    live.reply(b"HTTP/1.1 %d\r\nETag: x\r\nConnection: close\r\n\r\n" % status)
    with live.connect() as client:
        client.send(request("GET", "/p/x"))
        got = read_response(client)
        assert got.status == status
        assert [name for name, _ in got.fields] == [b"etag", *OURS]
        live.reply(OK)
        client.send(request("GET", "/p/x"))
        assert read_response(client).body == b"ok"


def test_interim_responses_are_not_forwarded(live: LiveProxy) -> None:
    """100, 102 and 103 pass by; the final response is the first that the client sees."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    _, got = live.ask(request("GET", "/p/x"), interim + b"HTTP/1.1 102 P\r\n\r\n" + OK)
    assert got.status == 200
    assert got.values(b"link") == []


def test_trailers_do_not_cross(live: LiveProxy) -> None:
    """The body ends with the plain last chunk."""
    reply = chunked_response(b"data: 1\n\n")[: -len(LAST)] + b"0\r\nx-end: 1\r\n\r\n"

    live.reply(reply)
    with live.begin("/p/x", b"{}", "Connection: close") as client:
        assert client.wait_closed() == "fin"
        assert client.buffer.endswith(b"\r\n" + LAST)
        assert b"x-end" not in client.buffer
