"""What of a client's header reaches the provider, and what is added to it (design 5)."""

from __future__ import annotations

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import ONE_ROUTE, STREAM_BODY, LiveProxy, live_fixture, post
from tests.support.scripts import OK, Turn
from tests.support.sockets import Wire, request

DEFAULTS = 'headers = { anthropic-version = "2023-06-01", X-Default = "d" }'

live = live_fixture(
    ONE_ROUTE
    + provider_table("anthropic", DEFAULTS, dialect="anthropic")
    + provider_table("ollama", dialect="ollama")
    + provider_table("raw", dialect="raw")
    + route_table("/a", "anthropic")
    + route_table("/o", "ollama")
    + route_table("/raw", "raw")
    + route_table("/enc", "p", 'accept_encoding = "pass"'),
    proxy='anonymous = true\nvia = "Hop"',
)


def test_fields_cross_in_order_with_their_values_unchanged(live: LiveProxy) -> None:
    """Everything end-to-end arrives byte for byte; only what is ours is added behind it."""
    got, response = live.ask(
        request(
            "GET",
            "/p/x",
            "User-Agent: test/1.0 (odd; \xe4\xf6)",
            "x-dup: 1",
            "Accept: */*",
            "X-Dup:2",
            "X-Spaces: a  b\tc",
            "X-Comma: a,b , c",
            "X-Empty:",
            "Cookie: a=1; b=2",
            "OpenAI-Organization: org",
            "anthropic-beta: x",
            "x-stainless-lang: python",
            "session_id: 1",
            "Accept-Encoding: gzip, br",
            "X-Session-Id: s",
            "x-dup: 3",
        )
    )
    (name,) = response.values(b"x-llmproxy-request-id")
    assert got.fields == [
        (b"host", f"127.0.0.1:{live.provider.port}".encode()),
        (b"user-agent", b"test/1.0 (odd; \xe4\xf6)"),
        (b"x-dup", b"1"),
        (b"accept", b"*/*"),
        (b"x-dup", b"2"),
        (b"x-spaces", b"a  b\tc"),
        (b"x-comma", b"a,b , c"),
        (b"x-empty", b""),
        (b"cookie", b"a=1; b=2"),
        (b"openai-organization", b"org"),
        (b"anthropic-beta", b"x"),
        (b"x-stainless-lang", b"python"),
        (b"session_id", b"1"),
        (b"accept-encoding", b"gzip, br"),
        (b"x-session-id", b"s"),
        (b"x-dup", b"3"),
        (b"via", b"1.1 Hop"),
        (b"x-request-id", name),
    ]


@pytest.mark.parametrize(
    "field",
    [
        "Keep-Alive: timeout=5",
        "Proxy-Connection: keep-alive",
        "Proxy-Authorization: Basic eA==",
        "Proxy-Whatever: x",
        "TE: trailers",
        "Trailer: x-end",
        "Upgrade: h2c",
        "X-Forwarded-For: 10.0.0.1",
        "X-Forwarded-Anything: x",
        "Forwarded: for=10.0.0.1",
        "x-llmproxy-request-id: forged",
        "X-LLMProxy-Other: x",
    ],
)
def test_hop_by_hop_and_owned_fields_stay_here(live: LiveProxy, field: str) -> None:
    """They speak of this hop, or would speak for the proxy."""
    got, _ = live.ask(request("GET", "/p/x", field, "X-Kept: 1"))
    assert got.values(field.partition(":")[0].lower().encode()) == []
    assert got.values(b"x-kept") == [b"1"]
    assert got.values(b"connection") == []


def test_every_connection_line_nominates_fields_that_stay_here(live: LiveProxy) -> None:
    """A name on any Connection line is hop-by-hop, in whatever case and place."""
    got, _ = live.ask(
        request(
            "GET",
            "/p/x",
            "Connection: X-One, keep-alive",
            "x-one: 1",
            "X-Two: 2",
            "X-Three: 3",
            "connection:  x-tWO ,",
            "X-Kept: 1",
            "X-ONE: again",
        )
    )
    names = [name for name, _ in got.fields]
    assert names == [b"host", b"x-three", b"x-kept", b"via", b"x-request-id"]


def test_via_is_appended_to_and_a_loop_is_rejected(live: LiveProxy) -> None:
    """Earlier hops stay in order before ours; a request that has our name came here before."""
    got, _ = live.ask(request("GET", "/p/x", "Via: 1.0 first, 1.1 second", "Via: 2 hopper"))
    assert b", ".join(got.values(b"via")) == b"1.0 first, 1.1 second, 2 hopper, 1.1 Hop"
    for value in ("1.1 hop", "1.0 first, 1.1 HOP (comment)", "HTTP/1.1 Hop, 1.1 last"):
        refused = live.reject(request("GET", "/p/x", f"Via: {value}"))
        assert (refused.status, refused.error) == (508, "loop")


def test_a_request_id_of_the_clients_is_kept(live: LiveProxy) -> None:
    """Ours is added only where there is none; the record has both."""
    got, response = live.ask(request("GET", "/p/x", "X-Request-Id: mine"))
    assert got.values(b"x-request-id") == [b"mine"]
    record = live.trace(response)
    assert record["client_request_id"] == "mine"
    assert record["id"] != "mine"


@pytest.mark.parametrize(
    "name",
    ["x_api_key", "X_Forwarded_For", "x_llmproxy_key", "Transfer_Encoding", "api_key", "proxy_x"],
)
def test_a_disguised_name_is_rejected(live: LiveProxy, name: str) -> None:
    """A server that takes `_` for `-` must not see what was dropped."""
    got = live.reject(request("GET", "/p/x", f"{name}: secret-value"))
    assert (got.status, got.error) == (400, "bad_header")
    assert b"secret-value" not in got.body


def test_a_websocket_handshake_is_rejected_with_a_reason(live: LiveProxy) -> None:
    """426, and a sentence; another upgrade is dropped, and the request served."""
    got = live.reject(request("GET", "/p/x", "Connection: Upgrade", "Upgrade: websocket"))
    assert got.status == 426
    assert got.values(b"upgrade") == [b"HTTP/1.1"]
    assert b"close" in got.values(b"connection")
    assert "WebSocket" in got.json()["error"]["message"]
    received, got = live.ask(request("GET", "/p/x", "Connection: Upgrade", "Upgrade: h2c"))
    assert got.status == 200
    assert received.values(b"upgrade") == []


def test_a_providers_own_headers_are_defaults(live: LiveProxy) -> None:
    """They are added where the client sent none, and give way to the client's."""
    got, _ = live.ask(post("/a/v1/messages"))
    assert got.values(b"anthropic-version") == [b"2023-06-01"]
    assert got.values(b"x-default") == [b"d"]
    got, _ = live.ask(post("/a/v1/messages", STREAM_BODY, "Anthropic-Version: 2024"))
    assert got.values(b"anthropic-version") == [b"2024"]
    assert got.values(b"x-default") == [b"d"]


@pytest.mark.parametrize(
    ("target", "body", "accept", "encoding"),
    [
        ("/p/x", STREAM_BODY, [b"text/event-stream"], [b"identity"]),
        ("/a/x", STREAM_BODY, [b"text/event-stream"], [b"identity"]),
        ("/o/api/x", STREAM_BODY, [], [b"identity"]),
        ("/o/api/chat", b'{"model":"m"}', [], [b"identity"]),
        ("/o/api/chat", b'{"model":"m","stream":false}', [], []),
        ("/raw/x", STREAM_BODY, [], [b"identity"]),
        ("/p/x", b'{"model":"m","stream":false}', [], []),
        ("/p/x", b'{"model":"m"}', [], []),
        ("/enc/x", STREAM_BODY, [b"text/event-stream"], []),
    ],
)
def test_accept_is_filled_in_for_a_stream(
    live: LiveProxy, target: str, body: bytes, accept: list[bytes], encoding: list[bytes]
) -> None:
    """A stream is asked for by type where the dialect wants that, and unencoded."""
    got, _ = live.ask(post(target, body))
    assert got.values(b"accept") == accept
    assert got.values(b"accept-encoding") == encoding


def test_a_clients_own_accept_is_left_alone(live: LiveProxy) -> None:
    """Accept crosses as it is; Accept-Encoding gives way for a stream, unless the route passes."""
    own = ("Accept: application/json", "Accept-Encoding: gzip;q=1.0,  br")
    got, _ = live.ask(post("/p/x", STREAM_BODY, *own))
    assert got.values(b"accept") == [b"application/json"]
    assert got.values(b"accept-encoding") == [b"identity"]
    got, _ = live.ask(post("/enc/x", STREAM_BODY, *own))
    assert got.values(b"accept") == [b"application/json"]
    assert got.values(b"accept-encoding") == [b"gzip;q=1.0,  br"]
    got, _ = live.ask(post("/p/x", b'{"model":"m"}', *own))
    assert got.values(b"accept-encoding") == [b"gzip;q=1.0,  br"]


def test_a_body_is_framed_anew_and_only_once(live: LiveProxy) -> None:
    """A chunked upload arrives counted, and its trailers do not arrive."""
    head = request("POST", "/p/x", "Transfer-Encoding: chunked", "Content-Type: text/plain")
    got, _ = live.ask(head + b"3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nx-end: secret\r\n\r\n")
    assert got.body == b"abcde"
    assert got.values(b"content-length") == [b"5"]
    assert got.values(b"transfer-encoding") == []
    assert got.values(b"x-end") == []


def test_an_expectation_is_met_here_and_not_sent_on(live: LiveProxy) -> None:
    """The client gets a 100 before it has sent a byte of its body."""
    turn = Turn()
    body = b"0123456789"

    def script(wire: Wire) -> None:
        received = wire.read_request()
        assert received.values(b"expect") == []
        assert received.body == body
        wire.send(OK)
        turn.give()

    live.script = script
    with live.connect() as client:
        length = f"Content-Length: {len(body)}"
        client.send(request("POST", "/p/x", "Expect: 100-continue", length))
        first, fields = client.read_head()
        assert first.startswith(b"HTTP/1.1 100")
        assert fields == []
        client.send(body)
        assert client.read_head()[0] == b"HTTP/1.1 200 OK"
    turn.take()


def test_an_http_1_0_client_is_served_the_same_way(live: LiveProxy) -> None:
    """The provider is asked in HTTP/1.1 with the same fields, and the connection ends after it."""
    got, response = live.ask(request("GET", "/p/x", "X-Kept: 1", version="1.0"))
    assert got.values(b"x-kept") == [b"1"]
    assert got.values(b"host") == [f"127.0.0.1:{live.provider.port}".encode()]
    assert response.body == b"ok"
