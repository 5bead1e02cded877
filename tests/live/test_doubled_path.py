"""A provider's URL that ends with what SDKs begin with: the 404 says so, and stays as it came."""

from __future__ import annotations

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import LiveProxy, live_fixture, post, response
from tests.support.scripts import OK

CONFIG = "".join(
    [
        provider_table("twice", url="URL/openai/v1"),
        provider_table("root"),
        route_table("/twice", "twice"),
        route_table("/v1", "twice"),
        route_table("/root", "root"),
    ]
)
NOT_FOUND = response(404, "x-llmproxy-hint: theirs", "x-a: b", body=b'{"detail":"Not Found"}')
HINT = b"x-llmproxy-hint"

live = live_fixture(CONFIG)


def test_a_404_to_a_doubled_path_has_a_hint(live: LiveProxy) -> None:
    """The caller finds it in a header and the operator in the log; the body is the provider's."""
    received, got = live.ask(post("/twice/v1/chat/completions"), NOT_FOUND)
    assert received.target == b"/openai/v1/v1/chat/completions"
    assert (got.status, got.body, got.values(b"x-a")) == (404, b'{"detail":"Not Found"}', [b"b"])
    (hint,) = got.values(HINT)
    assert hint.startswith(b"/v1 stands twice in the path that the provider was asked for")
    assert b"openai" not in hint  # where the provider is found is not the caller's affair
    line = live.daemon.wait_log("upstream_refused", id=live.trace(got)["id"])
    assert "the url of provider twice ends with /v1" in line["detail"]
    assert line["status"] == 404


@pytest.mark.parametrize(
    ("target", "raw"),
    [
        ("/twice/v1/models", OK),
        ("/twice/v1/models", response(400)),
        ("/twice/v10/models", NOT_FOUND),
        ("/twice/models", NOT_FOUND),
        ("/twice", NOT_FOUND),
        ("/v1/models", NOT_FOUND),
        ("/root/v1/v1", NOT_FOUND),
    ],
)
def test_any_other_response_has_none(live: LiveProxy, target: str, raw: bytes) -> None:
    """The segment is not there twice by the URL, or the provider knew the path."""
    _, got = live.ask(post(target), raw)
    assert got.values(HINT) == []
    ended = live.daemon.wait_log("", id=live.trace(got)["id"])
    assert "detail" not in ended
