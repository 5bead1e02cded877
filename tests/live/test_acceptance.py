"""The acceptance tests of the dual write that are about the stream to the caller (design 1, S4)."""

from __future__ import annotations

import pytest

from tests.support.live_proxy import LiveProxy, live_fixture, read_stepwise
from tests.support.scripts import DONE, SSE, Notes, event
from tests.support.sockets import Wire, chunked

live = live_fixture(both_links=True)


def test_each_of_five_chunks_arrives_before_the_next_is_sent(live: LiveProxy) -> None:
    """Five chunks reach the client in order, each by itself, and [DONE] completes the stream."""
    chunks = [*map(event, range(5)), DONE]
    turn = live.stream(*chunks)
    with live.begin("/p/five") as client:
        read_stepwise(client, turn, *chunks, b"")
    record = live.assert_ended("/p/five", "complete")
    assert (record["chunks"], record["bytes_out"]) == (6, sum(map(len, chunks)))


def test_bytes_are_not_held_back_for_the_end_of_an_event(live: LiveProxy) -> None:
    """A piece that ends inside an event, a word or a character is forwarded as it is."""
    pieces = [b"da", b'ta: {"text":"gr\xc3', b'\xbc\xc3\x9f"}\n', b"\n"]
    turn = live.stream(*pieces)
    with live.begin("/p/pieces") as client:
        read_stepwise(client, turn, *pieces, b"")


@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_drop_after_three_chunks_is_a_partial_stream_and_an_error(
    live: LiveProxy, framing: str, end: str
) -> None:
    """The client gets the three chunks and no proper end; the record says that it broke."""
    events = [*map(event, range(3))]
    partial = b"".join(events)
    if framing == "chunked":
        turn = live.break_off(end, SSE, chunked(*events))
    else:
        head = SSE.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000")
        turn = live.break_off(end, head, partial)
    path = f"/p/drop-{framing}-{end}"
    with live.begin(path) as client:
        content = b""
        while len(content) < len(partial):
            content += client.read_chunk() if framing == "chunked" else client.read(1)
        assert content == partial
        turn.give()
        client.wait_closed()
        assert client.buffer == b"", "something followed the break, such as the last chunk"
    assert live.assert_ended(path, "upstream_broken")["bytes_out"] == len(partial)


@pytest.mark.parametrize("paused", [False, True])
def test_a_client_that_leaves_stops_the_reading_and_leaks_nothing(
    live: LiveProxy, paused: bool
) -> None:
    """The provider is cut off while it has much to send, and every gauge falls to zero."""
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

    live.script = script
    path = f"/p/leaves/{paused}"
    with live.begin(path, receive_buffer=4096) as client:
        assert client.read_chunk()[: len(event(0))] == event(0)
        if paused:
            live.wait_paused()
    assert noted.read() == "ended"
    live.assert_ended(path, "client_gone")
