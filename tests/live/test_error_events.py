"""`error_event`: one event in the dialect's own shape before a broken stream is cut (design 6).

Where no event can be added (a length, an encoding, JSON), and what an HTTP/1.0 client gets, is in
``test_curl.py``.
"""

from __future__ import annotations

import json

import pytest

from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import LiveProxy, assert_settles, live_fixture, trace_of
from tests.support.scripts import SSE, event
from tests.support.sockets import chunked

NDJSON = SSE.replace(b"text/event-stream", b"application/x-ndjson")

live = live_fixture(
    "".join(
        provider_table(name, dialect=name)
        + route_table(f"/{name}", name, "error_event = true")
        + route_table(f"/quiet/{name}", name)
        for name in ("openai", "anthropic", "ollama")
    )
)


def broken(live: LiveProxy, path: str, head: bytes, *pieces: bytes) -> bytes:
    """Let the provider send these chunks and drop; return the body as the client got it.

    A last chunk would fail the test.
    """
    live.reply(head, chunked(*pieces))
    with live.begin(path) as client:
        client.wait_closed()
        raw, body = client.buffer, b""
    assert_settles(live.daemon)
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        assert int(size, 16) > 0, "a broken body ends as if it were whole"
        body += rest[: int(size, 16)]
        raw = rest[int(size, 16) + 2 :]
    return body


def test_an_openai_stream_ends_with_an_event_of_its_shape(live: LiveProxy) -> None:
    """It is a data line with an error object, as its SDK looks for."""
    added = broken(live, "/openai/x", SSE, event(0)).removeprefix(event(0))
    assert (added[:6], added[-2:]) == (b"data: ", b"\n\n")
    error = json.loads(added[6:])["error"]
    assert error["code"] == "upstream_broken"
    assert set(error) == {"message", "type", "code", "param"}
    assert trace_of(live.daemon, path="/openai/x")["end_reason"] == "upstream_broken"


@pytest.mark.parametrize("name", ["openai", "ollama"])
def test_a_stream_of_responses_ends_with_an_event_of_that_api(live: LiveProxy, name: str) -> None:
    """It has the members of its own events, the next number, and an error object besides."""
    events = [b"event: response.created\n" + event(n) for n in range(2)]
    path = f"/{name}/v1/responses"
    added = broken(live, path, SSE, *events).removeprefix(b"".join(events))
    assert added.startswith(b"event: error\ndata: ")
    assert added.endswith(b"\n\n")
    found = json.loads(added.removeprefix(b"event: error\ndata: "))
    error = found.pop("error")
    assert set(error) == {"message", "type", "code", "param"}
    assert found == {
        "type": "error",
        "sequence_number": 2,
        "code": "upstream_broken",
        "message": error["message"],
        "param": None,
    }
    assert trace_of(live.daemon, path=path)["end_reason"] == "upstream_broken"


def test_an_anthropic_stream_ends_with_an_error_event(live: LiveProxy) -> None:
    """The `error` event has the request id in it."""
    added = broken(live, "/anthropic/x", SSE, event(0)).removeprefix(event(0))
    assert added.startswith(b"event: error\ndata: ")
    assert added.endswith(b"\n\n")
    error = json.loads(added.removeprefix(b"event: error\ndata: "))
    assert error["type"] == "error"
    assert error["request_id"] == trace_of(live.daemon, path="/anthropic/x")["id"]


def test_an_ollama_stream_ends_with_a_line(live: LiveProxy) -> None:
    """NDJSON gets one more object, with the error as text."""
    line = b'{"response":"a","done":false}\n'
    added = broken(live, "/ollama/api/chat", NDJSON, line).removeprefix(line)
    assert list(json.loads(added)) == ["error"]
    assert (added.count(b"\n"), added[-1:]) == (1, b"\n")


@pytest.mark.parametrize(
    ("path", "head", "pieces"),
    [
        ("/openai/x1", SSE, [event(0), b'data: {"half":']),
        ("/openai/x2", SSE, [event(0), b"data: 1\n"]),
        ("/openai/x3", SSE, [event(0)[:-1]]),
        ("/anthropic/x1", SSE, [b"event: message_start\n"]),
        ("/anthropic/x2", SSE, [b"event: a\r\ndata: 1\r\n"]),
        ("/ollama/api/x1", NDJSON, [b'{"response":"a"}\n{"resp']),
        ("/ollama/api/x2", NDJSON, [b'{"response":"a"}']),
    ],
)
def test_nothing_is_put_inside_an_event(
    live: LiveProxy, path: str, head: bytes, pieces: list[bytes]
) -> None:
    """A break in the middle of an event is left as it is."""
    assert broken(live, path, head, *pieces) == b"".join(pieces)


@pytest.mark.parametrize("split", [[b"data: 1\n", b"\n"], [b"data: 1\r\n\r", b"\n"], [b": c\r\r"]])
def test_the_end_of_an_event_is_seen_at_any_split(live: LiveProxy, split: list[bytes]) -> None:
    """The provider may use any line ends, split at any point."""
    added = broken(live, "/openai/split", SSE, *split).removeprefix(b"".join(split))
    assert added.startswith(b"data: {")


def test_without_the_option_nothing_is_added(live: LiveProxy) -> None:
    """error_event is off unless the route says otherwise."""
    for name in ("openai", "anthropic", "ollama"):
        assert broken(live, f"/quiet/{name}/x", SSE, event(0)) == event(0)
