"""A route asks for the token counts of streams where its callers do not."""

from __future__ import annotations

import pytest

from tests.support.live_proxy import LiveProxy, live_fixture, post

CONFIG = """
[providers.openai]
url = "URL"
dialect = "openai"

[providers.anthropic]
url = "URL"
dialect = "anthropic"

[[routes]]
path = "/asked"
providers = ["openai"]

[[routes]]
path = "/inject"
providers = ["openai"]
include_usage = "inject"

[[routes]]
path = "/renamed"
providers = ["openai"]
include_usage = "inject"
override = { openai = { model = "another" } }

[[routes]]
path = "/anthropic"
providers = ["anthropic"]
include_usage = "inject"
"""
BODY = b'{ "model":"m" , "stream" : true,\n"x":1.0e2 }'
COUNTED = b'{ "model":"m" , "stream" : true,"stream_options":{"include_usage":true},\n"x":1.0e2 }'


live = live_fixture(CONFIG)


@pytest.mark.parametrize(
    ("target", "before", "after"),
    [
        ("/inject/v1/chat/completions", BODY, COUNTED),
        ("/inject/v1/completions?a=b", BODY, COUNTED),
        ("/renamed/v1/completions", BODY, COUNTED.replace(b'"m"', b'"another"')),
        ("/inject/v1/completions", COUNTED, COUNTED),
        ("/inject/v1/completions", b'{"stream":false}', b'{"stream":false}'),
        ("/inject/v1/responses", BODY, BODY),
        ("/anthropic/v1/chat/completions", BODY, BODY),
        ("/asked/v1/chat/completions", BODY, BODY),
    ],
)
def test_body_gains_the_option_where_the_route_says_so(
    live: LiveProxy, target: str, before: bytes, after: bytes
) -> None:
    """The provider gets the option and its length, and every other byte as it was."""
    received, _ = live.ask(post(target, before))
    assert received.body == after
    assert received.values(b"content-length") == [b"%d" % len(after)]


def test_encoded_body_stays(live: LiveProxy) -> None:
    """What cannot be looked into crosses as it is."""
    target = "/inject/v1/chat/completions"
    received, _ = live.ask(post(target, BODY, "Content-Encoding: x-none"))
    assert received.body == BODY
