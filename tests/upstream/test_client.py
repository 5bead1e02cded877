"""What treq must not do to a request or a response."""

from __future__ import annotations

import gzip
import queue

import pytest
import treq.client
import twisted.web.client
from pytest_twisted import ensureDeferred
from treq.client import HTTPClient

from llmproxy.errors import EndReason
from llmproxy.upstream.client import LeanClient, NoCookies, PreparedUrl
from llmproxy.upstream.response import Response
from tests.support.sockets import Provider, Wire
from tests.upstream.one_provider import (
    OK,
    RespondingProvider,
    failure_of,
    plain,
    take,
    upstream_of,
)


@ensureDeferred
async def test_treq_adds_nothing_to_a_request() -> None:
    """The provider gets our target and fields, byte for byte, behind its Host, and no cookie."""
    target = b'/a/../b%2f{x}|"?'
    fields = [(b"x-b", b"\xff"), (b"a", b""), (b"x-b", b"2")]
    cookie = plain(b"x", b"Set-Cookie: a=b; Path=/")
    async with upstream_of(RespondingProvider(cookie)) as (provider, upstream):
        for _ in range(2):
            await upstream.fetch("GET", target, fields)
            got = await take(provider.requests)
            assert (got.method, got.target) == (b"GET", target)
            assert got.fields == [(b"host", b"127.0.0.1:%d" % provider.port), *fields]


def test_only_four_names_of_treqs_request_mean_something_else() -> None:
    """The call is treq's own code, which asks for each by its name, and treq keeps its own."""
    names = {"CookieAgent", "ContentDecoderAgent", "_Response", "_merge_cookies"}
    theirs, ours = HTTPClient.request, LeanClient.request
    assert ours.__code__ is theirs.__code__
    assert names <= set(theirs.__code__.co_names)
    own, lean = vars(treq.client), ours.__globals__
    changed = {name for name in own if name != "__builtins__" and own[name] is not lean.get(name)}
    assert changed == names
    assert "_request_body" in vars(HTTPClient)  # which ours stands for
    assert "_request_body" in theirs.__code__.co_names
    given = object()
    assert [lean[name](given, None) for name in sorted(names)] == [given] * 4
    assert own["CookieAgent"] is twisted.web.client.CookieAgent


@ensureDeferred
@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br"])
async def test_encoded_bodies_are_not_decoded(coding: bytes) -> None:
    """Bytes and ``Content-Encoding`` are those of the provider, also where they do not match."""
    body = gzip.compress(b"text")
    encoded = plain(body, b"Content-Encoding: " + coding)
    async with upstream_of(RespondingProvider(encoded)) as (_, upstream):
        response, got = await upstream.fetch()
        assert (b"content-encoding", coding) in response.fields
        assert got == body


@ensureDeferred
@pytest.mark.parametrize("status", [b"301", b"302", b"303", b"307", b"308"])
async def test_redirects_are_not_followed(status: bytes) -> None:
    """The response is the redirect itself, and no other request is sent."""
    redirect = plain(b"", b"Location: /else", status=status + b" Gone")
    async with upstream_of(RespondingProvider(redirect)) as (provider, upstream):
        response, _ = await upstream.fetch("POST", b"/", [], b"{}")
        assert response.code == int(status)
        assert provider.requests.qsize() == 1


@ensureDeferred
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_nothing_is_sent_a_second_time(method: str) -> None:
    """A request that was lost with an old connection is not repeated behind our back."""
    seen: queue.Queue[bytes] = queue.Queue()

    def script(wire: Wire) -> None:
        seen.put(wire.read_request().method)
        wire.send(OK)
        seen.put(wire.read_request().method)

    async with upstream_of(Provider(script)) as (provider, upstream):
        await upstream.fetch(method)
        error = await failure_of(upstream.send(method))
        assert error.end is EndReason.UPSTREAM_BROKEN
        assert (seen.qsize(), provider.accepted) == (2, 1)


@ensureDeferred
async def test_a_response_is_forwarded_before_its_body() -> None:
    """The head is a response as soon as it has come, whatever comes later."""
    head = b"HTTP/1.1 200 OK\r\n\r\n"
    async with upstream_of(RespondingProvider(head)) as (_, upstream):
        response = await upstream.send()
        assert isinstance(response, Response)
        assert upstream.counts() == {
            ("p", "idle"): 0,
            ("p", "active"): 1,
            ("p", "connecting"): 0,
        }
        response.abort()


def test_the_jar_neither_takes_nor_gives() -> None:
    """Whatever treq asks of the cookie jar, the jar stays empty."""
    jar = NoCookies()
    jar.extract_cookies(object(), object())
    jar.add_cookie_header(object())
    jar.set_cookie(object())  # type: ignore[arg-type]  # whatever it is

    assert not list(jar)


def test_a_prepared_url_is_itself() -> None:
    """A prepared URL gives its URI and its text without parsing and without a change."""
    url = PreparedUrl.prepare("https://p.example:8443/")

    assert url.to_uri() is url
    assert url.to_text() == "https://p.example:8443/"
