"""A provider that a test directs: it keeps what arrives, and responds as the test says.

Left alone it gives each dialect's shortest whole response, as the dialect's published shape has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.support.daemon import Daemon
from tests.support.scripts import LAST
from tests.support.sockets import WAIT, Received, Wire, chunked

PATHS = {"openai": b"/v1/chat/completions", "anthropic": b"/v1/messages", "ollama": b"/api/chat"}

STREAM_TYPES = {
    "openai": b"text/event-stream",
    "anthropic": b"text/event-stream",
    "ollama": b"application/x-ndjson",
}

_TEXT = "Hello there"


def whole(sdk: str) -> bytes:
    """Return a whole response's body."""
    return json.dumps(_WHOLE[sdk]).encode()


def events(sdk: str) -> list[bytes]:
    """Return a stream's body, event by event; the SDKs give an object for each but ``[DONE]``."""
    lines = [json.dumps(data).encode() for data in _EVENTS[sdk]]
    if sdk == "ollama":
        return [line + b"\n" for line in lines]
    if sdk == "openai":
        return [b"data: %b\n\n" % line for line in (*lines, b"[DONE]")]
    kinds = [json.loads(line)["type"].encode() for line in lines]
    return [b"event: %b\ndata: %b\n\n" % pair for pair in zip(kinds, lines, strict=True)]


def chunked_events(sdk: str) -> list[bytes]:
    """Return the same, each event as one chunk; the last chunk is not among them."""
    return [chunked(event) for event in events(sdk)]


def stream_head(sdk: str) -> bytes:
    """Return the head of a streamed response, in the chunked coding."""
    kind = STREAM_TYPES[sdk]
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % kind


def sdk_of(request: Received) -> str:
    """Tell whose request it is, by its path."""
    path = request.target.partition(b"?")[0]
    return next(sdk for sdk, end in PATHS.items() if path.endswith(end.removeprefix(b"/v1")))


def asks_for_stream(request: Received) -> bool:
    """Tell whether a stream is asked for."""
    asked = json.loads(request.body)
    return bool(asked.get("stream", sdk_of(request) == "ollama"))


Response = Callable[[Wire, Received], None]
"""Writes the response to a request; the connection is then read for another."""


class DirectedProvider:
    """Responds to every request on every connection, as the test says at that moment.

    Attributes:
        received: the requests since the last :meth:`reset`, oldest first.
        response: what responds; a test puts its own here.
        proxy: the daemon in front of it.
    """

    proxy: Daemon

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.response: Response = respond_shortly

    def reset(self) -> None:
        """Forget what arrived, and respond shortly again."""
        self.received = []
        self.response = respond_shortly

    def play(self, wire: Wire) -> None:
        """Serve one connection; a script for ``tests.support.sockets.Provider``."""
        while True:
            wire.sock.settimeout(None)  # a connection in a pool is idle for as long as it likes
            request = wire.read_request()
            wire.sock.settimeout(WAIT)
            self.received.append(request)
            self.response(wire, request)


def respond_shortly(wire: Wire, request: Received) -> None:
    """Send the dialect's shortest whole response, streamed where that is asked for."""
    sdk = sdk_of(request)
    if asks_for_stream(request):
        wire.send(stream_head(sdk), *chunked_events(sdk), LAST)
    else:
        send_json(wire, whole(sdk))


def send_json(wire: Wire, body: bytes, *, status: int = 200, encoding: bytes = b"") -> None:
    """Send a JSON body with its length, and the encoding that it is in, if any."""
    wire.send(b"HTTP/1.1 %d Status\r\ncontent-type: application/json\r\n" % status)
    if encoding:
        wire.send(b"content-encoding: %b\r\n" % encoding)
    wire.send(b"content-length: %d\r\n\r\n" % len(body), body)


def _openai_chunk(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    shell = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**shell, "choices": [choice]}


def _ollama_line(text: str, *, done: bool = False) -> dict[str, object]:
    shell = {"model": "m", "created_at": "2025-01-01T00:00:00Z", "done": done}
    end: dict[str, object] = {"done_reason": "stop"} if done else {}
    return {**shell, "message": {"role": "assistant", "content": text}, **end}


def _anthropic_delta(text: str) -> dict[str, object]:
    delta = {"type": "text_delta", "text": text}
    return {"type": "content_block_delta", "index": 0, "delta": delta}


_MESSAGE: dict[str, object] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}

_WHOLE: dict[str, dict[str, object]] = {
    "openai": {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": _TEXT},
                "finish_reason": "stop",
            }
        ],
    },
    "anthropic": {
        **_MESSAGE,
        "content": [{"type": "text", "text": _TEXT}],
        "stop_reason": "end_turn",
    },
    "ollama": _ollama_line(_TEXT, done=True),
}

_EVENTS: dict[str, list[dict[str, object]]] = {
    "openai": [
        _openai_chunk({"role": "assistant", "content": ""}),
        _openai_chunk({"content": "Hello"}),
        _openai_chunk({"content": " there"}),
        _openai_chunk({}, "stop"),
    ],
    "anthropic": [
        {"type": "message_start", "message": _MESSAGE},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        _anthropic_delta("Hello"),
        _anthropic_delta(" there"),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 2},
        },
        {"type": "message_stop"},
    ],
    "ollama": [_ollama_line("Hello"), _ollama_line(" there"), _ollama_line("", done=True)],
}
