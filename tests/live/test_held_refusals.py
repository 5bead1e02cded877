"""A refusal that was held, in every framing: it reaches the client as its provider sent it."""

from __future__ import annotations

import gzip
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.daemon import Daemon, provider_table
from tests.support.live_proxy import (
    assert_settles,
    post,
    read_response,
    trace_of,
)
from tests.support.sockets import Provider, Wire, chunked, connect, request

ZIPPED = gzip.compress(b'{"error":"busy"}', mtime=0)
LARGE = b"x" * 300_000


class Refusal(NamedTuple):
    """A refusal on the wire, and what it says."""

    fields: str
    raw: bytes
    body: bytes
    closes: bool = False
    method: str = "POST"
    whole: bool = True


REFUSALS = {
    "length": Refusal("Content-Length: 4", b"busy", b"busy"),
    "empty": Refusal("Content-Length: 0", b"", b""),
    "chunked": Refusal("Transfer-Encoding: chunked", chunked(b"bu", b"sy") + b"0\r\n\r\n", b"busy"),
    "zipped": Refusal(f"Content-Encoding: gzip\r\nContent-Length: {len(ZIPPED)}", ZIPPED, ZIPPED),
    "close": Refusal("X-Of: p", b"busy", b"busy", closes=True),
    "head": Refusal("Content-Length: 4", b"", b"", method="HEAD"),
    "large": Refusal(f"Content-Length: {len(LARGE)}", LARGE, LARGE),
    "large-close": Refusal("X-Of: p", LARGE, LARGE, closes=True),
    "short": Refusal("Content-Length: 9", b"busy", b"busy", closes=True, whole=False),
}


class Refused:
    """A daemon with two candidates: one refuses, nobody listens at the other."""

    def __init__(self, folder: Path) -> None:
        self._provider = Provider(self._play)
        self._dead = socket.socket()
        self._dead.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{self._dead.getsockname()[1]}"
        health = "health = { failures = 0 }"
        tables = provider_table("p", health, url=self._provider.url)
        tables += provider_table("q", health, url=dead)
        tables += '[[routes]]\npath = "/p"\nproviders = ["p", "q"]\n'
        self._daemon = Daemon(folder, tables)

    @contextmanager
    def running(self) -> Iterator[Daemon]:
        with self._dead, self._provider, self._daemon as daemon:
            yield daemon

    def _play(self, wire: Wire) -> None:
        while True:  # until the proxy closes the connection
            refusal = REFUSALS[wire.read_request().target.decode().strip("/")]
            head = f"HTTP/1.1 503 Service Unavailable\r\n{refusal.fields}\r\n\r\n"
            wire.send(head.encode() + refusal.raw)
            if refusal.closes:
                return


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Refused(tmp_path_factory.mktemp("refused")).running() as daemon:
        yield daemon


@pytest.mark.parametrize("name", REFUSALS)
def test_a_held_refusal_is_as_its_provider_sent_it(daemon: Daemon, name: str) -> None:
    """The head exactly, the body byte for byte, and one that broke is not called whole."""
    refusal = REFUSALS[name]
    with connect(daemon.port) as client:
        if refusal.method == "HEAD":
            client.send(request("HEAD", f"/p/{name}"))
        else:
            client.send(post(f"/p/{name}", b'{"model":"m"}'))
        if refusal.whole:
            got = read_response(client, bodiless=refusal.method == "HEAD")
            assert (got.status, got.body) == (503, refusal.body)
            assert got.values(b"x-llmproxy-attempts") == [b"2"]
            assert got.values(b"x-llmproxy-provider") == [b"p"]
            (id_,) = got.values(b"x-llmproxy-request-id")
            record = trace_of(daemon, id=id_.decode())
            assert (record["provider"], record["end_reason"]) == ("p", "upstream_refused")
        else:
            head, _ = client.read_head()
            assert b" 503 " in head
            assert client.read(len(refusal.body)) == refusal.body
            client.wait_closed()
            record = trace_of(daemon, path=f"/p/{name}")
            assert (record["provider"], record["end_reason"]) == ("p", "upstream_broken")
    assert_settles(daemon)
