"""The cases of ``make bench-quick`` over loopback: the whole daemon in this process, both ends too.

The ends are bare sockets in the same reactor: the provider's sends, and the client's, once all of
that has come, lets it send again.  What the same exchange costs without the daemon between is taken
off, so that a figure is the daemon's own part, its system calls included.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twisted.application.service import Application
from twisted.internet import reactor as _reactor
from twisted.internet.interfaces import IReadDescriptor
from zope.interface import implementer

from bench.peers import KEY, PATH, Upstream, daemon_config
from bench.quick import Case
from bench.quick_cases import HEAD, chunk
from llmproxy.config import load
from llmproxy.record.log_writer import open_log
from llmproxy.service import ProxyService

reactor: Any = _reactor

MARK = b"}\n\n"
"""How every piece of content ends here."""


def event(size: int) -> bytes:
    """Return an event of OpenAI's, so many bytes long."""
    before = (
        b'data: {"id":"chatcmpl-9f8e7d6c5b4a39281706","object":"chat.completion.chunk","created":'
        b'1763650000,"model":"m","choices":[{"index":0,"delta":{"content":"'
    )
    after = b'"},"finish_reason":null}]' + MARK
    return before + b"x" * (size - len(before) - len(after)) + after


def document(size: int) -> bytes:
    """Return a response of OpenAI's in one piece, so many bytes long."""
    before = (
        b'{"id":"chatcmpl-9f8e7d6c5b4a39281706","object":"chat.completion","created":1763650000,'
        b'"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"'
    )
    after = (
        b'"},"finish_reason":"stop"}],"usage":{"prompt_tokens":11,"completion_tokens":300}' + MARK
    )
    return before + b"x" * (size - len(before) - len(after)) + after


RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1500\r\n\r\n"
    + document(1500)
)
BODY = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"%b"}]}' % (b"word " * 100)

_WITHIN = 60.0
"""Seconds that one repeat may take."""


@implementer(IReadDescriptor)
class End:
    """One end: a socket in the reactor, listening or connected.

    Args:
        ready: called when there is something to read, or somebody to accept.
    """

    def __init__(self, sock: socket.socket, ready: Callable[[End], None]) -> None:
        self.sock = sock
        self._ready = ready
        self.tail = b""
        reactor.addReader(self)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self.sock.fileno()

    def logPrefix(self) -> str:  # noqa: N802 - Twisted's name
        """Return a name for the log."""
        return "end"

    def doRead(self) -> None:
        """Something is there."""
        self._ready(self)

    def connectionLost(self, reason: object) -> None:
        """The reactor has let go of it."""
        self.sock.close()

    def takes(self, mark: bytes) -> bool:
        """Read once; return whether what has come so far ends with ``mark``."""
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            self.close()
            return False
        self.tail = (self.tail + data)[-len(mark) :]
        return self.tail == mark

    def close(self) -> None:
        """Let go of it."""
        reactor.removeReader(self)
        self.sock.close()


class Stage:
    """A provider, and the daemon before it.

    Attributes:
        reply: what the provider answers a whole request with.
        asked: the provider's end of the connection on which the last request came.
    """

    def __init__(self, folder: Path) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        provider: int = listener.getsockname()[1]
        self._listening = End(listener, self._accept)
        config = daemon_config(Upstream(provider), folder, 0, 0, KEY)
        self._service = ProxyService(
            load(str(config), environ={}),
            reactor,
            log_file=lambda: open_log(str(folder / "log.jsonl")),
            handle_signals=False,
        )
        self._service.setServiceParent(Application("llmproxy"))
        self._service.privilegedStartService()
        self._service.startService()
        self._ports = {True: self._service.proxy_ports[0].getHost().port, False: provider}
        self.reply = b""
        self.asked: End | None = None

    def ask(self, ready: Callable[[End], None], *, proxied: bool) -> End:
        """Connect to the daemon, or past it to the provider, and send a request."""
        client = _end(socket.create_connection(("127.0.0.1", self._ports[proxied])), ready)
        client.sock.sendall(request())
        return client

    def close(self) -> None:
        """Bring the daemon to rest."""
        self._listening.close()
        reactor.callWhenRunning(
            lambda: self._service.stopService().addBoth(lambda _: reactor.crash())
        )
        run_reactor()

    def _accept(self, listening: End) -> None:
        _end(listening.sock.accept()[0], self._response)

    def _response(self, end: End) -> None:
        if end.takes(b"}]}"):
            self.asked = end
            end.sock.sendall(self.reply)


def request() -> bytes:
    """Return a request as an SDK sends it."""
    fields = (
        f"POST /openai{PATH} HTTP/1.1\r\nHost: proxy\r\nAccept: application/json\r\n"
        "Accept-Encoding: gzip, deflate\r\nUser-Agent: OpenAI/Python 1.99.1\r\n"
        "X-Stainless-Lang: python\r\nX-Stainless-OS: Linux\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    return fields.encode() + BODY


def run_reactor() -> None:
    """Run the reactor until somebody stops it.

    Raises:
        TimeoutError: nobody did.
    """
    timer = reactor.callLater(_WITHIN, reactor.crash)
    reactor.run(installSignalHandlers=False)
    if not timer.active():
        raise TimeoutError("an exchange over loopback did not end")
    timer.cancel()


def exchange(
    stage: Stage, count: int, again: Callable[[End], None], mark: bytes, *, proxied: bool
) -> float:
    """Let ``again`` bring about so many further responses; return the processor time of those."""
    left, began = count, 0.0

    def took(client: End) -> None:
        nonlocal left, began
        if not client.takes(mark):
            return
        if left == count:
            began = time.process_time()
        if left:
            left -= 1
            again(client)
        else:
            reactor.crash()

    client = stage.ask(took, proxied=proxied)
    run_reactor()
    took_s = time.process_time() - began
    client.close()
    return took_s


def events(stage: Stage, data: bytes) -> Callable[[int], float]:
    """Return what measures events of a stream."""
    piece, mark = chunk(data), MARK + b"\r\n"

    def send(_: End) -> None:
        assert stage.asked is not None
        stage.asked.sock.sendall(piece)

    def run(count: int) -> float:
        stage.reply = HEAD + piece
        proxied = exchange(stage, count, send, mark, proxied=True)
        return proxied - exchange(stage, count, send, mark, proxied=False)

    return run


def requests(stage: Stage) -> Callable[[int], float]:
    """Return what measures whole requests on a kept connection."""
    whole = request()

    def run(count: int) -> float:
        stage.reply = RESPONSE

        def again(client: End) -> None:
            client.sock.sendall(whole)

        proxied = exchange(stage, count, again, MARK, proxied=True)
        return proxied - exchange(stage, count, again, MARK, proxied=False)

    return run


@contextmanager
def loopback() -> Iterator[Iterator[Case]]:
    """Start the daemon in this process; yield the cases, to be run before this is over."""
    with tempfile.TemporaryDirectory(prefix="bench-quick-") as folder:
        stage = Stage(Path(folder))

        def every() -> Iterator[Case]:
            for name, size in (("223 B", 223), ("16 KiB", 16384)):
                yield Case(f"event over loopback, {name}", 5000, events(stage, event(size)))
            yield Case("request over loopback, to its record", 1000, requests(stage))

        try:
            yield every()
        finally:
            stage.close()


def _end(sock: socket.socket, ready: Callable[[End], None]) -> End:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return End(sock, ready)
