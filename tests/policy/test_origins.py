"""Which pages may call, and what their browsers are told."""

from __future__ import annotations

import pytest

from llmproxy.errors import ProxyError
from llmproxy.policy.origins import for_page, page_fields, preflight_fields, refuse_page

APP = b"https://app.example"
ALLOWED = frozenset({"https://app.example"})
ASKED = {b"origin": APP, b"access-control-request-method": b"POST"}


@pytest.mark.parametrize("allowed", [ALLOWED, {"*"}])
@pytest.mark.parametrize("origin", [APP, b"HTTPS://App.Example"])
def test_a_preflight_grants_what_it_asks_for(origin: bytes, allowed: frozenset[str]) -> None:
    """The origin itself and not ``*``, the method, and the headers if it asks for some."""
    asked = {**ASKED, b"origin": origin}
    fields = dict(preflight_fields(b"OPTIONS", asked, allowed) or ())
    assert fields[b"access-control-allow-origin"] == origin
    assert fields[b"access-control-allow-methods"] == b"POST"
    assert b"access-control-allow-headers" not in fields
    assert b"access-control-allow-private-network" not in fields
    assert b"access-control-allow-credentials" not in fields
    more = {
        b"access-control-request-headers": b"authorization,x-stainless-lang",
        b"access-control-request-private-network": b"true",
    }
    fields = dict(preflight_fields(b"OPTIONS", {**asked, **more}, allowed) or ())
    assert fields[b"access-control-allow-headers"] == b"authorization,x-stainless-lang"
    assert fields[b"access-control-allow-private-network"] == b"true"


@pytest.mark.parametrize(
    ("method", "first", "allowed"),
    [
        (b"POST", ASKED, ALLOWED),
        (b"OPTIONS", {b"origin": APP}, ALLOWED),
        (b"OPTIONS", {b"access-control-request-method": b"POST"}, ALLOWED),
        (b"OPTIONS", ASKED, ()),
    ],
)
def test_other_requests_are_no_preflights_of_ours(
    method: bytes, first: dict[bytes, bytes], allowed: frozenset[str]
) -> None:
    """They go on as every request does."""
    assert preflight_fields(method, first, allowed) is None


OTHERS = [b"https://app.example:444", b"http://app.example", b"https://xapp.example", b"null", b""]


@pytest.mark.parametrize("origin", [*OTHERS, b"https://app.example.evil.example"])
def test_another_origin_is_refused(origin: bytes) -> None:
    """Its preflight is a 403, and no response is shown to it."""
    with pytest.raises(ProxyError) as caught:
        preflight_fields(b"OPTIONS", {**ASKED, b"origin": origin}, ALLOWED)
    assert (caught.value.status, caught.value.reason) == (403, "origin")
    assert page_fields({b"origin": origin}, ALLOWED) == [(b"vary", b"Origin")]
    with pytest.raises(ProxyError):
        refuse_page({b"origin": origin, b"host": b"llmproxy:8080"}, ALLOWED)


def test_every_response_of_a_route_with_origins_varies() -> None:
    """A cache must not show one page the response that another one got."""
    assert page_fields({}, ALLOWED) == [(b"vary", b"Origin")]
    assert page_fields({b"origin": APP}, ()) == []
    fields = page_fields({b"origin": APP}, ALLOWED)
    assert (b"access-control-allow-origin", APP) in fields
    assert (b"access-control-expose-headers", b"*") in fields


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (b"http://llmproxy:8080", b"llmproxy:8080"),
        (b"https://llmproxy", b"llmproxy:443"),
        (b"http://llmproxy", b"LLMproxy"),
        (b"http://[::1]:8080", b"[::1]:8080"),
    ],
)
def test_a_page_of_the_proxy_s_own_host_is_not_another_site_s(origin: bytes, host: bytes) -> None:
    """Nor is a request without an origin: no page sent it, or one that cannot change anything."""
    refuse_page({b"origin": origin, b"host": host}, ())
    refuse_page({b"host": host}, ())


@pytest.mark.parametrize(
    ("origin", "host"),
    [(b"http://llmproxy:8081", b"llmproxy:8080"), (b"null", b"null"), (b"http://", b"")],
)
def test_another_port_is_another_site(origin: bytes, host: bytes) -> None:
    """So are pages without an origin of their own."""
    with pytest.raises(ProxyError):
        refuse_page({b"origin": origin, b"host": host}, ())


def test_the_provider_s_word_on_origins_does_not_cross() -> None:
    """A browser takes no second ``Access-Control-Allow-Origin``."""
    theirs = [(b"access-control-allow-origin", b"*"), (b"vary", b"Accept"), (b"x", b"1")]
    ours = page_fields({b"origin": APP}, ALLOWED)
    assert for_page(theirs, ours) == [(b"vary", b"Accept"), (b"x", b"1"), *ours]
