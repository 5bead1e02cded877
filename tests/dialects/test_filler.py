"""What stands in a stream without a meaning: its size, and that real SDKs read past it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from anthropic._streaming import SSEDecoder as AnthropicDecoder
from httpx_sse import EventSource
from openai._streaming import SSEDecoder as OpenAIDecoder

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.filler import LEAST, heartbeat, padding

Read = Callable[[Iterator[bytes]], list[tuple[str | None, str]]]

OPENAI = (
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    'data: {"choices":[{"delta":{"content":"\u00e9"}}]}\r\n\r\n'.encode(),
    b": the provider's own\n\n",
    b"data: [DONE]\n\n",
)
ANTHROPIC = (
    b'event: message_start\ndata: {"type":"message_start"}\n\n',
    b'event: ping\ndata: {"type": "ping"}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
)


def by_openai(pieces: Iterator[bytes]) -> list[tuple[str | None, str]]:
    """Return the events that OpenAI's SDK reads."""
    return [(event.event, event.data) for event in OpenAIDecoder().iter_bytes(pieces)]


def by_anthropic(pieces: Iterator[bytes]) -> list[tuple[str | None, str]]:
    """Return the events that Anthropic's SDK reads, and does not drop."""
    events = [(event.event, event.data) for event in AnthropicDecoder().iter_bytes(pieces)]
    return [event for event in events if event[0] != "ping"]


def by_httpx_sse(pieces: Iterator[bytes]) -> list[tuple[str | None, str]]:
    """Return the events that httpx-sse reads."""
    fields = {"content-type": "text/event-stream"}
    source = EventSource(httpx.Response(200, headers=fields, content=pieces))
    return [(event.event, event.data) for event in source.iter_sse()]


@pytest.mark.parametrize("size", [0, LEAST, 4, 2048])
def test_padding_has_its_size(size: int) -> None:
    """To the byte, with the empty line behind it; and an SDK finds nothing in it."""
    assert len(padding(size)) == size
    assert by_openai(iter([padding(size)])) == []


@pytest.mark.parametrize("least", [0, 13, 14, 38, 39, 40, 41, 4096])
@pytest.mark.parametrize("dialect", Dialect)
def test_a_heartbeat_has_its_least_size(dialect: Dialect, least: int) -> None:
    """A byte more at most than is asked for, where it is not longer anyway."""
    beat = heartbeat(dialect, least)
    short = heartbeat(dialect, 0)
    assert max(least, len(short)) <= len(beat) <= max(least + 1, len(short))
    assert beat.endswith(b"\n\n")


@pytest.mark.parametrize("least", [0, 64])
@pytest.mark.parametrize(
    ("read", "dialect", "events"),
    [
        (by_openai, Dialect.OPENAI, OPENAI),
        (by_httpx_sse, Dialect.OPENAI, OPENAI),
        (by_anthropic, Dialect.ANTHROPIC, ANTHROPIC),
    ],
)
def test_sdks_read_the_same_events(
    read: Read, dialect: Dialect, events: tuple[bytes, ...], least: int
) -> None:
    """With padding and a heartbeat in every place, at every split of the bytes in two."""
    expected = read(iter([b"".join(events)]))
    assert expected
    beat = heartbeat(dialect, least)
    whole = padding(100) + beat + b"".join(event + beat for event in events)
    for at in range(len(whole) + 1):
        assert read(iter([whole[:at], whole[at:]])) == expected


BROWSER = Path(__file__).parents[1] / "browser"


def test_npm_s_parser_reads_the_same_events() -> None:
    """The one of the AI SDK, at every split in two, too."""
    if shutil.which("node") is None or not (BROWSER / "node_modules/eventsource-parser").is_dir():
        pytest.skip("eventsource-parser is not installed; make peers")
    beat = heartbeat(Dialect.OPENAI, 0)

    def read(whole: bytes) -> list[object]:
        command = ["node", str(BROWSER / "events.mjs")]
        done = subprocess.run(command, input=whole, capture_output=True, check=True, timeout=60)
        found: list[object] = json.loads(done.stdout)
        return found

    (expected,) = read(b"".join(OPENAI))
    assert expected
    assert read(padding(100) + beat + b"".join(event + beat for event in OPENAI)) == [expected]
