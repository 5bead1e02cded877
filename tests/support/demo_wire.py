"""A demo provider on a clock that stands still, asked byte by byte, and what to ask it."""

from __future__ import annotations

import json
from typing import Any, cast

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.web.server import Site

from llmproxy.cli.demo import PromptCache, demo_site
from llmproxy.cli.demo.replay import Capsule

SAID = "the quick brown fox"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SAID}]
PROMPT_WORDS = 6
TOOL_MESSAGES: Any = [{"role": "user", "content": "Please use the tool for Oslo"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
}
ARGUMENTS = {"city": "demo", "days": 1}
FUNCTION: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
ANTHROPIC_TOOL: Any = {"name": "weather", "input_schema": SCHEMA}

ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": SAID},
    "/v1/responses": {"input": MESSAGES},
    "/v1/embeddings": {"input": SAID},
    "/v1/messages": {"messages": MESSAGES},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": SAID},
    "/api/embed": {"input": SAID},
    "/api/embeddings": {"prompt": SAID},
}
"""What each endpoint is asked, beside a model and whether a stream is wanted."""

STREAM_ENDS = {
    "/v1/chat/completions": b"data: [DONE]\n\n",
    "/v1/completions": b"data: [DONE]\n\n",
    "/v1/responses": b"event: response.completed\n",
    "/v1/messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    "/api/chat": b'"done":true',
    "/api/generate": b'"done":true',
}
"""What only the last event of a stream has, for each endpoint that streams."""


def dialect_of(path: str) -> str:
    """Return whose endpoint that is."""
    if path.startswith("/api/"):
        return "ollama"
    return "anthropic" if path.startswith("/v1/messages") else "openai"


class TurnClock(Clock):
    """A clock on which, as in a reactor, a call made during one turn waits for the next."""

    def advance(self, amount: float) -> None:
        """Let so many seconds pass, and take one turn."""
        self.rightNow += amount
        for call in [call for call in self.calls if call.getTime() <= self.seconds()]:
            if call.active():
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)


class DemoConnection:
    """A connection to a demo provider whose time stands still."""

    def __init__(
        self,
        *,
        pace: float | None = None,
        caching: bool = False,
        capsule: Capsule | None = None,
    ) -> None:
        self.clock = TurnClock()
        cache = PromptCache(self.clock.seconds) if caching else None
        self.site: Site = demo_site(
            cast(IReactorTime, self.clock), pace=pace, cache=cache, capsule=capsule
        )
        self.transport: Any = StringTransport()  # type: ignore[no-untyped-call, unused-ignore]  # Twisted's has no types
        build: Any = self.site.buildProtocol
        self.protocol: Any = build(None)
        self.protocol.makeConnection(self.transport)

    def post(self, path: str, body: bytes, *fields: str) -> None:
        """Send a POST."""
        head = [f"POST {path} HTTP/1.1", "Host: demo", f"Content-Length: {len(body)}", *fields]
        self.protocol.dataReceived("\r\n".join([*head, "", ""]).encode() + body)

    def ask(self, path: str, model: str, *fields: str, stream: bool = True, **more: Any) -> None:
        """Ask a model, at the endpoint of that path."""
        body = {"model": model, "stream": stream, **ASKED[path], **more}
        self.post(path, json.dumps(body).encode(), *fields)

    def get(self, path: str, *fields: str) -> None:
        """Send a GET."""
        head = [f"GET {path} HTTP/1.1", "Host: demo", *fields, "", ""]
        self.protocol.dataReceived("\r\n".join(head).encode())

    def taken(self) -> bytes:
        """What was written since the last look."""
        data: bytes = self.transport.value()
        self.transport.clear()
        return data

    def turn(self, seconds: float = 0.0, *, turns: int = 1) -> bytes:
        """Let time pass so often, and see what was written."""
        for _ in range(turns):
            self.clock.advance(seconds)
        return self.taken()

    def response(self) -> tuple[int, dict[str, Any]]:
        """Status and document of a response that was written at once."""
        head, body = self.taken().split(b"\r\n\r\n", 1)
        return int(head.split()[1]), json.loads(body)

    def whole(
        self, path: str, model: str = "demo-fast", *fields: str, **more: Any
    ) -> dict[str, Any]:
        """Ask for a response in one piece; return its document."""
        self.ask(path, model, *fields, stream=False, **more)
        self.clock.advance(0)
        status, document = self.response()
        assert status == 200, document
        self.clock.advance(0)  # the response ends, and the next request may come
        return document

    def events(self, path: str, model: str = "demo-fast", **more: Any) -> list[bytes]:
        """Ask for a stream that ends properly; return its events."""
        self.ask(path, model, **more)
        assert self.taken().startswith(b"HTTP/1.1 200 OK\r\n")
        chunks = [written.split(b"\r\n", 1)[1] for written in iter(self.turn, b"")]
        assert chunks.pop() == b"\r\n", "the response did not end"
        return [chunk.removesuffix(b"\r\n") for chunk in chunks]

    def timers(self) -> int:
        """How many calls wait, but for the connection's own idle timeout."""
        named = [
            call for call in cast(Any, self.clock).getDelayedCalls() if "Flow" in repr(call.func)
        ]
        return len(named)

    def leave(self) -> None:
        """The client goes away."""
        self.protocol.connectionLost(Failure(ConnectionDone()))  # type: ignore[no-untyped-call, unused-ignore]  # so has this
