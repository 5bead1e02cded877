"""Server-sent events, NDJSON and JSON pass through as they come (design 1, S3)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import Wire, chunked, request
from tests.support.stage import (
    LAST,
    SSE,
    Link,
    Notes,
    Stage,
    Turn,
    assert_settles,
    chunked_answer,
    is_silent,
    open_stage,
    post,
    response,
    trace_of,
)

PIECES = {
    "text/event-stream; charset=utf-8": [b"event: a\ndata: {}\n\n", b": ping\r\n\r\n", b"data: 2"],
    "application/x-ndjson": [b'{"response":"a"}\n', b'{"response":"b"}\n{"done"', b":true}\n"],
    "application/json": [b'{"choices":', b"[", b"]}"],
}
TYPES = list(PIECES)
STREAMS = TYPES[:2]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """One route."""
    folder = tmp_path_factory.mktemp("types")
    with open_stage(
        folder, lambda url: provider_config(url, provider=link.keys), link=link
    ) as stage:
        yield stage


def head_of(kind: str) -> bytes:
    """Return the head of a chunked response."""
    return SSE.replace(b"text/event-stream", kind.encode())


@pytest.mark.parametrize("kind", TYPES)
def test_each_piece_arrives_before_the_next_is_sent(stage: Stage, kind: str) -> None:
    """Whatever the type, a piece is forwarded at once and unchanged."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head_of(kind))
        for piece in PIECES[kind]:
            turn.take()
            wire.send(chunked(piece))
        turn.take()
        wire.send(LAST)

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/x"))
        _, fields = client.read_head()
        assert dict(fields)[b"content-type"] == kind.encode()
        for piece in PIECES[kind]:
            assert is_silent(client)
            turn.give()
            assert client.read_chunk() == piece
        turn.give()
        assert client.read_chunk() == b""


@pytest.mark.parametrize("kind", TYPES)
def test_the_head_arrives_before_the_first_byte_of_the_body(stage: Stage, kind: str) -> None:
    """The provider sends nothing but its head until the client has that."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head_of(kind))
        turn.take()
        wire.send(chunked(b"body"), LAST)

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/x"))
        first, _ = client.read_head()
        assert first == b"HTTP/1.1 200 OK"
        assert is_silent(client)
        turn.give()
        assert client.read_chunks() == b"body"


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_tells_whoever_stands_between_not_to_buffer(stage: Stage, kind: str) -> None:
    """Both headers are there once, whether the provider sent none or others."""
    for fields in ("", "X-Accel-Buffering: yes\r\nCache-Control: private\r\ncache-control: x\r\n"):
        reply = chunked_answer(b"data: 1\n\n", kind=kind).replace(
            b"Connection:", fields.encode() + b"Connection:"
        )
        _, got = stage.ask(post("/p/x"), reply)
        assert got.values(b"x-accel-buffering") == [b"no"]
        assert got.values(b"cache-control") == [b"no-cache, no-transform"]


def test_a_response_that_is_no_stream_keeps_the_providers_own_caching(stage: Stage) -> None:
    """JSON gets no anti-buffering header, and loses none of its own."""
    _, got = stage.ask(post("/p/x"), response(200, "Content-Type: application/json", body=b"{}"))
    assert got.values(b"x-accel-buffering") == []
    assert got.values(b"cache-control") == []
    fields = ("Content-Type: application/json", "Cache-Control: max-age=3", "X-Accel-Buffering: q")
    _, got = stage.ask(post("/p/x"), response(200, *fields, body=b"{}"))
    assert got.values(b"x-accel-buffering") == [b"q"]
    assert got.values(b"cache-control") == [b"max-age=3"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_handed_on_and_not_followed(stage: Stage, status: int) -> None:
    """The client gets the status and the Location, and the provider is asked once."""
    before = stage.provider.accepted
    location = f"Location: {stage.provider.url}/elsewhere"
    _, got = stage.ask(post("/p/x"), response(status, location, body=b"moved"))
    assert got.status == status
    assert got.values(b"location") == [location.partition(": ")[2].encode()]
    assert got.body == b"moved"
    assert stage.provider.accepted == before + 1


@pytest.mark.parametrize("kind", TYPES)
def test_a_provider_that_drops_leaves_no_whole_body(stage: Stage, kind: str) -> None:
    """What came before the drop arrives, the last chunk does not, and the record says so."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head_of(kind), chunked(PIECES[kind][0]))

    stage.script = script
    path = f"/p/drop/{kind.partition(';')[0]}"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        client.wait_closed()
        assert client.buffer == chunked(PIECES[kind][0])
    record = trace_of(stage.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == ("upstream_broken", False)


@pytest.mark.parametrize("kind", TYPES)
def test_a_client_that_drops_ends_the_providers_work(stage: Stage, kind: str) -> None:
    """The provider sees the end of its connection while it is in the middle of a silence."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head_of(kind), chunked(PIECES[kind][0]))
        ended.put(wire.wait_closed())

    stage.script = script
    path = f"/p/gone/{kind.partition(';')[0]}"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        assert client.read_chunk() == PIECES[kind][0]
    ended.read()
    assert trace_of(stage.daemon, path=path)["end_reason"] == "client_gone"
    assert_settles(stage.daemon)


def test_a_length_is_kept_where_the_provider_gave_one(stage: Stage) -> None:
    """A counted body stays counted, a chunked one chunked."""
    _, got = stage.ask(request("GET", "/p/x"), response(200, body=b"12345"))
    assert got.values(b"content-length") == [b"5"]
    assert got.values(b"transfer-encoding") == []
    _, got = stage.ask(request("GET", "/p/x"), chunked_answer(b"123", b"45"))
    assert got.values(b"content-length") == []
    assert got.values(b"transfer-encoding") == [b"chunked"]
    assert got.body == b"12345"


def test_a_body_that_ends_with_a_plain_connection_is_whole(stage: Stage) -> None:
    """An HTTP/1.0 answer ends at a FIN; over TLS that is broken, for nobody said farewell."""
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head, b"data: 1\n\n")

    stage.script = script
    secure = stage.provider.url.startswith("https")
    path = "/p/eof"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        assert client.read_chunk() == b"data: 1\n\n"
        client.wait_closed() if secure else client.read_chunk()
        assert client.buffer == b""
    record = trace_of(stage.daemon, path=path)
    assert record["end_reason"] == ("upstream_broken" if secure else "complete")


def test_a_body_that_ends_with_tls_farewell_is_whole(stage: Stage) -> None:
    """A close_notify, or a plain FIN, is the end of a body without framing."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        wire.farewell()

    stage.script = script
    got = stage.get(post("/p/farewell"))
    assert got.body == b"data: 1\n\n"
    assert stage.trace(got)["end_reason"] == "complete"


def test_a_body_without_framing_is_broken_by_a_reset(stage: Stage) -> None:
    """Where the end of the connection is the end of the body, a RST is no end."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        turn.take()
        wire.reset()

    stage.script = script
    with stage.connect() as client:
        client.send(post("/p/rst"))
        client.read_head()
        assert client.read_chunk() == b"data: 1\n\n"
        turn.give()
        client.wait_closed()
        assert client.buffer == b""
    assert trace_of(stage.daemon, path="/p/rst")["end_reason"] == "upstream_broken"
