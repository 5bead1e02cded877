"""The acceptance tests of the dual write that are about the copy, over real sockets (ADR-0024)."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.daemon import provider_config
from tests.support.records import query
from tests.support.sockets import Wire, chunked
from tests.support.stage import (
    DONE,
    LAST,
    SSE,
    Link,
    Stage,
    Turn,
    assert_settles,
    chunked_answer,
    event,
    is_silent,
    open_stage,
    post,
    trace_of,
    until,
)

CHAT = "v1/chat/completions"
WORDS = ["Zwölf ", "Boxkämpfer ", "jagen ", "Viktor ", "quer. "]
TEXT = "".join(WORDS)
COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
ROUTES = """
[[routes]]
path = "/kept"
providers = ["p"]
capture = "content"

[[routes]]
path = "/told"
providers = ["p"]
capture = "content"
error_event = true
"""


def said(word: str) -> bytes:
    """Return an event that says a word."""
    chunk = {"id": "r", "model": "m-1", "choices": [{"index": 0, "delta": {"content": word}}]}
    return b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False).encode()


CHUNKS = [said(word) for word in WORDS]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """A route whose record keeps the usage, two that keep the content, and a ledger."""
    folder = tmp_path_factory.mktemp("tap")
    ledger = f'ledger = "{folder}/ledger.db"\n'
    with open_stage(
        folder,
        lambda url: ledger + provider_config(url, provider=link.keys) + ROUTES,
        link=link,
    ) as stage:
        yield stage


def play(*pieces: bytes) -> Callable[[Wire], None]:
    """Return a script that answers with a whole stream of these chunks."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(chunked_answer(*pieces))

    return script


def stepwise(turn: Turn, *pieces: bytes) -> Callable[[Wire], None]:
    """Return a script that sends each chunk at a turn, and then the last one."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for piece in pieces:
            turn.take()
            wire.send(chunked(piece))
        wire.send(LAST)

    return script


def told(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a record says of a response's end and usage."""
    names = ("end_reason", "is_complete", "usage", "output_tokens", "degraded")
    return tuple(record[name] for name in names)


def wait_for_ledger(stage: Stage, name: str) -> None:
    """Wait until the ledger has the request of that id, too."""
    ledger = stage.daemon.folder / "ledger.db"
    until(lambda: (name,) in query(ledger, "SELECT id FROM traces"), "the ledger has it")


# -- five chunks -----------------------------------------------------------------------------------


def test_the_accumulator_holds_what_five_chunks_said(stage: Stage) -> None:
    """Each reaches the client before the next is sent; the copy is whole, completed by [DONE]."""
    turn = Turn()
    stage.script = stepwise(turn, *CHUNKS, COUNTS, DONE)
    path = f"/kept/five/{CHAT}"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        for chunk in (*CHUNKS, COUNTS, DONE):
            assert is_silent(client)
            turn.give()
            assert client.read_chunk() == chunk
        assert client.read_chunk() == b""
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("complete", True, "reported", 5, [])
    assert (record["text"], record["response_id"]) == (TEXT, "r")
    assert (record["served_model"], record["input_tokens"]) == ("m-1", 3)
    assert record["chunks"] == 7


def test_each_chunk_is_there_within_ten_milliseconds(stage: Stage) -> None:
    """With a copy of the content kept; of ten streams the quickest counts, as machines are busy."""
    sent: list[float] = []

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for chunk in CHUNKS:
            turn.take()
            sent.append(time.monotonic())
            wire.send(chunked(chunk))
        turn.take()
        wire.send(chunked(DONE), LAST)

    slowest = []
    for _ in range(10):
        turn = Turn()
        stage.script = script
        sent.clear()
        with stage.connect() as client:
            client.send(post(f"/kept/quick/{CHAT}"))
            client.read_head()
            delays = []
            for number, chunk in enumerate(CHUNKS):
                turn.give()
                assert client.read_chunk() == chunk
                delays.append(time.monotonic() - sent[number])
            turn.give()
            assert client.read_chunks() == DONE
        slowest.append(max(delays))
    assert min(slowest) < 0.01


def test_nothing_of_a_text_is_kept_where_usage_is_captured(stage: Stage) -> None:
    """Neither in the trace nor in the ledger, in the log or among the metrics."""
    words = [f"sekret{number} " for number in range(5)]
    stage.script = play(*(said(word) for word in words), COUNTS, DONE)
    path = f"/p/usage/{CHAT}"
    stage.get(post(path))
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("complete", True, "reported", 5, [])
    wait_for_ledger(stage, record["id"])
    places = [stage.daemon.trace_path, *stage.daemon.folder.glob("ledger.db*")]
    assert [place.name for place in places if b"sekret" in place.read_bytes()] == []
    assert "sekret" not in json.dumps(stage.daemon.log) + stage.daemon.admin("/metrics")


def test_the_ledger_never_keeps_a_text(stage: Stage) -> None:
    """Where content is captured it is in the trace file alone."""
    stage.script = play(said("onlyinthefile"), DONE)
    path = f"/kept/file/{CHAT}"
    stage.get(post(path))
    record = trace_of(stage.daemon, path=path)
    assert record["text"] == "onlyinthefile"
    wait_for_ledger(stage, record["id"])
    for file in stage.daemon.folder.glob("ledger.db*"):
        assert b"onlyinthefile" not in file.read_bytes()


@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("route", ["kept", "told"])
def test_a_drop_after_three_chunks_is_not_complete(stage: Stage, route: str, end: str) -> None:
    """The client has the partial stream and no proper end, the record what came and its reason."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, *(chunked(chunk) for chunk in CHUNKS[:3]))
        turn.take()
        if end == "reset":
            wire.reset()

    stage.script = script
    path = f"/{route}/drop-{end}/{CHAT}"
    partial = b"".join(CHUNKS[:3])
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        got = b""
        while len(got) < len(partial):
            got += client.read_chunk()
        assert got == partial
        turn.give()
        if route == "told":
            error = client.read_chunk()
            assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "upstream_broken"
        client.wait_closed()
        assert client.buffer == b"", "something followed the break, such as the last chunk"
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("upstream_broken", False, "none", None, [])
    assert (record["error"], record["text"]) == ("upstream_broken", "".join(WORDS[:3]))
    assert_settles(stage.daemon)


def test_a_client_that_leaves_has_its_part_in_the_record(stage: Stage) -> None:
    """The provider is let go of; what was said until then is kept, and is not complete."""
    stage.script = stepwise(turn := Turn(), *CHUNKS)
    path = f"/kept/leaves/{CHAT}"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        for chunk in CHUNKS[:2]:
            turn.give()
            assert client.read_chunk() == chunk
    record = trace_of(stage.daemon, path=path)
    turn.give(3)
    assert told(record) == ("client_gone", False, "none", None, [])
    assert (record["text"], record["on_disconnect"]) == ("".join(WORDS[:2]), "cancel")
    assert_settles(stage.daemon)


# -- the verdict -----------------------------------------------------------------------------------

ERROR = b'data: {"error":{"type":"server_error","message":"no"}}\n\n'


@pytest.mark.parametrize(
    ("name", "pieces", "end", "status"),
    [
        ("whole", [*CHUNKS, DONE], "complete", 200),
        ("markerless", CHUNKS, "unfinished", 200),
        ("empty", [], "unfinished", 200),
        ("half-marker", [*CHUNKS, b"data: [DO"], "complete", 200),
        ("marker-without-its-line", [*CHUNKS, DONE[:-2]], "complete", 200),
        ("fails", [*CHUNKS[:2], ERROR], "upstream_failed", 200),
        ("fails-and-goes-on", [CHUNKS[0], ERROR, DONE], "upstream_failed", 200),
    ],
)
@pytest.mark.parametrize("route", ["p", "kept"])
def test_the_verdict(
    stage: Stage, route: str, name: str, pieces: list[bytes], end: str, status: int
) -> None:
    """A stream whose framing ended well: bytes are exact, and the record says what was in them."""
    stage.script = play(*pieces)
    path = f"/{route}/{name}/{CHAT}"
    assert stage.get(post(path)).body == b"".join(pieces)
    record = trace_of(stage.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == (end, end == "complete")
    assert record["status"] == status
    assert record["degraded"] == (["unreadable"] if name == "half-marker" else [])


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [
        ("v1/unknown", "text/event-stream"),
        ("v1/audio/speech", "text/event-stream"),
        ("v1/embeddings", "text/event-stream"),
        (CHAT, "text/plain"),
        (CHAT, "application/octet-stream"),
    ],
)
def test_what_has_no_known_marker_is_never_unfinished(
    stage: Stage, endpoint: str, kind: str
) -> None:
    """Its framing alone decides."""
    body = b"".join(CHUNKS)

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(chunked_answer(body, kind=kind))

    stage.script = script
    path = f"/p/no-marker-{kind.partition('/')[2]}/{endpoint}"
    assert stage.get(post(path)).body == body
    record = trace_of(stage.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == ("complete", True)


# -- codings ---------------------------------------------------------------------------------------

Coder = Callable[[bytes], bytes]


def gzipped() -> tuple[Coder, Callable[[], bytes]]:
    """Return what codes an event and flushes it, and what ends the member."""
    coder = zlib.compressobj(wbits=31)
    return lambda data: coder.compress(data) + coder.flush(zlib.Z_SYNC_FLUSH), coder.flush


def deflated() -> tuple[Coder, Callable[[], bytes]]:
    """The same in the coding that is called deflate."""
    coder = zlib.compressobj()
    return lambda data: coder.compress(data) + coder.flush(zlib.Z_SYNC_FLUSH), coder.flush


def brotlied() -> tuple[Coder, Callable[[], bytes]]:
    """The same in brotli, where that is installed."""
    coder = pytest.importorskip("brotli").Compressor()
    return lambda data: coder.process(data) + coder.flush(), coder.finish


def zstandard() -> tuple[Coder, Callable[[], bytes]]:
    """The same in zstd, where that is installed."""
    zstd = pytest.importorskip("backports.zstd")
    coder = zstd.ZstdCompressor()
    return lambda data: coder.compress(data, coder.FLUSH_BLOCK), coder.flush


@pytest.mark.parametrize(
    ("coding", "opened"),
    [("gzip", gzipped), ("deflate", deflated), ("br", brotlied), ("zstd", zstandard)],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_coded_stream_is_read(
    stage: Stage, coding: str, opened: Callable[[], tuple[Coder, Callable[[], bytes]]], whole: bool
) -> None:
    """Each event crosses as it was coded, at once; the record has what was in it, and its end."""
    code, end = opened()
    events = [*CHUNKS, COUNTS, *([DONE] if whole else [])]
    pieces = [code(piece) for piece in events]
    tail = end()
    turn = Turn()
    head = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: %b\r\n\r\n" % coding.encode())

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head)
        for piece in pieces:
            turn.take()
            wire.send(chunked(piece))
        turn.take()
        wire.send(chunked(tail) if tail else b"", LAST)

    stage.script = script
    path = f"/kept/{coding}-{whole}/{CHAT}"
    with stage.connect() as client:
        client.send(post(path))
        _, fields = client.read_head()
        assert (b"content-encoding", coding.encode()) in fields
        for piece in pieces:
            assert is_silent(client)
            turn.give()
            assert client.read_chunk() == piece
        turn.give()
        assert client.read_chunks() == tail
    record = trace_of(stage.daemon, path=path)
    reason = "complete" if whole else "unfinished"
    assert told(record) == (reason, whole, "reported" if whole else "partial", 5, [])
    assert record["text"] == TEXT


def test_a_coded_response_in_one_piece_is_read(stage: Stage) -> None:
    """The bytes under its coding and its length stay as they are."""
    body = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
    coded = gzip.compress(json.dumps(body).encode())

    def script(wire: Wire) -> None:
        wire.read_request()
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
        head += f"Content-Encoding: gzip\r\nContent-Length: {len(coded)}\r\n\r\n"
        wire.send(head.encode(), coded)

    stage.script = script
    path = f"/p/coded/{CHAT}"
    assert stage.get(post(path, b'{"model":"m"}')).body == coded
    assert told(trace_of(stage.daemon, path=path)) == ("complete", True, "reported", 5, [])


def test_a_bomb_costs_the_record_and_nothing_else(stage: Stage) -> None:
    """Mebibytes of zeros under a few kibibytes of gzip: the client has them as they came."""
    coder = zlib.compressobj(9, wbits=31)
    bomb = b"".join(coder.compress(bytes(1024**2)) for _ in range(64)) + coder.flush()
    head = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(head, chunked(bomb), LAST)

    stage.script = script
    path = f"/kept/bomb/{CHAT}"
    before = stage.daemon.metrics().get('llmproxy_tap_degraded_total{reason="bomb"}', 0)
    assert stage.get(post(path)).body == bomb
    record = trace_of(stage.daemon, path=path)
    assert (record["end_reason"], record["degraded"]) == ("complete", ["bomb", "overlong"])
    after = stage.daemon.metrics()['llmproxy_tap_degraded_total{reason="bomb"}']
    assert after - before == 1


def test_what_is_no_event_of_ours_is_no_trouble(stage: Stage) -> None:
    """Events that are JSON of another shape are passed over, without a word."""
    stage.script = play(event(0), CHUNKS[0], event(1), DONE)
    path = f"/kept/odd/{CHAT}"
    stage.get(post(path))
    record = trace_of(stage.daemon, path=path)
    assert told(record) == ("complete", True, "none", None, [])
    assert record["text"] == WORDS[0]
