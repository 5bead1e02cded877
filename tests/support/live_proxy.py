"""The real daemon in front of a provider that the test plays, and what live tests share.

A :class:`LiveProxy` is one running daemon and one provider whose script each test sets anew. Tests
that need the same configuration share one start of the daemon.
"""

from __future__ import annotations

import hashlib
import json
import re
import select
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import scripts
from tests.support.daemon import Daemon, provider_config
from tests.support.scripts import LAST, OK, SSE, Notes, Turn
from tests.support.sockets import WAIT, Provider, Received, Script, Wire, chunked, connect, request
from tests.support.tls import Authority

STREAM_BODY = b'{"model":"m","stream":true}'
ONE_ROUTE = provider_config("URL", provider="KEYS")
"""One route, ``/p``, to the played provider; see :func:`live_fixture`."""


def response(status: int, *fields: str, body: bytes = b"", reason: str = "") -> bytes:
    """Return a whole response with a ``Content-Length``, on a connection that then closes."""
    lines = [f"HTTP/1.1 {status} {reason}", *fields, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close"]).encode("latin-1") + b"\r\n\r\n" + body


def chunked_response(*pieces: bytes, kind: str = "text/event-stream") -> bytes:
    """Return a whole chunked response, a chunk for each piece, on a connection that then closes."""
    return SSE.replace(b"text/event-stream", kind.encode()) + chunked(*pieces) + LAST


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


class Response(NamedTuple):
    """A response as a client received it; names of fields are in lower case."""

    status: int
    fields: list[tuple[bytes, bytes]]
    body: bytes

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of every field of that name."""
        return [value for key, value in self.fields if key == name]

    @property
    def error(self) -> str | None:
        """The reason word of an error of the proxy's own."""
        words = self.values(b"x-llmproxy-error")
        assert len(words) < 2, words
        return words[0].decode() if words else None

    def json(self) -> Any:
        """Return the body, read as JSON."""
        return json.loads(self.body)


def read_response(wire: Wire, *, bodiless: bool = False) -> Response:
    """Take one response, framed as its fields say; without framing, to the connection's end."""
    first, fields = wire.read_head()
    version, status, _ = first.split(b" ", 2)
    assert version == b"HTTP/1.1"
    code, names = int(status), {name for name, _ in fields}
    if bodiless or code in (204, 304):
        return Response(code, fields, b"")
    if names & {b"transfer-encoding", b"content-length"}:
        return Response(code, fields, wire.read_body(fields))
    assert wire.wait_closed() == "fin"
    return Response(code, fields, wire.buffer)


def is_silent(wire: Wire) -> bool:
    """Tell whether a plain connection holds nothing to read now: no byte, and no end either."""
    return not wire.buffer and not select.select([wire.sock], [], [], 0)[0]


def read_stepwise(wire: Wire, turn: Turn, *chunks: bytes) -> None:
    """Check that each chunk arrives at its turn and not before; the last chunk is empty."""
    for chunk in chunks:
        assert is_silent(wire)
        turn.give()
        assert wire.read_chunk() == chunk


def begin(
    wire: Wire, path: str, body: bytes = STREAM_BODY, *fields: str, version: str = "1.1"
) -> Wire:
    """Send a POST and read the head of its response; return the connection."""
    wire.send(post(path, body, *fields, version=version))
    wire.read_head()
    return wire


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


def tls_link(authority: Authority) -> Link:
    """Return the way by TLS to a provider of this authority's."""
    return Link(authority.server(), f'ca = "{authority.ca_path}"\n')


class LiveProxy:
    """A daemon, and the provider behind it.

    Attributes:
        script: what the provider plays on each connection that it accepts from now on.
    """

    def __init__(self, link: Link = PLAIN) -> None:
        self.script: Script = _no_script
        self.provider = link.provider(lambda wire: self.script(wire))
        self.daemon: Daemon

    # -- the provider --------------------------------------------------------------------------

    def reply(self, *raw: bytes) -> None:
        """Let the provider send these bytes in response to each request."""
        self.script = scripts.reply(*raw)

    def stream(self, *pieces: bytes, head: bytes = SSE) -> Turn:
        """Let the provider stream; each piece and the last chunk take a turn."""
        turn = Turn()
        self.script = scripts.stream(turn, *pieces, head=head)
        return turn

    def hold(self, *raw: bytes) -> Notes:
        """Let the provider send these bytes and then nothing; return how the connection ends."""
        ended = Notes()
        self.script = scripts.hold(ended, *raw)
        return ended

    def flood(self, head: bytes = SSE) -> Notes:
        """Let the provider send chunks without end; the note comes when the proxy cuts it off."""
        ended = Notes()
        self.script = scripts.flood(ended, head)
        return ended

    def break_off(self, end: str, *raw: bytes) -> Turn:
        """Let the provider send these bytes, and end the connection at a turn."""
        turn = Turn()
        self.script = scripts.break_off(turn, end, *raw)
        return turn

    # -- clients -------------------------------------------------------------------------------

    def connect(self, *, receive_buffer: int = 0) -> Wire:
        """Connect to the proxy."""
        return connect(self.daemon.port, receive_buffer=receive_buffer)

    def begin(
        self,
        path: str,
        body: bytes = STREAM_BODY,
        *fields: str,
        version: str = "1.1",
        receive_buffer: int = 0,
    ) -> Wire:
        """Connect, send a POST and read the head of its response."""
        wire = self.connect(receive_buffer=receive_buffer)
        return begin(wire, path, body, *fields, version=version)

    def ask(self, sent: bytes, raw: bytes = OK) -> tuple[Received, Response]:
        """Send one request through; return what the provider received and the client got."""
        seen = Notes()

        def script(wire: Wire) -> None:
            seen.put(wire.read_request())
            wire.send(raw)

        self.script = script
        got = self.get(sent)
        assert not seen.empty(), f"the provider was not asked: {got}"
        return seen.read(), got

    def reject(self, sent: bytes) -> Response:
        """Send one request that must not reach the provider; return what the client got."""
        before = self.provider.accepted
        got = self.get(sent)
        assert self.provider.accepted == before, f"the provider was asked: {got}"
        return got

    def get(self, sent: bytes) -> Response:
        """Send one request on a connection of its own, and return the response."""
        with self.connect() as client:
            client.send(sent)
            return read_response(client, bodiless=sent.startswith(b"HEAD "))

    # -- what the daemon says ------------------------------------------------------------------

    def gauge(self, name: str) -> float:
        """Return one metric without labels, by its name behind ``llmproxy_``."""
        return self.daemon.metrics()[f"llmproxy_{name}"]

    def wait_paused(self, count: int = 1) -> None:
        """Wait until so many streams stand still for their clients."""
        until(lambda: self.gauge("paused_streams") == count, f"{count} streams are paused")

    def trace(self, got: Response) -> dict[str, Any]:
        """Return the record of the request that got this response."""
        (name,) = got.values(b"x-llmproxy-request-id")
        return trace_of(self.daemon, id=name.decode())

    def assert_ended(self, path: str, reason: str, status: int | None = 200) -> dict[str, Any]:
        """Check how the one request of that path ended, and that nothing is left; return more."""
        record = trace_of(self.daemon, path=path)
        assert (record["end_reason"], record["status"]) == (reason, status)
        assert record["is_complete"] is (reason == "complete")
        assert_settles(self.daemon)
        return record


def _no_script(wire: Wire) -> None:
    raise AssertionError("the provider was asked, and no script was set")


@contextmanager
def open_live_proxy(
    folder: Path, config: str, *, link: Link = PLAIN, proxy: str = "anonymous = true"
) -> Iterator[LiveProxy]:
    """Run a daemon with this configuration; what it may name is said at :func:`live_fixture`."""
    live = LiveProxy(link)
    names = {"URL": live.provider.url, "KEYS": link.keys, "FOLDER": str(folder)}
    config = re.sub(r"\b(URL|KEYS|FOLDER)\b", lambda found: names[found[0]], config)
    with live.provider, Daemon(folder, config, proxy=proxy) as live.daemon:
        yield live


def live_fixture(
    config: str = ONE_ROUTE,
    *,
    proxy: str = "anonymous = true",
    both_links: bool = False,
    credentials: dict[str, str] | None = None,
) -> Any:
    """Return a fixture that runs a daemon with this configuration for a module's tests.

    Args:
        config: tables in which ``URL`` stands for the provider's URL, ``KEYS`` for the keys of a
            provider that say how it is reached, and ``FOLDER`` for the daemon's folder.
        proxy: keys of ``[proxy]``.
        both_links: every test runs twice; the daemon reaches its provider plainly, then by TLS.
        credentials: files of the credentials directory by their names.
    """

    def run(factory: pytest.TempPathFactory, link: Link) -> Iterator[LiveProxy]:
        folder = factory.mktemp("live")
        sections = {write_credential(folder, *one) for one in (credentials or {}).items()}
        text = "".join([config, *sections])
        with open_live_proxy(folder, text, link=link, proxy=proxy) as live:
            yield live

    @pytest.fixture(scope="module")
    def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveProxy]:
        yield from run(tmp_path_factory, PLAIN)

    @pytest.fixture(scope="module")
    def linked(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[LiveProxy]:
        yield from run(tmp_path_factory, link)

    return linked if both_links else plain


def write_credential(folder: Path, name: str, value: str) -> str:
    """Write a credential file; return the ``[credentials]`` section that leads to it."""
    directory = folder / "credentials"
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / name).write_text(value + "\n")
    return f'[credentials]\ndirectory = "{directory}"\n'


def listener_credentials(folder: Path, authority: Authority) -> str:
    """Write the credentials that ``LISTEN_TLS`` names; return their section."""
    key, certificate = authority.key_and_certificate()
    write_credential(folder, "key", key.read_text())
    return write_credential(folder, "certificate", certificate.read_text())


def client_config(name: str, key: str, more: str = "") -> str:
    """Return the section of a client with one key."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'[clients.{name}]\nkeys = ["sha256:{digest}"]\n{more}\n'
