"""The tap: its verdict, its bounds, and that no fault of it reaches the stream."""

from __future__ import annotations

import gc
import gzip
import itertools
import tracemalloc
import weakref
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from llmproxy.dialects.accumulated import Accumulated, ProviderError, Usage
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.endpoints import endpoint
from llmproxy.errors import EndReason
from llmproxy.stream.decompress import Decompressor
from llmproxy.stream.events import ServerSentEvents
from llmproxy.stream.tap import Degraded, DocumentTap, Result, StreamAccumulator, read_document
from tests.conftest import LoggedFailures
from tests.support.golden import BY_FILE, RECORDED

CHAT = BY_FILE["openai-chat-usage.sse"]
SSE = b"text/event-stream"
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"type":"t","message":"m"}}\n\n'


def chunk(content: str, rest: str = "") -> bytes:
    """Return one chunk of a chat stream."""
    delta = f'{{"index":0,"delta":{{"content":"{content}"}},"finish_reason":null}}'
    return f'data: {{"id":"x","model":"m","choices":[{delta}]{rest}}}\n\n'.encode()


def chat(**options: Any) -> StreamAccumulator:
    """Return a tap for a chat stream that keeps the content."""
    row = endpoint(Dialect.OPENAI, b"/v1/chat/completions")
    assert row is not None
    options.setdefault("content_type", SSE)
    options.setdefault("capture", "content")
    return StreamAccumulator(row, **options)


# --- the verdict ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "end", "verdict"),
    [
        ([chunk("a"), DONE], EndReason.COMPLETE, EndReason.COMPLETE),
        ([chunk("a"), DONE], EndReason.CLIENT_GONE, EndReason.COMPLETE),
        ([chunk("a"), DONE], EndReason.UPSTREAM_BROKEN, EndReason.UPSTREAM_BROKEN),
        ([chunk("a"), DONE], EndReason.DRAINED, EndReason.DRAINED),
        ([chunk("a"), DONE.rstrip()], EndReason.CLIENT_GONE, EndReason.COMPLETE),
        ([chunk("a")], EndReason.COMPLETE, EndReason.UNFINISHED),
        ([], EndReason.COMPLETE, EndReason.UNFINISHED),
        ([chunk("a")], EndReason.CLIENT_GONE, EndReason.CLIENT_GONE),
        ([chunk("a")], EndReason.UPSTREAM_BROKEN, EndReason.UPSTREAM_BROKEN),
        ([chunk("a")], EndReason.UPSTREAM_IDLE, EndReason.UPSTREAM_IDLE),
        ([chunk("data: [DONE]")], EndReason.COMPLETE, EndReason.UNFINISHED),
        ([chunk("a"), ERROR], EndReason.COMPLETE, EndReason.UPSTREAM_FAILED),
        ([chunk("a"), ERROR, DONE], EndReason.COMPLETE, EndReason.UPSTREAM_FAILED),
        ([chunk("a"), ERROR], EndReason.CLIENT_GONE, EndReason.UPSTREAM_FAILED),
        ([chunk("a"), ERROR], EndReason.UPSTREAM_BROKEN, EndReason.UPSTREAM_FAILED),
        ([chunk("a"), ERROR], EndReason.KILLED, EndReason.KILLED),
        ([ERROR], EndReason.UPSTREAM_REFUSED, EndReason.UPSTREAM_REFUSED),
    ],
)
@pytest.mark.parametrize("capture", ["usage", "content"])
def test_marker_and_error_decide_the_end(
    stream: list[bytes], end: EndReason, verdict: EndReason, capture: str
) -> None:
    """The end marker and the provider's error correct the end that the relay saw."""
    tap = chat(capture=capture)
    for data in stream:
        tap.feed(data)
    result = tap.finish(end)
    assert result.end_reason is verdict
    assert result.is_complete == (verdict is EndReason.COMPLETE)


ENDED = [
    one.file
    for one in RECORDED
    if one.result.is_complete and not one.file.endswith((".json", ".array", "odd.sse"))
]


@pytest.mark.parametrize("file", ENDED)
def test_a_stream_without_its_last_event_is_unfinished(file: str) -> None:
    """This holds for every recorded stream that ends well."""
    one = BY_FILE[file]
    separator = b"\n" if file.endswith(".ndjson") else b"\n\n"
    lines = one.data.replace(b"\r\n", b"\n").rstrip().split(separator)
    assert one.read([one.data]).end_reason is EndReason.COMPLETE
    cut = separator.join(lines[:-1]) + separator
    assert one.read([cut]).end_reason is EndReason.UNFINISHED
    assert one.read([cut], "usage").end_reason is EndReason.UNFINISHED


NEED_THEIR_BLANK_LINE = ("anthropic-messages", "openai-responses", "gemini-generate")


@pytest.mark.parametrize("file", ENDED)
@pytest.mark.parametrize("end", [EndReason.COMPLETE, EndReason.CLIENT_GONE])
def test_a_marker_without_its_blank_line_is_none_where_sdks_do_not_see_it(
    file: str, end: EndReason
) -> None:
    """The SDKs of some APIs drop such an event; its counts are read nevertheless."""
    one = BY_FILE[file]
    data = one.data.rstrip()
    is_lost = file.startswith(NEED_THEIR_BLANK_LINE)
    lost = EndReason.UNFINISHED if end is EndReason.COMPLETE else end
    for chunks in ([data], [data[:-1], data[-1:]], [data, b"\n"]):
        result = one.read(chunks, end=end)
        assert result.end_reason is (lost if is_lost else EndReason.COMPLETE)
        assert result.usage.output_tokens == one.result.usage.output_tokens
    assert one.read([data, b"\n", b"\n"], end=end).end_reason is EndReason.COMPLETE


def test_an_odd_marker_without_its_blank_line_is_none_either() -> None:
    """An event that cannot be read may be the marker only if the SDKs see it."""
    one = BY_FILE["anthropic-messages.sse"]
    odd = one.data.replace(b'"type":"message_stop"', b'"type":"message_stop",}').rstrip()
    assert odd != one.data.rstrip()
    assert one.read([odd, b"\n\n"]).end_reason is EndReason.COMPLETE
    assert one.read([odd]).end_reason is EndReason.UNFINISHED


@pytest.mark.parametrize("end", [EndReason.COMPLETE, EndReason.CLIENT_GONE])
def test_an_array_must_be_closed(end: EndReason) -> None:
    """Gemini's last item ends no stream that no reader of JSON can read."""
    one = BY_FILE["gemini-generate.array"]
    assert one.read([one.data], end=end).end_reason is EndReason.COMPLETE
    items = one.data.rstrip(b"]\n")
    lost = EndReason.UNFINISHED if end is EndReason.COMPLETE else end
    assert one.read([items], end=end).end_reason is lost
    assert one.read([items[: items.rfind(b",\r\n")], b"]"], end=end).end_reason is lost


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        (b"/v1/chat/completions", b"application/json"),
        (b"/v1/chat/completions", b"text/html"),
        (b"/v1/chat/completions", None),
        (b"/v1/embeddings", SSE),
    ],
)
def test_a_response_without_marker_is_never_unfinished(
    path: bytes, content_type: bytes | None
) -> None:
    """A document, an unread type and an endpoint without marker simply end."""
    row = endpoint(Dialect.OPENAI, path)
    assert row is not None
    tap = StreamAccumulator(row, content_type=content_type)
    assert tap.finish(EndReason.COMPLETE).is_complete


def test_usage_error_and_marker_are_known_during_the_stream() -> None:
    """Usage is partial until the end marker comes."""
    tap = chat(capture="usage")
    tap.feed(chunk("a", ',"usage":{"prompt_tokens":3,"completion_tokens":1}'))
    assert tap.usage == Usage(input_tokens=3, output_tokens=1, provenance="partial")
    assert (tap.has_ended, tap.error, tap.events) == (False, None, 1)
    tap.feed(ERROR)
    assert tap.error == ProviderError("t", "m")
    tap.feed(DONE)
    assert tap.has_ended
    assert tap.usage.provenance == "reported"


# --- the result -----------------------------------------------------------------------------------


def test_every_waiter_gets_the_result() -> None:
    """Each Deferred fires with the one result, before and after the end; a cancelled one fails."""
    tap = chat()
    before: list[Result] = []
    failures: list[Failure] = []
    tap.wait().addCallback(before.append)
    cancelled = tap.wait().addErrback(failures.append)
    tap.wait().addCallback(before.append)
    cancelled.cancel()
    assert [failure.check(CancelledError) for failure in failures] == [CancelledError]
    tap.feed(chunk("a"))
    assert before == []
    result = tap.finish(EndReason.COMPLETE)
    assert tap.finish(EndReason.KILLED) is result
    after: list[Result] = []
    tap.wait().addCallback(after.append)
    assert before == [result, result]
    assert after == [result]


def test_bytes_after_the_end_change_nothing() -> None:
    """A tap with a result reads no more."""
    tap = chat()
    result = tap.finish(EndReason.CLIENT_GONE)
    tap.feed(chunk("a") + DONE)
    assert (tap.events, tap.has_ended, tap.finish(EndReason.COMPLETE)) == (0, False, result)


def test_a_body_that_breaks_inside_an_event() -> None:
    """The half event is neither read nor a fault; in a whole body it is a fault."""
    half = chunk("b")[:-10]
    for end in (EndReason.UPSTREAM_BROKEN, EndReason.CLIENT_GONE):
        tap = chat()
        tap.feed(chunk("a") + half)
        assert (tap.finish(end).text, tap.degraded) == ("a", ())
    tap = chat()
    tap.feed(chunk("a") + half)
    assert tap.finish(EndReason.COMPLETE).degraded == (Degraded.UNREADABLE,)


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "data", "reason"),
    [
        ({"content_encoding": b"compress"}, [], Degraded.ENCODING),
        ({"content_encoding": b"gzip"}, [b"no gzip"] * 3, Degraded.ENCODING),
        (
            {"content_encoding": b"gzip"},
            [gzip.compress(b": %b\n\n" % (b"x" * 1000) * 20_000)],
            Degraded.BOMB,
        ),
        ({"event": 100}, [b"data: " + b"x" * 200 + b"\n\n"] * 3, Degraded.OVERLONG),
        ({}, [b"data\n" * 20_000 + b"\n"] * 2, Degraded.OVERLONG),
        ({}, [b"data: {nonsense\n\n"] * 3, Degraded.UNREADABLE),
        ({}, [b'data: {"choices":7}\n\n'], Degraded.UNREADABLE),
        ({}, [b'data: {"id":"\xff"}\n\n'], Degraded.UNREADABLE),
        ({}, [b'data: {"x":' + b"[" * 100_000 + b"\n\n"], Degraded.UNREADABLE),
    ],
)
def test_each_degradation_is_reported_once(
    options: dict[str, Any], data: list[bytes], reason: Degraded
) -> None:
    """A fault marks the result, and is reported once; only a tap that ended misses no marker."""
    reported: list[Degraded] = []
    tap = chat(degraded=reported.append, **options)
    for each in data:
        tap.feed(each)
    result = tap.finish(EndReason.COMPLETE)
    ended = reason in (Degraded.ENCODING, Degraded.BOMB)
    assert (result.degraded, result.is_complete) == ((reason,), ended)
    assert reported == [reason]


def test_the_events_after_an_unread_event_are_read() -> None:
    """An overlong or broken event is left out; usage and marker after it are found."""
    tap = chat(event=800)
    tap.feed(b"data: {nonsense\n\n" + b"data: " + b"x" * 1000 + b"\n\n" + CHAT.data)
    result = tap.finish(EndReason.COMPLETE)
    assert result.degraded == (Degraded.OVERLONG, Degraded.UNREADABLE)
    assert (result.usage.input_tokens, result.is_complete) == (19, True)


@pytest.mark.parametrize("data", [b"data: \n\n", b"data:\n\n", b": x\n\n", b"data:  \r\n\r\n"])
def test_an_empty_event_is_nothing(data: bytes) -> None:
    """Servers send it to keep a connection alive."""
    tap = chat()
    tap.feed(data)
    assert tap.finish(EndReason.UPSTREAM_BROKEN).degraded == ()


@pytest.mark.parametrize(
    "data", [b"data:  [DONE]\n\n", b"data:   [DONE] \n\n", b"data:[DONE]\n\n", b"data: [DONE]x"]
)
@pytest.mark.parametrize("capture", ["usage", "content"])
def test_the_marker_may_have_blanks_around_it(data: bytes, capture: str) -> None:
    """Clients trim it, too."""
    tap = chat(capture=capture)
    tap.feed(chunk("a") + data)
    result = tap.finish(EndReason.CLIENT_GONE if data.endswith(b"\n") else EndReason.COMPLETE)
    assert (result.end_reason, result.degraded) == (EndReason.COMPLETE, ())


NAN = b'data: {"choices":[{"delta":{"content":"b"},"logprobs":NaN}]}\n\n'


@pytest.mark.parametrize(
    ("file", "unread", "verdict"),
    [
        ("openai-chat.sse", NAN, EndReason.UNFINISHED),
        ("openai-chat.sse", b"data: {broken\n\n", EndReason.UNFINISHED),
        ("openai-chat.sse", b"data: {broken [DONE]\n\n", EndReason.UNFINISHED),
        ("openai-chat.sse", b"data: <p>Bad gateway\n\n", EndReason.UNFINISHED),
        ("openai-chat.sse", b"data: [done]\n\n", EndReason.COMPLETE),
        ("openai-chat.sse", b"data: [DO\n\n", EndReason.COMPLETE),
        ("openai-chat.sse", b"data: [1, 2\n\n", EndReason.UNFINISHED),
        ("openai-chat.sse", b"data: " + b"x" * 3000 + b"\n\n", EndReason.UNFINISHED),
        ("anthropic-messages.sse", b"data: {broken\n\n", EndReason.UNFINISHED),
        ("anthropic-messages.sse", b'data: {"type":"message_stop"\n\n', EndReason.COMPLETE),
        ("anthropic-messages.sse", b"data: " + b"x" * 3000 + b"\n\n", EndReason.UNFINISHED),
        ("openai-responses.sse", b"data: {broken\n\n", EndReason.UNFINISHED),
        ("openai-responses.sse", b'data: {"type":"response.failed",\n\n', EndReason.COMPLETE),
        ("openai-responses.sse", b"data: " + b"x" * 3000 + b"\n\n", EndReason.COMPLETE),
        ("ollama-chat.ndjson", b'{"done":false,\n', EndReason.UNFINISHED),
        ("ollama-chat.ndjson", b'{"done": true,\n', EndReason.COMPLETE),
        ("ollama-chat.ndjson", b"x" * 3000 + b"\n", EndReason.COMPLETE),
    ],
)
@pytest.mark.parametrize("capture", ["usage", "content"])
def test_only_an_unread_event_that_may_be_the_marker_stands_for_it(
    file: str, unread: bytes, verdict: EndReason, capture: Any
) -> None:
    """Any other one says nothing about a marker that did not come; with it, all is well."""
    one = BY_FILE[file]
    separator = b"\n" if file.endswith(".ndjson") else b"\n\n"
    first, *events = [event + separator for event in one.data.strip().split(separator)]
    result = one.read([first, unread, *events[:-1]], capture, event=2000)
    assert (result.end_reason, len(result.degraded)) == (verdict, 1)
    whole = one.read([first, unread, *events], capture, event=2000)
    assert (whole.end_reason, whole.usage) == (EndReason.COMPLETE, one.result.usage)


@pytest.mark.parametrize("data", [b"Internal Network Failure", b'{"message":"m"}', b'"m"', b"{"])
@pytest.mark.parametrize(
    "file", ["openai-chat.sse", "anthropic-messages.sse", "openai-responses.sse"]
)
@pytest.mark.parametrize("capture", ["usage", "content"])
def test_an_event_named_error_is_an_error(file: str, data: bytes, capture: Any) -> None:
    """Whatever its data are, whether or not the stream then ends as it should."""
    one = BY_FILE[file]
    event = b"event: error\ndata: %b\n\n" % data
    for chunks in ([one.data, event], [event, one.data], [event]):
        result = one.read(chunks, capture)
        assert (result.end_reason, result.degraded) == (EndReason.UPSTREAM_FAILED, ())


def test_an_event_named_error_may_hold_a_known_error() -> None:
    """Its type and its message are found."""
    tap = chat()
    tap.feed(b"event: error\n" + ERROR)
    assert tap.error == ProviderError("t", "m")


@pytest.mark.parametrize("coding", [b"gzip", b"deflate"])
def test_a_compressed_body_that_is_cut_is_degraded(coding: bytes) -> None:
    """Its framing ended well, and the coding did not; without the marker it is unfinished."""
    packer = zlib.compressobj(wbits=31 if coding == b"gzip" else 15)
    whole = packer.compress(CHAT.data) + packer.flush(zlib.Z_SYNC_FLUSH)
    result = CHAT.read([whole], content_encoding=coding)
    assert (result.end_reason, result.degraded) == (EndReason.COMPLETE, (Degraded.ENCODING,))
    assert result.usage == CHAT.result.usage
    result = CHAT.read([whole[: len(whole) // 2]], content_encoding=coding)
    assert (result.end_reason, result.degraded) == (EndReason.UNFINISHED, (Degraded.ENCODING,))
    result = CHAT.read(
        [whole[: len(whole) // 2]], "usage", EndReason.UPSTREAM_BROKEN, content_encoding=coding
    )
    assert (result.end_reason, result.degraded) == (EndReason.UPSTREAM_BROKEN, ())
    assert CHAT.read([], content_encoding=coding).degraded == ()


def test_a_long_odd_document_is_read_at_its_ends() -> None:
    """It is too long to be decoded tolerantly; names and counts are found nevertheless."""
    one = BY_FILE["openai-chat.json"]
    long = one.data.replace(b"Hello!", b"Hello \n " + b"x" * 500_000)
    result = one.read([long], "usage")
    assert (result.usage, result.degraded) == (one.result.usage, (Degraded.UNREADABLE,))


def test_another_dialects_marker_is_nothing() -> None:
    """``[DONE]`` neither ends a stream with another marker nor degrades its tap."""
    one = BY_FILE["openai-responses.sse"]
    assert one.read([one.data, DONE]).degraded == ()
    assert one.read([DONE]).end_reason is EndReason.UNFINISHED


def broken(*_: Any, **__: Any) -> None:
    """Raise an error that no code expects."""
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (ServerSentEvents, "feed"),
        (Decompressor, "feed"),
        (ServerSentEvents, "flush"),
        (Accumulated, "usage"),
    ],
)
def test_a_fault_of_ours_ends_only_the_tap(
    owner: type, method: str, monkeypatch: pytest.MonkeyPatch, logged_failures: LoggedFailures
) -> None:
    """The fault is logged once and reported once, nothing is raised, and the tap reads no more."""
    reported: list[Degraded] = []
    coding = b"gzip" if owner is Decompressor else None
    tap = chat(content_encoding=coding, degraded=reported.append)
    monkeypatch.setattr(owner, method, broken)
    for data in (chunk("a"), chunk("b"), DONE):
        tap.feed(data)
    assert tap.is_reading == (method != "feed")
    result = tap.finish(EndReason.COMPLETE)
    assert (result.is_complete, result.degraded) == (True, (Degraded.INTERNAL,))
    assert reported == [Degraded.INTERNAL]
    assert not tap.is_reading
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


@pytest.mark.parametrize("coding", [None, b"compress"])
def test_a_report_that_fails_is_logged(
    coding: bytes | None, logged_failures: LoggedFailures
) -> None:
    """The callback's error reaches neither the tap nor the stream."""
    tap = chat(content_encoding=coding, degraded=broken)
    tap.feed(b"data: {\n\n" + DONE)
    assert len(tap.finish(EndReason.COMPLETE).degraded) == 1
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


def test_a_row_that_raises_keeps_what_was_read(logged_failures: LoggedFailures) -> None:
    """A mistake in a row of the table loses only the events after it."""
    calls = itertools.count()

    def read(data: bytes, seen: Accumulated) -> None:
        seen.add_text(data.decode())
        if next(calls):
            raise KeyError

    tap = StreamAccumulator(
        Endpoint("x", Dialect.OPENAI, "chat", read, read), content_type=SSE, capture="content"
    )
    for data in (b"data: a\n\n", b"data: b\n\n", b"data: c\n\n"):
        tap.feed(data)
    assert tap.finish(EndReason.COMPLETE).text == "ab"
    assert len(logged_failures.flush(KeyError)) == 1


# --- bounds ---------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_a_stream() -> None:
    """An hour of ten events a second holds no more than its first minute."""
    tap = chat(accumulate=10_000)
    events = [chunk(f"token {n}") for n in range(100)]
    for n in range(600):
        tap.feed(events[n % 100])
    held = tap.held_bytes
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for n in range(36_000):
            tap.feed(events[n % 100])
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert (held <= 10_000, tap.held_bytes) == (True, 10_000)
    result = tap.finish(EndReason.COMPLETE)
    assert (result.is_cut, result.events) == (True, 36_600)
    assert result.text_bytes > 10_000 >= len(result.text)


def work_of(read: bytes) -> tuple[int, tuple[Degraded, ...]]:
    """Return how many events are read of one compressed read, and what is said of it."""
    tap = chat(capture="usage", content_encoding=b"gzip")
    tap.feed(gzip.compress(chunk("a")))
    before = tap.events
    tap.feed(read)
    return tap.events - before, tap.degraded


@pytest.mark.parametrize("event", [b"data:{}\n\n", b'data:{"a":0}\n\n', chunk("a"), b": \n\n"])
def test_one_read_brings_a_bounded_number_of_events(event: bytes) -> None:
    """However well they are compressed: what is more is given up, and the tap says so."""
    packed = gzip.compress(event * (50 * 1024**2 // len(event)))[: 80 * 1024]
    events, degraded = work_of(packed)
    assert events <= 3 * 1024**2 // 400
    assert degraded == (Degraded.BOMB,)


def test_a_compressed_stream_has_as_much_as_its_time_brings() -> None:
    """The tap's clock is that of the credit."""
    clock = Clock()
    taps = [chat(content_encoding=b"gzip", clock=one) for one in (clock.seconds, lambda: 0.0)]
    packer = zlib.compressobj(wbits=31)
    for _ in range(10):
        packed = packer.compress(chunk("a") * 3000) + packer.flush(zlib.Z_SYNC_FLUSH)
        for tap in taps:
            tap.feed(packed)
        clock.advance(0.1)
    assert [tap.degraded for tap in taps] == [(), (Degraded.BOMB,)]


def test_long_embeddings_are_counted() -> None:
    """The usage of an overlong document is found; only its content is missing."""
    one = BY_FILE["openai-embeddings.json"]
    long = one.data.replace(b"0.0023064255", b",".join([b"0.0023064255"] * 10_000))
    assert one.read([long], "usage", event=20_000) == one.result
    assert one.read([long], "content", event=20_000).degraded == (Degraded.OVERLONG,)


def test_an_overlong_document_without_usage_is_degraded() -> None:
    """Its two ends, which are kept, have no usage."""
    one = BY_FILE["openai-embeddings.json"]
    members = b"{" + b",".join(b'"%d":1' % n for n in range(5000)) + b"}"
    assert one.read([members], "usage", event=20_000).degraded == (Degraded.OVERLONG,)
    assert one.read([members], "usage").degraded == ()


def test_a_tap_that_ended_leaves_no_cycle() -> None:
    """The tap is freed at once, without the garbage collector."""
    tap = chat()
    tap.feed(CHAT.data[:500])
    tap.feed(b'\n\ndata: {\n\ndata: {"usage":""}\n\n' + DONE)
    tap.finish(EndReason.CLIENT_GONE)
    gone = weakref.ref(tap)
    gc.disable()
    try:
        del tap
        assert gone() is None
    finally:
        gc.enable()


GARBAGE = st.sampled_from(
    [b"data: ", b"\n", b"\r\n", b"\n\n", b"{", b"}", b'"', b'{"choices":[{"delta":', b"[DONE]"]
) | st.binary(max_size=40)


@given(
    st.sampled_from(RECORDED),
    st.sampled_from(["usage", "content"]),
    st.sampled_from([None, b"gzip", b"deflate", b"br", b"zstd", b"x"]),
    st.lists(GARBAGE, max_size=30),
    st.sampled_from(list(EndReason)),
)
def test_garbage(
    one: Any, capture: Any, coding: bytes | None, chunks: list[bytes], end: EndReason
) -> None:
    """Nothing is raised, and the bounds hold, whatever bytes come."""
    tap = one.tap(capture, content_encoding=coding, accumulate=50, event=100)
    for data in [one.data[:200], *chunks]:
        tap.feed(data)
        assert tap.held_bytes <= 50 + 101
    result = tap.finish(end)
    assert Degraded.INTERNAL not in result.degraded
    assert len(result.text.encode()) <= 50


@given(st.sampled_from(RECORDED), st.data())
def test_a_flipped_byte(one: Any, data: st.DataObject) -> None:
    """A stream with one wrong byte never raises."""
    body = bytearray(one.data)
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    result = one.read([bytes(body)])
    assert Degraded.INTERNAL not in result.degraded


# --- a document that came whole -------------------------------------------------------------------

DOCUMENTS = [one for one in RECORDED if one.file.endswith(".json")]


@pytest.mark.parametrize("end", EndReason)
@pytest.mark.parametrize("capture", ["usage", "content"])
@pytest.mark.parametrize("one", DOCUMENTS, ids=lambda one: one.file)
def test_a_whole_document_is_read_at_once(one: Any, capture: Any, end: EndReason) -> None:
    """What is found in it is what a tap finds that is fed with it, whatever the end was."""
    tap = whole(one, one.data, capture=capture)

    if one.row.has_lines:
        assert tap is None  # its streams are called the same
    else:
        assert tap is not None
        assert tap.finish(end) == one.read([one.data], capture, end)
        assert tap.events == 1


@given(st.sampled_from(DOCUMENTS), st.sampled_from(["usage", "content"]), st.data())
def test_an_odd_document_is_left_to_the_tap(one: Any, capture: Any, data: st.DataObject) -> None:
    """A wrong byte, or an end too early: either both find the same, or nothing is read at once."""
    body = bytearray(one.data[: data.draw(st.integers(1, len(one.data)))])
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))

    tap = whole(one, bytes(body), capture=capture)

    if tap is not None:
        complete = EndReason.COMPLETE
        assert tap.finish(complete) == one.read([bytes(body)], capture, complete)


@pytest.mark.parametrize(
    "changes",
    [
        {"content_encoding": b"identity"},
        {"content_type": b"text/event-stream"},
        {"content_type": None},
        {"event": 10},
    ],
)
def test_what_is_no_usual_document_is_left_to_the_tap(changes: dict[str, Any]) -> None:
    """It says less plainly what it is, or is too long."""
    assert whole(DOCUMENTS[0], DOCUMENTS[0].data, **changes) is None


def whole(one: Any, body: bytes, **changes: Any) -> DocumentTap | None:
    """Read a whole body at once."""
    options: dict[str, Any] = {
        "content_type": b"application/json",
        "content_encoding": None,
        "capture": "content",
        "accumulate": 1024**2,
        "event": 1024**2,
    }
    return read_document(one.row, body, **options | changes)
