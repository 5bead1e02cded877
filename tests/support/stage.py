"""What the live tests share: bounded waits, hand-shakes, answers on the wire, and a stage.

A :class:`Stage` is one running daemon and one provider whose script each test sets anew, so that
tests that need the same configuration share one start of the daemon.
"""

from __future__ import annotations

import hashlib
import json
import queue
import select
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.daemon import Daemon, provider_config
from tests.support.sockets import WAIT, Provider, Received, Script, Wire, chunked, connect, request

# These say that their connection ends with them: a kept one, which its script then closes, could be
# taken for the next request in the same moment.
SSE = (
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
STREAM_BODY = b'{"model":"m","stream":true}'


def event(number: int) -> bytes:
    """Return one SSE event."""
    return b'data: {"n":%d}\n\n' % number


def response(status: int, *fields: str, body: bytes = b"", reason: str = "") -> bytes:
    """Return a whole response with a ``Content-Length``, on a connection that then closes."""
    lines = [f"HTTP/1.1 {status} {reason}", *fields, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close"]).encode("latin-1") + b"\r\n\r\n" + body


def post(target: str, body: bytes = STREAM_BODY, *fields: str, version: str = "1.1") -> bytes:
    """Return a POST of JSON."""
    kind = "Content-Type: application/json"
    return request("POST", target, kind, *fields, body=body, version=version)


def until(condition: Callable[[], Any], what: str, *, seconds: float = WAIT) -> Any:
    """Wait until ``condition`` returns something true, and return that.

    Raises:
        TimeoutError: it did not within ``seconds``; ``what`` says what was waited for.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s: {what}")
        time.sleep(0.005)
    return found


class Turn:
    """A hand-shake: one side gives turns, the other takes them; none is waited for without end."""

    def __init__(self) -> None:
        self._turns = threading.Semaphore(0)

    def give(self, count: int = 1) -> None:
        """Let the other side go on, so many times."""
        self._turns.release(count)

    def take(self) -> None:
        """Wait for the other side."""
        if not self._turns.acquire(timeout=WAIT):
            raise TimeoutError("the other side gave no turn")


class Notes(queue.Queue[Any]):
    """What a script saw, for the test to read."""

    def read(self) -> Any:
        """Wait for the next note."""
        try:
            return self.get(timeout=WAIT)
        except queue.Empty:
            raise TimeoutError("the script noted nothing") from None


class Got(NamedTuple):
    """A response as a client got it; names of fields are in lower case."""

    status: int
    fields: list[tuple[bytes, bytes]]
    body: bytes

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of every field of that name."""
        return [value for key, value in self.fields if key == name]

    def json(self) -> Any:
        """Return the body, read as JSON."""
        return json.loads(self.body)


def read_got(wire: Wire, *, bodiless: bool = False) -> Got:
    """Take one response, framed as its fields say; without framing, to the connection's end."""
    first, fields = wire.read_head()
    version, status, _ = first.split(b" ", 2)
    assert version == b"HTTP/1.1"
    code, names = int(status), {name for name, _ in fields}
    if bodiless or code in (204, 304):
        return Got(code, fields, b"")
    if names & {b"transfer-encoding", b"content-length"}:
        return Got(code, fields, wire.read_body(fields))
    assert wire.wait_closed() == "fin"
    return Got(code, fields, wire.buffer)


def is_silent(wire: Wire) -> bool:
    """Tell whether a plain connection holds nothing to read now: no byte, and no end either."""
    return not wire.buffer and not select.select([wire.sock], [], [], 0)[0]


def trace_of(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    """Wait for the one record that has these fields; it is written after the request ended."""

    def found() -> dict[str, Any] | None:
        matching = [record for record in daemon.traces() if fields.items() <= record.items()]
        assert len(matching) < 2, f"two records with {fields}"
        return matching[0] if matching else None

    record: dict[str, Any] = until(found, f"a record with {fields}")
    return record


_GAUGES = (
    "llmproxy_active_streams",
    "llmproxy_paused_streams",
    "llmproxy_client_connections",
    "llmproxy_buffered_bytes",
    "llmproxy_request_bytes_held",
)
_BUSY = ('state="active"', 'state="connecting"')


def busy_gauges(daemon: Daemon) -> dict[str, float]:
    """Return every gauge of present work that is not zero."""
    return {
        name: value
        for name, value in daemon.metrics().items()
        if value and (name in _GAUGES or name.endswith(tuple(f"{state}}}" for state in _BUSY)))
    }


def assert_settles(daemon: Daemon, *, seconds: float = WAIT) -> None:
    """Wait until no request, body or connection is left in the daemon; idle ones may stay."""
    until(
        lambda: not busy_gauges(daemon), f"gauges at zero: {busy_gauges(daemon)}", seconds=seconds
    )


class Link(NamedTuple):
    """How the daemon reaches the provider: plainly, or by TLS."""

    context: ssl.SSLContext | None
    keys: str

    def provider(self, script: Script, **buffers: int) -> Provider:
        """Return a provider that is reached in this way."""
        return Provider(script, tls=self.context, **buffers)

    def config(self, provider: Provider, *, keys: str = "", **parts: str) -> str:
        """Return the configuration of one route to ``provider``."""
        return provider_config(provider.url, provider=self.keys + keys, **parts)


PLAIN = Link(None, "")


class Stage:
    """A daemon, and a provider in front of which it stands.

    Attributes:
        script: what the provider plays on each connection that it accepts from now on.
    """

    def __init__(self, link: Link = PLAIN) -> None:
        self.script: Script = _no_script
        self.provider = link.provider(lambda wire: self.script(wire))
        self.daemon: Daemon

    def connect(self, *, receive_buffer: int = 0) -> Wire:
        """Connect to the proxy."""
        return connect(self.daemon.port, receive_buffer=receive_buffer)

    def ask(self, sent: bytes, reply: bytes = OK) -> tuple[Received, Got]:
        """Send one request through; return what the provider received and the client got."""
        seen = Notes()

        def script(wire: Wire) -> None:
            seen.put(wire.read_request())
            wire.send(reply)

        self.script = script
        got = self.get(sent)
        assert not seen.empty(), f"the provider was not asked: {got}"
        return seen.read(), got

    def refuse(self, sent: bytes) -> Got:
        """Send one request that must not reach the provider; return what the client got."""
        before = self.provider.accepted
        got = self.get(sent)
        assert self.provider.accepted == before, f"the provider was asked: {got}"
        return got

    def get(self, sent: bytes) -> Got:
        """Send one request on a connection of its own, and return the response."""
        with self.connect() as client:
            client.send(sent)
            return read_got(client, bodiless=sent.startswith(b"HEAD "))

    def trace(self, got: Got) -> dict[str, Any]:
        """Return the record of an answered request."""
        (name,) = got.values(b"x-llmproxy-request-id")
        return trace_of(self.daemon, id=name.decode())


def _no_script(wire: Wire) -> None:
    raise AssertionError("the provider was asked, and no script was set")


@contextmanager
def open_stage(
    folder: Path,
    config: Callable[[str], str],
    *,
    link: Link = PLAIN,
    proxy: str = "anonymous = true",
) -> Iterator[Stage]:
    """Run a stage; ``config`` makes the daemon's configuration from the provider's URL."""
    stage = Stage(link)
    with stage.provider, Daemon(folder, config(stage.provider.url), proxy=proxy) as stage.daemon:
        yield stage


def write_credential(folder: Path, name: str, value: str) -> str:
    """Write a credential file; return the ``[credentials]`` section that leads to it."""
    directory = folder / "credentials"
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / name).write_text(value + "\n")
    return f'[credentials]\ndirectory = "{directory}"\n'


def client_config(name: str, key: str, more: str = "") -> str:
    """Return the section of a client with one key."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'[clients.{name}]\nkeys = ["sha256:{digest}"]\n{more}\n'


def chunked_answer(*pieces: bytes, kind: str = "text/event-stream") -> bytes:
    """Return a whole chunked response, a chunk for each piece, on a connection that then closes."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + chunked(*pieces) + LAST
