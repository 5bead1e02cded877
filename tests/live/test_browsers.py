"""What web pages may do, as a browser's requests look on the wire (CORS)."""

from __future__ import annotations

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import LiveProxy, Response, client_config, live_fixture
from tests.support.scripts import OK
from tests.support.sockets import request

KEY = "team-client-key"
APP = "https://app.example"
ORIGINS = f'allowed_origins = ["{APP}"]\n'
ROUTES = (
    provider_table("p", "KEYS", url="URL", dialect="openai")
    + provider_table("own", "KEYS", "pass_credential = true", url="URL", dialect="openai")
    + route_table("/open", "p", ORIGINS)
    + route_table("/any", "p", 'allowed_origins = ["*"]\n')
    + route_table("/closed", "p")
    + route_table("/own", "own")
    + route_table("/two", "p", ORIGINS, 'name = "two-a"', 'models = ["a"]')
    + route_table("/two", "p", 'name = "two-b"', 'models = ["b"]')
    + route_table("/mixed", "own", 'name = "mixed-a"', 'models = ["a"]')
    + route_table("/mixed", "p", 'name = "mixed-b"', 'models = ["b"]')
)
live = live_fixture(ROUTES + client_config("team", KEY))
keyed = live_fixture(ROUTES + client_config("team", KEY), proxy="")

PREFLIGHT = (f"Origin: {APP}", "Access-Control-Request-Method: POST")
THEIRS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\nVary: Accept\r\n"
    b"Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\n\r\nok"
)


def granted(got: Response) -> list[bytes]:
    """Return every origin that a response grants."""
    return got.values(b"access-control-allow-origin")


@pytest.mark.parametrize("name", ["/open", "/any"])
def test_a_preflight_needs_no_key(keyed: LiveProxy, name: str) -> None:
    """A browser shows none; the provider is not asked, and the record says what it was."""
    headers = "authorization,content-type,x-stainless-lang"
    fields = (*PREFLIGHT, f"Access-Control-Request-Headers: {headers}")
    got = keyed.reject(request("OPTIONS", f"{name}/v1/chat/completions", *fields))
    assert (got.status, got.body) == (204, b"")
    assert granted(got) == [APP.encode()]
    assert got.values(b"access-control-allow-methods") == [b"POST"]
    assert got.values(b"access-control-allow-headers") == [headers.encode()]
    assert got.values(b"content-length") == got.values(b"transfer-encoding") == []


@pytest.mark.parametrize(
    ("name", "origin", "status"), [("/open", "https://evil.example", 403), ("/closed", APP, 401)]
)
def test_a_preflight_of_another_page_is_refused(
    keyed: LiveProxy, name: str, origin: str, status: int
) -> None:
    """Nothing is granted; where no page may call, a preflight is a request like any other."""
    fields = (f"Origin: {origin}", "Access-Control-Request-Method: POST")
    got = keyed.reject(request("OPTIONS", f"{name}/v1/x", *fields))
    assert got.status == status
    assert granted(got) == []


def test_a_preflight_cannot_leave_its_route(keyed: LiveProxy) -> None:
    """What no request may ask for, a preflight may not either."""
    got = keyed.reject(request("OPTIONS", "/open/../x", *PREFLIGHT))
    assert (got.status, got.error) == (400, "bad_path")


def test_a_page_reads_its_response(keyed: LiveProxy) -> None:
    """The origin is ours to grant: the provider neither gets it nor has a say."""
    fields = (f"Origin: {APP}", f"Authorization: Bearer {KEY}")
    received, got = keyed.ask(request("GET", "/open/v1/models", *fields), THEIRS)
    assert received.values(b"origin") == []
    assert (got.status, granted(got)) == (200, [APP.encode()])
    assert got.values(b"access-control-expose-headers") == [b"*"]
    assert got.values(b"access-control-allow-credentials") == []
    assert got.values(b"vary") == [b"Accept", b"Origin"]


def test_a_page_reads_our_errors(keyed: LiveProxy) -> None:
    """Also those that come before anybody is known."""
    for fields in ((), ("Authorization: Bearer wrong",)):
        got = keyed.reject(request("GET", "/open/v1/models", f"Origin: {APP}", *fields))
        assert (got.status, granted(got)) == (401, [APP.encode()])
        assert len(got.values(b"x-llmproxy-request-id")) == 1
    got = keyed.reject(request("PATCHED", "/open/v1/models", f"Origin: {APP}"))
    assert (got.status, granted(got)) == (405, [APP.encode()])


def test_other_programs_see_nothing_but_vary(keyed: LiveProxy) -> None:
    """A key is good whatever the origin; a browser keeps the response from the page."""
    for fields in ((), ("Origin: https://evil.example",), ("Origin: vscode-webview://1a",)):
        key = f"Authorization: Bearer {KEY}"
        _, got = keyed.ask(request("GET", "/open/v1/models", key, *fields), THEIRS)
        assert (got.status, granted(got)) == (200, [])
        assert b"Origin" in got.values(b"vary")
        received, got = keyed.ask(request("GET", "/closed/v1/models", key, *fields), THEIRS)
        assert granted(got) == [b"*"]
        assert len(received.values(b"origin")) == len(fields)


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
@pytest.mark.parametrize("name", ["/open", "/closed"])
@pytest.mark.parametrize("method", ["POST", "OPTIONS", "GET"])
def test_a_stranger_s_page_cannot_use_our_credential(
    live: LiveProxy, method: str, name: str, origin: str
) -> None:
    """A form of any page can send ``text/plain``, without a preflight, to whoever needs no key."""
    body = b'{"model":"m"}' if method == "POST" else b""
    fields = (f"Origin: {origin}", "Content-Type: text/plain", f"Content-Length: {len(body)}")
    got = live.reject(request(method, f"{name}/v1/chat/completions", *fields) + body)
    assert (got.status, got.error) == (403, "origin")
    assert granted(got) == []


def test_anonymous_pages_that_may_call(live: LiveProxy) -> None:
    """Those that are listed, any where any is, the proxy's own, and where nothing of ours is."""
    own = f"http://127.0.0.1:{live.daemon.port}"
    evil = "https://evil.example"
    calls = (("/open", APP), ("/any", evil), ("/closed", own), ("/own", evil))
    for name, origin in calls:
        fields = (f"Origin: {origin}", f"Host: 127.0.0.1:{live.daemon.port}")
        sent = f"GET {name}/v1/models HTTP/1.1\r\n" + "\r\n".join(fields) + "\r\n\r\n"
        _, got = live.ask(sent.encode(), OK)
        assert got.status == 200, (name, got)


def test_the_route_of_a_request_decides(live: LiveProxy) -> None:
    """Routes of one path may have different origins: the model says which route it is."""
    for model, granted_to in (("a", [APP.encode()]), ("b", [])):
        body = b'{"model":"%b"}' % model.encode()
        fields = (f"Origin: {APP}", f"X-Api-Key: {KEY}", "Content-Type: application/json")
        sent = request("POST", "/two/v1/x", *fields, f"Content-Length: {len(body)}") + body
        _, got = live.ask(sent)
        assert granted(got) == granted_to
    body = b'{"model":"b"}'
    fields = (f"Origin: {APP}", "Content-Type: application/json", f"Content-Length: {len(body)}")
    got = live.reject(request("POST", "/two/v1/x", *fields) + body)
    assert (got.status, got.error) == (403, "origin")


def test_a_route_with_our_credential_is_guarded_beside_one_without(live: LiveProxy) -> None:
    """Routes of one path may differ in whose credential they send, too."""
    for model, status in (("a", 200), ("b", 403)):
        body = b'{"model":"%b"}' % model.encode()
        fields = ("Origin: https://evil.example", "Content-Type: text/plain")
        sent = request("POST", "/mixed/v1/x", *fields, f"Content-Length: {len(body)}") + body
        if status == 200:
            _, got = live.ask(sent)
        else:
            got = live.reject(sent)
        assert got.status == status
