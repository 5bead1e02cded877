"""What the HTTP client does to a request, and to the head of its response."""

from __future__ import annotations

import gzip
import http.cookiejar
import urllib.parse
from collections import Counter
from typing import Any

import hyperlink
import pytest
from pytest_twisted import ensureDeferred
from twisted.web import client

from tests.support.sockets import Provider, Wire, request
from tests.traps.asking import ask
from tests.traps.calls import OK, Responding
from tests.traps.parts import Body, Fields, Ports, Sender, Upstream
from tests.traps.waits import ended, thread, within


async def roundtrip(
    sender: Sender, method: str, target: str, fields: Fields, seconds: float, **more: Any
) -> tuple[Any, bytes, bool | None]:
    """Send a request; return its reply, the body, and whether that was whole."""
    reply = await within(seconds, sender.send(method, target, fields, **more).head)
    body = Body()
    reply.deliver(body)
    whole = await ended(body.ended, seconds)
    return reply, body.data, whole


@ensureDeferred
async def test_a_response_crosses(upstream: Upstream, patience: float) -> None:
    """A plain request gets its whole response, from our parts and from stock parts."""
    responding = Responding(OK)
    with Provider(responding) as provider:
        reply, data, whole = await roundtrip(upstream(provider.url), "GET", "/x", [], patience)
    assert (reply.code, data, whole) == (200, b"ok", True)
    assert [one.target for one in responding.requests] == [b"/x"]


@pytest.mark.trap("U4")
@ensureDeferred
async def test_a_cookie_set_for_one_tenant_is_not_sent_for_another(
    upstream: Upstream, patience: float
) -> None:
    """The first tenant gets its ``Set-Cookie``; the second tenant's request has no cookie."""
    responding = Responding(
        b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=a; Path=/\r\nContent-Length: 0\r\n\r\n"
    )
    with Provider(responding) as provider:
        sender = upstream(provider.url)
        reply, _, _ = await roundtrip(sender, "GET", "/x", [], patience, tenant="a")
        await roundtrip(sender, "GET", "/x", [], patience, tenant="b")
        await roundtrip(sender, "GET", "/x", [(b"cookie", b"own=b")], patience, tenant="b")
    assert (b"set-cookie", b"sid=a; Path=/") in reply.fields
    cookies = [one.values(b"cookie") for one in responding.requests]
    assert cookies == [[], [], [b"own=b"]]


@pytest.mark.trap("U5")
@pytest.mark.parametrize(
    "accepted", [[], [b"identity"], [b"br;q=1.0, *;q=0"]], ids=["none", "identity", "list"]
)
@ensureDeferred
async def test_the_accepted_encodings_of_a_client_reach_the_provider(
    upstream: Upstream, patience: float, accepted: list[bytes]
) -> None:
    """``Accept-Encoding`` crosses as it came, and none is made up."""
    responding = Responding(OK)
    fields = [(b"accept-encoding", value) for value in accepted]
    with Provider(responding) as provider:
        await roundtrip(upstream(provider.url), "GET", "/x", fields, patience)
    assert responding.requests[0].values(b"accept-encoding") == accepted


PACKED = gzip.compress(b"data: token\n\n" * 100)


@pytest.mark.trap("U5")
@pytest.mark.parametrize(
    "sent", [PACKED, PACKED[:10], PACKED[:-8]], ids=["whole", "head", "truncated"]
)
@ensureDeferred
async def test_an_encoded_body_crosses_byte_for_byte(
    upstream: Upstream, patience: float, sent: bytes
) -> None:
    """Bytes and ``Content-Encoding`` are the provider's, also where the gzip is truncated."""
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(sent)
    with Provider(Responding(head + sent)) as provider:
        reply, data, whole = await roundtrip(upstream(provider.url), "GET", "/x", [], patience)
    assert data == sent
    assert (b"content-encoding", b"gzip") in reply.fields
    assert whole


@pytest.mark.trap("U6")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@ensureDeferred
async def test_a_redirect_is_forwarded_and_not_followed(
    upstream: Upstream, patience: float, status: int
) -> None:
    """The client gets the redirect; the place in its ``Location`` never sees the credential."""
    elsewhere = Responding(OK)
    with Provider(elsewhere) as other:
        place = b"Location: %b/elsewhere\r\n" % other.url.encode()
        response = b"HTTP/1.1 %d Go\r\n%bContent-Length: 0\r\n\r\n" % (status, place)
        with Provider(Responding(response)) as provider:
            reply, _, _ = await roundtrip(
                upstream(provider.url), "GET", "/x", [(b"x-api-key", b"secret")], patience
            )
    assert elsewhere.requests == []
    assert reply.code == status
    assert (b"location", f"{other.url}/elsewhere".encode()) in reply.fields


@pytest.mark.trap("U11")
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
@ensureDeferred
async def test_a_request_that_died_with_its_connection_is_not_sent_again(
    upstream: Upstream, patience: float, method: str
) -> None:
    """A provider that reads a request on a kept connection and closes sees that request once."""
    targets: list[bytes] = []

    def script(wire: Wire) -> None:
        while (received := wire.read_request()).target == b"/first":
            targets.append(received.target)
            wire.send(OK)
        targets.append(received.target)

    with Provider(script) as provider:
        sender = upstream(provider.url)
        await roundtrip(sender, "GET", "/first", [], patience)
        failures: list[Any] = []
        head = sender.send(method, "/second", []).head.addErrback(failures.append)
        await within(patience, head)
        accepted = provider.accepted
    assert targets == [b"/first", b"/second"]
    assert accepted == 1
    assert len(failures) == 1


TARGETS = [
    "/v1/chat?",
    "/v1/{model}/x",
    '/v1/x?q="a|b"',
    "/v1/x?a=%7e&b=%7E&&c",
    "/v1//x/%2F/%41",
    "/v1/x;p=1?d=e==&f=?g",
    "/v1/x?q=[1]^`<>\\",
]


@pytest.mark.trap("U22")
@pytest.mark.parametrize("target", TARGETS)
@ensureDeferred
async def test_a_target_crosses_the_client_byte_for_byte(
    upstream: Upstream, patience: float, target: str
) -> None:
    """Path and query reach the provider as they were given to the HTTP client."""
    responding = Responding(OK)
    with Provider(responding) as provider:
        await roundtrip(upstream(provider.url), "GET", target, [], patience)
    assert responding.requests[0].target == target.encode()


@pytest.mark.trap("U22")
@pytest.mark.parametrize("target", TARGETS)
@ensureDeferred
async def test_a_target_crosses_the_proxy_byte_for_byte(
    proxy: Ports, patience: float, target: str
) -> None:
    """Path and query reach the provider as the client wrote them on the wire."""
    responding = Responding(OK)
    with Provider(responding) as provider:
        sent = request("GET", "/p" + target)
        assert (await thread(ask, proxy(provider.url), patience, sent)).body == b"ok"
    assert responding.requests[0].target == target.encode()


REQUESTS = 20


@pytest.mark.trap("U21")
@ensureDeferred
async def test_a_request_makes_no_url_and_no_cookie_and_no_decoder(
    upstream: Upstream, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hyperlink, the cookie jar and the decoders do nothing at all for twenty requests."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[f"{owner.__name__}.{name}"] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    # Every URL object of hyperlink's comes into being in one of these two.
    count(hyperlink.URL, "__init__")
    count(hyperlink.DecodedURL, "__init__")
    count(http.cookiejar.CookieJar, "add_cookie_header")
    count(http.cookiejar.CookieJar, "extract_cookies")
    count(client.GzipDecoder, "__init__")
    response = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n"
    with Provider(Responding(response)) as provider:
        sender = upstream(provider.url)
        await roundtrip(sender, "GET", "/warm", [], patience)
        calls.clear()
        for number in range(REQUESTS):
            await roundtrip(sender, "GET", f"/x/{number}?n={number}", [], patience)
    assert calls == {}


def splits() -> int:
    """Return how many different URLs the standard library has split so far."""
    split: Any = urllib.parse.urlsplit
    misses: int = split.cache_info().misses
    return misses


@pytest.mark.trap("U21")
@ensureDeferred
async def test_no_target_is_parsed(upstream: Upstream, patience: float) -> None:
    """Twenty different targets make the standard library split no URL that it has not split yet."""
    with Provider(Responding(OK)) as provider:
        sender = upstream(provider.url)
        await roundtrip(sender, "GET", "/warm", [], patience)
        before = splits()
        for number in range(REQUESTS):
            await roundtrip(sender, "GET", f"/x/{number}?n={number}", [], patience)
        assert splits() - before == 0
