"""The acceptance tests of the dual write that are about the copy, over real sockets (ADR-0024)."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pytest
from backports import zstd

from tests.support.daemon import route_table
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    chunked_response,
    live_fixture,
    post,
    read_stepwise,
    response,
    trace_of,
    until,
)
from tests.support.records import query
from tests.support.scripts import DONE, LAST, SSE, Turn, event
from tests.support.sockets import Wire, chunked

JSON = "Content-Type: application/json"
CHAT = "v1/chat/completions"
WORDS = ["Zwölf ", "Boxkämpfer ", "jagen ", "Viktor ", "quer. "]
TEXT = "".join(WORDS)
COUNTS = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
KEPT = 'capture = "content"'


def said(word: str) -> bytes:
    """Return an event that says a word."""
    chunk = {"id": "r", "model": "m-1", "choices": [{"index": 0, "delta": {"content": word}}]}
    return b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False).encode()


CHUNKS = [said(word) for word in WORDS]

live = live_fixture(
    'ledger = "FOLDER/ledger.db"\n'
    + ONE_ROUTE
    + route_table("/kept", "p", KEPT)
    + route_table("/reported", "p", KEPT, "error_event = true"),
    both_links=True,
)


def outcome(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a record says of a response's end and usage."""
    names = ("end_reason", "is_complete", "usage", "output_tokens", "degraded")
    return tuple(record[name] for name in names)


# -- five chunks -----------------------------------------------------------------------------------


def test_the_accumulator_holds_what_five_chunks_said(live: LiveProxy) -> None:
    """Each reaches the client before the next is sent; the copy is whole, completed by [DONE]."""
    turn = live.stream(*CHUNKS, COUNTS, DONE)
    path = f"/kept/five/{CHAT}"
    with live.begin(path) as client:
        read_stepwise(client, turn, *CHUNKS, COUNTS, DONE, b"")
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == ("complete", True, "reported", 5, [])
    assert (record["text"], record["response_id"]) == (TEXT, "r")
    assert (record["served_model"], record["input_tokens"]) == ("m-1", 3)
    assert record["chunks"] == 7


def test_each_chunk_is_there_within_ten_milliseconds(live: LiveProxy) -> None:
    """The tap keeps a copy meanwhile; the quickest of ten streams counts, as machines are busy."""
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
        live.script = script
        sent.clear()
        with live.begin(f"/kept/quick/{CHAT}") as client:
            delays = []
            for number, chunk in enumerate(CHUNKS):
                turn.give()
                assert client.read_chunk() == chunk
                delays.append(time.monotonic() - sent[number])
            turn.give()
            assert client.read_chunks() == DONE
        slowest.append(max(delays))
    assert min(slowest) < 0.01


@pytest.mark.parametrize("route", ["p", "kept"])
def test_the_trace_file_alone_has_a_text_and_only_where_it_is_captured(
    live: LiveProxy, route: str
) -> None:
    """The ledger, the log and the metrics never have it."""
    words = [f"secret-of-{route}{number} " for number in range(5)]
    live.reply(chunked_response(*map(said, words), COUNTS, DONE))
    path = f"/{route}/usage/{CHAT}"
    live.get(post(path))
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == ("complete", True, "reported", 5, [])
    assert record.get("text") == ("".join(words) if route == "kept" else None)
    ledger = live.daemon.folder / "ledger.db"
    until(lambda: (record["id"],) in query(ledger, "SELECT id FROM traces"), "the ledger has it")
    secret = f"secret-of-{route}"
    places = [live.daemon.trace_path, *live.daemon.folder.glob("ledger.db*")]
    found = [place.name for place in places if secret.encode() in place.read_bytes()]
    assert found == (["trace.jsonl"] if route == "kept" else [])
    assert secret not in json.dumps(live.daemon.log) + live.daemon.admin("/metrics")


@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("route", ["kept", "reported"])
def test_a_drop_after_three_chunks_is_not_complete(live: LiveProxy, route: str, end: str) -> None:
    """The client has the partial stream and no proper end, the record what came and its reason."""
    turn = live.break_off(end, SSE, chunked(*CHUNKS[:3]))
    path = f"/{route}/drop-{end}/{CHAT}"
    partial = b"".join(CHUNKS[:3])
    with live.begin(path) as client:
        got = b""
        while len(got) < len(partial):
            got += client.read_chunk()
        assert got == partial
        turn.give()
        if route == "reported":
            error = client.read_chunk()
            assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "upstream_broken"
        client.wait_closed()
        assert client.buffer == b"", "something followed the break, such as the last chunk"
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == ("upstream_broken", False, "none", None, [])
    assert (record["error"], record["text"]) == ("upstream_broken", "".join(WORDS[:3]))
    assert_settles(live.daemon)


def test_a_client_that_leaves_has_its_part_in_the_record(live: LiveProxy) -> None:
    """The provider is closed; the record keeps the part that came, and is not complete."""
    turn = live.stream(*CHUNKS)
    path = f"/kept/leaves/{CHAT}"
    with live.begin(path) as client:
        read_stepwise(client, turn, *CHUNKS[:2])
    record = trace_of(live.daemon, path=path)
    turn.give(4)
    assert outcome(record) == ("client_gone", False, "none", None, [])
    assert (record["text"], record["on_disconnect"]) == ("".join(WORDS[:2]), "cancel")
    assert_settles(live.daemon)


# -- the verdict -----------------------------------------------------------------------------------

ERROR = b'data: {"error":{"type":"server_error","message":"no"}}\n\n'


@pytest.mark.parametrize(
    ("name", "pieces", "end", "text"),
    [
        (f"whole/{CHAT}", [*CHUNKS, DONE], "complete", TEXT),
        (f"markerless/{CHAT}", CHUNKS, "unfinished", TEXT),
        (f"empty/{CHAT}", [], "unfinished", ""),
        (f"half-marker/{CHAT}", [*CHUNKS, b"data: [DO"], "complete", TEXT),
        (f"fails/{CHAT}", [CHUNKS[0], ERROR, DONE], "upstream_failed", WORDS[0]),
        (f"other-events/{CHAT}", [event(0), CHUNKS[0], event(1), DONE], "complete", WORDS[0]),
        ("v1/endpoint-without-a-marker", CHUNKS, "complete", None),
    ],
)
def test_the_verdict(
    live: LiveProxy, name: str, pieces: list[bytes], end: str, text: str | None
) -> None:
    """A stream whose framing ended well is exact, and the record says what was in it."""
    live.reply(chunked_response(*pieces))
    path = f"/kept/{name}"
    assert live.get(post(path)).body == b"".join(pieces)
    record = live.assert_ended(path, end)
    assert record.get("text") == text
    assert record["degraded"] == (["unreadable"] if name.startswith("half-marker") else [])


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
    """The same in brotli."""
    coder = brotli.Compressor()
    return lambda data: coder.process(data) + coder.flush(), coder.finish


def zstandard() -> tuple[Coder, Callable[[], bytes]]:
    """The same in zstd."""
    coder = zstd.ZstdCompressor()
    return lambda data: coder.compress(data, coder.FLUSH_BLOCK), coder.flush


@pytest.mark.parametrize(
    ("coding", "opened"),
    [("gzip", gzipped), ("deflate", deflated), ("br", brotlied), ("zstd", zstandard)],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_coded_stream_is_read(
    live: LiveProxy,
    coding: str,
    opened: Callable[[], tuple[Coder, Callable[[], bytes]]],
    whole: bool,
) -> None:
    """Each event crosses as it was coded, at once; the record has what was in it, and its end."""
    code, end = opened()
    events = [*CHUNKS, COUNTS, *([DONE] if whole else [])]
    pieces = [code(piece) for piece in events]
    tail = end()
    head = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: %b\r\n\r\n" % coding.encode())
    turn = live.stream(*pieces, *([tail] if tail else []), head=head)
    path = f"/kept/{coding}-{whole}/{CHAT}"
    with live.connect() as client:
        client.send(post(path))
        _, fields = client.read_head()
        assert (b"content-encoding", coding.encode()) in fields
        read_stepwise(client, turn, *pieces)
        turn.give(2)
        assert client.read_chunks() == tail
    record = trace_of(live.daemon, path=path)
    reason = "complete" if whole else "unfinished"
    assert outcome(record) == (reason, whole, "reported" if whole else "partial", 5, [])
    assert record["text"] == TEXT


def test_a_coded_response_in_one_piece_is_read(live: LiveProxy) -> None:
    """The bytes under its coding and its length stay as they are."""
    body = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
    coded = gzip.compress(json.dumps(body).encode())
    live.reply(response(200, JSON, "Content-Encoding: gzip", body=coded))
    path = f"/p/coded/{CHAT}"
    assert live.get(post(path, b'{"model":"m"}')).body == coded
    assert outcome(trace_of(live.daemon, path=path)) == ("complete", True, "reported", 5, [])


def test_a_coding_that_is_cut_is_degraded(live: LiveProxy) -> None:
    """The framing ends well, and the coding does not; the counts that came are kept."""
    code, _ = gzipped()
    head = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    pieces = [code(piece) for piece in (*CHUNKS, COUNTS, DONE)]
    live.reply(head, *map(chunked, pieces), LAST)
    path = f"/kept/cut/{CHAT}"
    assert live.get(post(path)).body == b"".join(pieces)
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == ("complete", True, "reported", 5, ["encoding"])


# -- what providers really send --------------------------------------------------------------------

MESSAGES = [
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"i","model":"c-1",'
    b'"usage":{"input_tokens":3,"output_tokens":1,"cache_read_input_tokens":7}}}\n\n',
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},'
    b'"usage":{"output_tokens":5}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
]


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json", b"text/plain", b"x/y"])
def test_the_path_and_the_first_bytes_say_how_a_response_is_read(
    live: LiveProxy, kind: bytes
) -> None:
    """Anthropic's Messages at a provider of another dialect, under any content type."""
    head = SSE.replace(b"text/event-stream", kind)
    path = f"/p/{kind.decode().replace('/', '-')}/v1/messages"
    live.reply(head, *map(chunked, MESSAGES), LAST)
    assert live.get(post(path)).body == b"".join(MESSAGES)
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == ("complete", True, "reported", 5, [])
    assert (record["served_model"], record["input_tokens"]) == ("c-1", 3)

    live.reply(head, *map(chunked, MESSAGES[:1]), LAST)
    live.get(post(path + "/"))
    record = trace_of(live.daemon, path=path + "/")
    assert outcome(record) == ("unfinished", False, "partial", 1, [])


def test_an_odd_member_hides_nothing_else(live: LiveProxy) -> None:
    """Half a pair, a count below zero, and a marker with blanks before it."""
    first = said("a").replace(b'"a"', b'"a\\ud83d"')
    second = said("b").replace(b'"b"', b'"\\ude00b"')
    counts = COUNTS.replace(b":3", b":-3")
    live.reply(chunked_response(first, second, counts, b"data:   [DONE]\n\n"))
    path = f"/kept/odd/{CHAT}"
    live.get(post(path))
    record = trace_of(live.daemon, path=path)
    assert outcome(record) == ("complete", True, "reported", 5, ["unreadable"])
    assert (record["text"], record["served_model"]) == ("a\U0001f600b", "m-1")
    assert record["input_tokens"] is None


@pytest.mark.parametrize(
    "failure",
    [
        b'data: {"choices":[{"delta":{},"finish_reason":"error","error":{"code":502}}]}\n\n',
        b"event: error\ndata: Internal Network Failure\n\n",
        b'data: {"message":"no","type":"server_error"}\n\n',
    ],
)
def test_a_failure_in_any_form_is_a_failure(live: LiveProxy, failure: bytes) -> None:
    """Whether or not the stream then ends with its marker."""
    for number, end in enumerate(((), (DONE,))):
        live.reply(chunked_response(CHUNKS[0], failure, *end))
        path = f"/p/failure-{number}-{len(failure)}/{CHAT}"
        live.get(post(path))
        record = trace_of(live.daemon, path=path)
        assert outcome(record)[:2] == ("upstream_failed", False)
        assert record["degraded"] == []


def test_a_bomb_costs_the_record_and_nothing_else(live: LiveProxy) -> None:
    """Mebibytes of zeros under a few kibibytes of gzip: the client has them as they came."""
    coder = zlib.compressobj(9, wbits=31)
    bomb = b"".join(coder.compress(bytes(1024**2)) for _ in range(64)) + coder.flush()
    head = SSE.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")

    live.reply(head, chunked(bomb), LAST)
    path = f"/kept/bomb/{CHAT}"
    before = live.daemon.metrics().get('llmproxy_tap_degraded_total{reason="bomb"}', 0)
    assert live.get(post(path)).body == bomb
    record = trace_of(live.daemon, path=path)
    assert (record["end_reason"], record["degraded"]) == ("complete", ["bomb", "overlong"])
    after = live.daemon.metrics()['llmproxy_tap_degraded_total{reason="bomb"}']
    assert after - before == 1
