"""Path and query cross byte for byte, and never leave their route (design 4 and 5)."""

from __future__ import annotations

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import ONE_ROUTE, LiveProxy, live_fixture
from tests.support.sockets import request

live = live_fixture(
    ONE_ROUTE
    + provider_table("based", url="URL/base/v1")
    + route_table("/based", "based")
    + route_table("/keep", "p", "strip = false")
    + route_table("/based/keep", "based", "strip = false")
)


ODD = [
    "/x",
    "/x?",
    "/x??",
    "/x?a=1&a=2&b",
    "/x?q=a+b%20c%2Bd",
    "/a%2Fb",
    "/a%2fb%41",
    "/a|b",
    "/{x}",
    "/<x>",
    '/"x"',
    "/x'y",
    "/x\\y",
    "/x^y`z",
    "/[1]",
    "/x;v=1,2",
    "/x:generate@now!$&'()*+,=",
    "//double//slash/",
    "/x/",
    "/~user",
    "/%zz%",
    "/%00",
    "/x?next=/../y&z=./",
    "/x?{y}|",
    "/.hidden/a..b/..x/x..",
    "/%252ehidden/a%252e%252eb/x",
]


@pytest.mark.parametrize("rest", ODD)
@pytest.mark.parametrize(
    ("prefix", "sent"),
    [("/p", ""), ("/keep", "/keep"), ("/based", "/base/v1"), ("/based/keep", None)],
)
def test_a_target_crosses_byte_for_byte(
    live: LiveProxy, prefix: str, sent: str | None, rest: str
) -> None:
    """Nothing is encoded, decoded, normalised or dropped; only the route's own path is cut off."""
    before = "/base/v1/based/keep" if sent is None else sent
    received, got = live.ask(request("GET", prefix + rest))
    assert received.target == (before + rest).encode()
    assert got.status == 200


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/p", "/"),
        ("/p?", "/?"),
        ("/p?x=1", "/?x=1"),
        ("/p/", "/"),
        ("/keep", "/keep"),
        ("/keep?x", "/keep?x"),
        ("/based", "/base/v1"),
        ("/based?x", "/base/v1?x"),
        ("/based/", "/base/v1/"),
    ],
)
def test_the_route_itself_is_a_target(live: LiveProxy, target: str, sent: str) -> None:
    """A request for the route's own path goes to the provider's own path."""
    received, _ = live.ask(request("GET", target))
    assert received.target == sent.encode()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
def test_a_method_crosses_as_it_is(live: LiveProxy, method: str) -> None:
    """All seven are served."""
    received, got = live.ask(request(method, "/p/x"))
    assert received.method == method.encode()
    assert got.status == 200


@pytest.mark.parametrize("target", ["/pp/x", "/P/x", "/%70/x", "/", "/keepsake", "//p/x"])
def test_a_route_is_whole_segments_of_the_raw_path(live: LiveProxy, target: str) -> None:
    """What only resembles a route's path is no route: 404."""
    got = live.reject(request("GET", target))
    assert (got.status, got.error) == (404, "no_route")


@pytest.mark.parametrize(
    "target",
    [
        "/p/../keep/x",
        "/p/..",
        "/p/.",
        "/p/./x",
        "/p/x/..",
        "/..",
        "/./p/x",
        "/p/%2e%2e/x",
        "/p/%2E./x",
        "/p/.%2e",
        "/p/%2e?x=1",
        "/p/..%2fx",
        "/p/a%2F..%2Fx",
        "/p/..%5cx",
        "/p/..\\x",
        "/p/..;/x",
        "/p/%2e%2e%3b/x",
        "/p/..%00",
        "/p/%252e%252e/x",
    ],
)
def test_dot_segments_are_rejected(live: LiveProxy, target: str) -> None:
    """They get a 400, encoded or not, as they would lead out of the route."""
    got = live.reject(request("GET", target))
    assert (got.status, got.error) == (400, "bad_path")


def test_the_record_has_the_path_and_never_the_query(live: LiveProxy) -> None:
    """A query may hold a key."""
    _, got = live.ask(request("GET", "/p/a%2Fb?key=very-secret"))
    record = live.trace(got)
    assert record["path"] == "/p/a%2Fb"
    assert "very-secret" not in str(record)
