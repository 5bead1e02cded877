"""Padding and heartbeats on the wire: what an SDK reads, and where not a byte is added."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anthropic
import openai
import pytest

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.filler import heartbeat, padding
from tests.support.daemon import provider_table, route_table
from tests.support.live_proxy import (
    LiveProxy,
    assert_settles,
    client_config,
    live_fixture,
    trace_of,
)
from tests.support.scripts import DONE, SSE, event
from tests.support.sockets import WAIT, Wire

KEY = "sk-team"
BEATS = 'heartbeat = "50ms"'
NDJSON = SSE.replace(b"text/event-stream", b"application/x-ndjson")
JSON = SSE.replace(b"text/event-stream", b"application/json")
GZIP = SSE.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")

live = live_fixture(
    "".join(
        provider_table(name, dialect=name)
        + route_table(f"/{name}", name, BEATS)
        + route_table(f"/{name}/long", name, BEATS, 'heartbeat_bytes = "2KiB"')
        + route_table(f"/{name}/padded", name, 'padding = "1KiB"')
        + route_table(f"/{name}/off", name, "padding = '0'", 'heartbeat = "off"')
        for name in ("openai", "anthropic")
    )
    + client_config("team", KEY)
)


def read_beats(client: Wire, beat: bytes, count: int) -> None:
    """Read so many heartbeats, each a chunk of its own, and nothing else."""
    for _ in range(count):
        assert client.read_chunk() == beat


@pytest.mark.parametrize("name", ["openai", "anthropic"])
@pytest.mark.parametrize(("path", "least"), [("", 0), ("/long", 2048)])
def test_a_silent_provider(live: LiveProxy, name: str, path: str, least: int) -> None:
    """Before the first event, between events and behind the last one; bytes count, chunks not."""
    turn = live.stream(event(0), event(1))
    beat = heartbeat(Dialect(name), least)
    with live.begin(f"/{name}{path}/x") as client:
        read_beats(client, beat, 2)
        sizes = 0
        for number in range(2):
            turn.give()
            while (piece := client.read_chunk()) == beat:
                sizes += len(beat)
            assert piece == event(number)
            read_beats(client, beat, 2)
        turn.give()
        while piece := client.read_chunk():
            assert piece == beat
            sizes += len(beat)
    record = trace_of(live.daemon, path=f"/{name}{path}/x")
    assert record["bytes_out"] == 2 * len(event(0)) + 6 * len(beat) + sizes
    assert (record["chunks"], record["end_reason"]) == (2, "complete")


def test_padding_leaves_with_the_head(live: LiveProxy) -> None:
    """Before the provider's first event, however long that takes."""
    turn = live.stream(event(0))
    with live.begin("/openai/padded/x") as client:
        assert client.read_chunk() == padding(1024)
        turn.give(2)
        assert client.read_chunk() == event(0)
        assert client.read_chunk() == b""


@pytest.mark.parametrize(
    ("path", "head", "body"),
    [
        ("/openai", NDJSON, b'{"n":0}\n'),
        ("/openai", JSON, b"{}"),
        ("/openai", GZIP, gzip.compress(event(0))),
        ("/openai/padded", GZIP, gzip.compress(event(0))),
        ("/openai/padded", NDJSON, b'{"n":0}\n'),
        ("/openai/off", SSE, event(0)),
    ],
    ids=["ndjson", "json", "gzip", "padded-gzip", "padded-ndjson", "off"],
)
def test_where_nothing_is_added(live: LiveProxy, path: str, head: bytes, body: bytes) -> None:
    """While another stream gets its third heartbeat, this one gets nothing but its provider's."""
    other = live.stream()
    with live.begin("/openai/beats") as beats:
        turn = live.stream(body, head=head)
        with live.begin(f"{path}/still") as still:
            for wanted in (body, b""):
                read_beats(beats, heartbeat(Dialect.OPENAI, 0), 3)
                turn.give()
                assert still.read_chunk() == wanted
        other.give()
    assert_settles(live.daemon)


@contextmanager
def beaten(live: LiveProxy, *events: bytes) -> Iterator[None]:
    """Let the provider stream, and be silent for three heartbeats before each event."""
    other = live.stream()
    with live.begin("/openai/beats") as beats:
        turn = live.stream(*events)

        def conduct() -> None:
            for _ in range(len(events) + 1):
                read_beats(beats, heartbeat(Dialect.OPENAI, 0), 3)
                turn.give()

        thread = threading.Thread(target=conduct)
        thread.start()
        yield
        thread.join(WAIT)
        other.give()


def test_openai_s_sdk_reads_past_them(live: LiveProxy) -> None:
    """And what it reads is what the provider sent."""
    events = [_chunk("a"), _chunk("b"), DONE]
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{live.daemon.port}/openai/sdk/v1", api_key=KEY, max_retries=0
    )
    with beaten(live, *events):
        found = client.chat.completions.create(model="m", messages=[], stream=True)
        assert [one.choices[0].delta.content for one in found] == ["a", "b"]
    record = trace_of(live.daemon, path="/openai/sdk/v1/chat/completions")
    assert record["bytes_out"] >= len(b"".join(events)) + 6 * len(heartbeat(Dialect.OPENAI, 0))


def test_anthropic_s_sdk_reads_past_them(live: LiveProxy) -> None:
    """Its helper puts the message together as without them."""
    message = {"id": "m", "type": "message", "role": "assistant", "content": [], "model": "m"}
    usage = {"input_tokens": 1, "output_tokens": 1}
    text = {"type": "text", "text": ""}
    kinds: list[tuple[str, dict[str, object]]] = [
        ("message_start", {"message": {**message, "usage": usage}}),
        ("content_block_start", {"index": 0, "content_block": text}),
        ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "hello"}}),
        ("content_block_stop", {"index": 0}),
        ("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}),
        ("message_stop", {}),
    ]
    events = [
        f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()
        for kind, more in kinds
    ]
    client = anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{live.daemon.port}/anthropic/sdk", api_key=KEY, max_retries=0
    )
    with (
        beaten(live, *events),
        client.messages.stream(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "x"}]
        ) as found,
    ):
        assert found.get_final_text() == "hello"
    record = trace_of(live.daemon, path="/anthropic/sdk/v1/messages")
    beat = heartbeat(Dialect.ANTHROPIC, 0)
    assert record["bytes_out"] >= len(b"".join(events)) + 6 * len(beat)
    assert record["output_tokens"] == 2


def _chunk(text: str) -> bytes:
    found = {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}}],
    }
    return b"data: " + json.dumps(found).encode() + b"\n\n"
