"""`error_event`: one event in the dialect's own shape before a broken stream is cut (design 6)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

import pytest

from tests.support.sockets import Wire, chunked
from tests.support.stage import SSE, Stage, assert_settles, event, open_stage, post, trace_of

NDJSON = SSE.replace(b"text/event-stream", b"application/x-ndjson")

CONFIG = "".join(
    f"""
[providers.{name}]
url = "URL"
dialect = "{name}"
timeouts = {{ idle = "300ms" }}
[[routes]]
path = "/{name}"
providers = ["{name}"]
error_event = true
[[routes]]
path = "/quiet/{name}"
providers = ["{name}"]
"""
    for name in ("openai", "anthropic", "ollama")
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Each dialect with and without error events."""
    folder = tmp_path_factory.mktemp("events")
    with open_stage(folder, lambda url: CONFIG.replace("URL", url)) as stage:
        yield stage


def broken(stage: Stage, path: str, head: bytes, *pieces: bytes, version: str = "1.1") -> bytes:
    """Let the provider send these and drop; return the body's bytes as the client got them.

    The framing of the chunked coding is taken off; a last chunk would fail the test.
    """
    is_chunked = b"chunked" in head

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head, *(chunked(piece) if is_chunked else piece for piece in pieces))

    stage.script = script
    with stage.connect() as client:
        client.send(post(path, version=version))
        _, fields = client.read_head()
        ended = client.wait_closed()
        raw = client.buffer
    assert_settles(stage.daemon)
    if version == "1.0":
        assert ended == "reset", "only a reset tells an HTTP/1.0 client that it is not the end"
        return raw
    if (b"transfer-encoding", b"chunked") not in fields:
        return raw
    body = b""
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        assert int(size, 16) > 0, "a broken body ends as if it were whole"
        body += rest[: int(size, 16)]
        raw = rest[int(size, 16) + 2 :]
    return body


def test_an_openai_stream_is_told_in_an_event_of_its_shape(stage: Stage) -> None:
    """A data line with an error object, as its SDK looks for."""
    body = broken(stage, "/openai/x", SSE, event(0))
    assert body.startswith(event(0))
    told = body.removeprefix(event(0))
    assert told.startswith(b"data: ")
    assert told.endswith(b"\n\n")
    error = json.loads(told[6:])["error"]
    assert error["code"] == "upstream_broken"
    assert set(error) == {"message", "type", "code", "param"}
    assert trace_of(stage.daemon, path="/openai/x")["end_reason"] == "upstream_broken"


def test_an_anthropic_stream_is_told_in_an_error_event(stage: Stage) -> None:
    """An `error` event with the request id in it."""
    body = broken(stage, "/anthropic/x", SSE, event(0))
    told = body.removeprefix(event(0))
    assert told.startswith(b"event: error\ndata: ")
    assert told.endswith(b"\n\n")
    error = json.loads(told.removeprefix(b"event: error\ndata: "))
    assert error["type"] == "error"
    assert error["request_id"] == trace_of(stage.daemon, path="/anthropic/x")["id"]


def test_an_ollama_stream_is_told_in_a_line(stage: Stage) -> None:
    """NDJSON: one more object, with the error as text."""
    line = b'{"response":"a","done":false}\n'
    told = broken(stage, "/ollama/api/chat", NDJSON, line).removeprefix(line)
    assert told.endswith(b"\n")
    assert list(json.loads(told)) == ["error"]
    assert told.count(b"\n") == 1


def test_silence_and_an_empty_stream_are_told_too(stage: Stage) -> None:
    """The event is the first of a stream that had none."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        wire.wait_closed()

    stage.script = script
    with stage.connect() as client:
        client.send(post("/openai/silent"))
        client.read_head()
        told = client.read_chunk()
        assert json.loads(told[6:])["error"]["code"] == "upstream_idle"
        client.wait_closed()
        assert client.buffer == b""


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
    stage: Stage, path: str, head: bytes, pieces: list[bytes]
) -> None:
    """A break in the middle of an event is left as it is."""
    assert broken(stage, path, head, *pieces) == b"".join(pieces)


@pytest.mark.parametrize("split", [[b"data: 1\n", b"\n"], [b"data: 1\r\n\r", b"\n"], [b": c\r\r"]])
def test_the_end_of_an_event_is_seen_at_any_split(stage: Stage, split: list[bytes]) -> None:
    """Whatever line ends the provider uses, and wherever they are cut."""
    told = broken(stage, "/openai/split", SSE, *split).removeprefix(b"".join(split))
    assert told.startswith(b"data: {")


def test_a_stream_of_known_length_is_left_as_it_is(stage: Stage) -> None:
    """The event would fill the promised length up, and the broken body would look whole."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 40\r\n\r\n"
    assert broken(stage, "/openai/length", head, event(0)) == event(0)


def test_an_encoded_stream_is_left_as_it_is(stage: Stage) -> None:
    """Plain text inside gzip is no event but damage."""
    head = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    piece = gzip.compress(event(0), mtime=0)[:-4] + b"\n\n"
    assert broken(stage, "/openai/gzip", head, piece) == piece
    assert broken(stage, "/openai/gzip-empty", head) == b""


def test_a_response_that_is_no_stream_is_left_as_it_is(stage: Stage) -> None:
    """JSON has no events."""
    head = SSE.replace(b"text/event-stream", b"application/json")
    assert broken(stage, "/openai/json", head, b"[1,\n\n") == b"[1,\n\n"


def test_without_the_option_nothing_is_added(stage: Stage) -> None:
    """error_event is off unless the route says otherwise."""
    for name in ("openai", "anthropic", "ollama"):
        assert broken(stage, f"/quiet/{name}/x", SSE, event(0)) == event(0)


def test_an_http_1_0_client_gets_the_event_and_then_a_reset(stage: Stage) -> None:
    """Everything that was written arrives before the reset."""
    body = broken(stage, "/openai/old", SSE, event(0), version="1.0")
    told = body.removeprefix(event(0))
    assert json.loads(told[6:])["error"]["code"] == "upstream_broken"
