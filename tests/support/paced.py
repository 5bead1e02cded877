"""A paced stream for tests of the doctor: it speaks as ``/-/pace`` does, over blocking sockets.

Unlike that, it sends no field that keeps hops from holding it, unless it is told to.
"""

from __future__ import annotations

import json
import select
import time
from typing import Any
from urllib.parse import parse_qsl

from tests.support.scripts import LAST
from tests.support.sockets import Received, Wire, chunked

KINDS = {"sse": "text/event-stream", "ndjson": "application/x-ndjson"}
OPEN_FIELDS = ("X-Accel-Buffering: no", "Cache-Control: no-cache, no-transform")
"""What llmproxy sends with a stream, so that nobody holds it."""


class PacedServer:
    """A script that streams as the query says.

    Args:
        fields: further fields of the response.
        framing: ``chunked``, or ``close`` for a body that ends with the connection, as it does
            where HTTP/1.0 is asked for.
        unknown: words of the query that are refused, as an older far end would.
        most: streams; further ones are refused with a 429.

    Attributes:
        streams: what became of each stream that has a mark.
        requests: all that came, but questions about streams.
    """

    def __init__(
        self,
        *fields: str,
        framing: str = "chunked",
        unknown: tuple[str, ...] = (),
        most: int = 1000,
    ) -> None:
        self.streams: dict[str, dict[str, Any]] = {}
        self.requests: list[Received] = []
        self._fields = fields
        self._framing = framing
        self._unknown = unknown
        self._most = most

    def __call__(self, wire: Wire) -> None:
        """Serve one request."""
        request = wire.read_request()
        asked = dict(parse_qsl(request.target.decode().partition("?")[2]))
        if not asked.keys().isdisjoint(self._unknown):
            wire.send(_whole("400 Bad Request", {"error": {"message": "an unknown word"}}))
        elif (mark := asked.get("ended")) is not None:
            found = self.streams.get(mark)
            wire.send(_whole("404 Not Found" if found is None else "200 OK", found or {}))
        elif len(self.requests) >= self._most:
            wire.send(_whole("429 Too Many Requests", {"error": {"message": "enough"}}))
        else:
            self.requests.append(request)
            self._stream(wire, request, asked)

    def _stream(self, wire: Wire, request: Received, asked: dict[str, str]) -> None:
        told: dict[str, Any] = {"ended": None, "events": 0, "request": _arrived(request)}
        self.streams[asked.get("mark", "")] = told
        ended = "broken"
        try:
            wire.sock.settimeout(None)
            is_chunked = self._framing == "chunked" and request.version == b"HTTP/1.1"
            self._send_head(wire, asked, is_chunked=is_chunked)
            ended = self._send_events(wire, asked, told, is_chunked=is_chunked)
        except OSError:
            ended = "client_gone"
        finally:
            told["ended"] = ended

    def _send_head(self, wire: Wire, asked: dict[str, str], *, is_chunked: bool) -> None:
        kind = KINDS[asked.get("format", "sse")]
        lines = ["HTTP/1.1 200 OK", f"Content-Type: {kind}", "Connection: close", *self._fields]
        if is_chunked:
            lines.append("Transfer-Encoding: chunked")
        wire.send("\r\n".join([*lines, "", ""]).encode())

    def _send_events(
        self, wire: Wire, asked: dict[str, str], told: dict[str, Any], *, is_chunked: bool
    ) -> str:
        count, pause_s = int(asked.get("n", 20)), int(asked.get("interval_ms", 250)) / 1000
        silence_after = int(asked.get("silence_after", 1))
        silence_s = int(asked.get("silence_ms", 0)) / 1000
        for number in range(1, count + 1):
            data = _event(number, int(asked.get("bytes", 200)), asked.get("format", "sse"))
            wire.send(chunked(data) if is_chunked else data)
            told["events"] = number
            if number == int(asked.get("break_after", 0)):
                return "broken"
            wait = silence_s if number == silence_after else 0.0
            if number < count:
                wait += pause_s
            if wait and select.select([wire.sock], [], [], wait)[0]:
                return "client_gone"
        if is_chunked:
            wire.send(LAST)
        return "complete"


def _event(number: int, size: int, kind: str) -> bytes:
    start = f'{{"n":{number},"sent":{time.time():.6f},"ms":0,"pad":"'
    before, after = ("data: ", '"}\n\n') if kind == "sse" else ("", '"}\n')
    pad = "x" * (size - len(before) - len(start) - len(after))
    return f"{before}{start}{pad}{after}".encode()


def _arrived(request: Received) -> dict[str, str]:
    names = (
        *("via", "x-forwarded-for", "x-forwarded-server", "x-real-ip", "x-varnish"),
        *("x-envoy-expected-rq-timeout-ms", "accept-encoding"),
    )
    found = {name.decode(): value.decode() for name, value in request.fields}
    version = request.version.decode().removeprefix("HTTP/")
    return {"version": version} | {name: found[name] for name in names if name in found}


def _whole(status: str, said: dict[str, Any]) -> bytes:
    body = json.dumps(said).encode()
    kind = "Content-Type: application/json\r\nCache-Control: no-store"
    head = f"HTTP/1.1 {status}\r\n{kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
