"""The acceptance tests of the dual write that are about the stream to the caller (design 1, S4)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import Wire, chunked
from tests.support.stage import (
    DONE,
    LAST,
    SSE,
    Link,
    Notes,
    Stage,
    Turn,
    assert_settles,
    event,
    is_silent,
    open_stage,
    post,
    trace_of,
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """One route to an OpenAI provider."""
    folder = tmp_path_factory.mktemp("acceptance")
    with open_stage(
        folder, lambda url: provider_config(url, provider=link.keys), link=link
    ) as stage:
        yield stage


def test_each_of_five_chunks_arrives_before_the_next_is_sent(stage: Stage) -> None:
    """Five chunks reach the client in order, each by itself, and [DONE] completes the stream."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for number in range(5):
            turn.take()
            wire.send(chunked(event(number)))
        turn.take()
        wire.send(chunked(DONE))
        turn.take()
        wire.send(LAST)

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/five"))
        first, _ = client.read_head()
        assert first == b"HTTP/1.1 200 OK"
        for number in range(5):
            assert is_silent(client)
            turn.give()
            assert client.read_chunk() == event(number)
        assert is_silent(client)
        turn.give()
        assert client.read_chunk() == DONE
        assert is_silent(client)
        turn.give()
        assert client.read_chunk() == b""
    record = trace_of(stage.daemon, path="/p/five")
    assert record["end_reason"] == "complete"
    assert record["is_complete"] is True
    assert record["chunks"] == 6
    assert record["bytes_out"] == sum(len(event(n)) for n in range(5)) + len(DONE)


def test_bytes_are_not_held_back_for_the_end_of_an_event(stage: Stage) -> None:
    """A piece that ends inside an event, a word or a character is forwarded as it is."""
    turn = Turn()
    pieces = [b"da", b'ta: {"text":"gr\xc3', b'\xbc\xc3\x9f"}\n', b"\n"]

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for piece in pieces:
            turn.take()
            wire.send(chunked(piece))
        wire.send(LAST)

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/pieces"))
        client.read_head()
        for piece in pieces:
            turn.give()
            assert client.read_chunk() == piece


@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_drop_after_three_chunks_is_a_partial_stream_and_an_error(
    stage: Stage, framing: str, end: str
) -> None:
    """The client gets the three chunks and no proper end; the trace says that it broke."""
    turn = Turn()
    head = (
        SSE
        if framing == "chunked"
        else SSE.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000")
    )

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head)
        for number in range(3):
            wire.send(chunked(event(number)) if framing == "chunked" else event(number))
        turn.take()
        if end == "reset":
            wire.reset()

    stage.script = script
    path = f"/p/drop-{framing}-{end}"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        partial = b"".join(event(number) for number in range(3))
        if framing == "length":
            assert client.read(len(partial)) == partial
        else:
            content = b""
            while len(content) < len(partial):
                content += client.read_chunk()
            assert content == partial
        turn.give()
        client.wait_closed()
        assert client.buffer == b"", "something followed the break, such as the last chunk"
    record = trace_of(stage.daemon, path=path)
    assert record["end_reason"] == "upstream_broken"
    assert record["is_complete"] is False
    assert record["status"] == 200
    assert record["bytes_out"] == len(partial)
    assert_settles(stage.daemon)


def test_a_client_that_leaves_stops_the_reading_and_leaks_nothing(stage: Stage) -> None:
    """The provider is cut off while it has much to say, and every gauge falls to zero."""
    noted = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        try:
            for _ in range(100_000):
                wire.send(chunked(b"data: " + b"x" * 10_000 + b"\n\n"))
        except OSError:
            noted.put("ended")
            raise
        noted.put("sent a gigabyte")

    stage.script = script
    with stage.connect(receive_buffer=4096) as client:
        client.send(post("/p/leaves"))
        client.read_head()
        assert client.read_chunk()[: len(event(0))] == event(0)
    assert noted.read() == "ended"
    record = trace_of(stage.daemon, path="/p/leaves")
    assert record["end_reason"] == "client_gone"
    assert record["is_complete"] is False
    assert_settles(stage.daemon)
