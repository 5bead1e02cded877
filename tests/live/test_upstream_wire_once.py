"""No request is silently sent a second time: a provider sees each one once (design 6)."""

from __future__ import annotations

import threading

import pytest

from tests.support.live_proxy import LiveProxy, assert_settles, live_fixture, post
from tests.support.scripts import Notes, Turn
from tests.support.sockets import Received, Wire, request

KEPT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

live = live_fixture(both_links=True)


def upload(target: str) -> bytes:
    """Return a POST whose body streams upwards."""
    return request("POST", target, "Content-Type: application/octet-stream", body=bytes(200_000))


REQUESTS = {
    "GET": lambda target: request("GET", target),
    "DELETE": lambda target: request("DELETE", target),
    "held POST": post,
    "streamed POST": upload,
}


class EndingProvider:
    """A provider's script: ``/warm`` gets a response on a kept connection, which then ends.

    Each request is noted with the number of its connection.

    Args:
        how: ``fin``, ``close_notify`` or ``reset``.
        read_first: whether one more request is read, without a response, before the end.
    """

    def __init__(self, how: str, *, read_first: bool) -> None:
        self._how, self._read_first = how, read_first
        self._lock = threading.Lock()
        self._connections = 0
        self.requests: list[tuple[int, Received]] = []
        self.end = Turn()
        self.ended = Notes()

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        with self._lock:
            self._connections += 1
            number = self._connections
        received = self._read(wire, number)
        if received.target != b"/warm":
            if self._read_first:
                self._hang_up(wire)
            else:
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nfresh")
            return
        wire.send(KEPT)
        if self._read_first:
            self._read(wire, number)
        else:
            self.end.take()
        self._hang_up(wire)
        self.ended.put(None)

    def _read(self, wire: Wire, number: int) -> Received:
        received = wire.read_request()
        self.requests.append((number, received))
        return received

    def _hang_up(self, wire: Wire) -> None:
        if self._how == "close_notify":
            wire.close_notify()
        if self._how == "reset":
            wire.reset()
        else:
            wire.close()

    def targets(self) -> list[tuple[int, bytes]]:
        """Return where each request came in, and what it was."""
        return [(number, received.target) for number, received in self.requests]


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("how", ["fin", "close_notify", "reset"])
def test_a_connection_that_its_provider_closed_is_not_written_to(
    live: LiveProxy, how: str, kind: str
) -> None:
    """The end arrived while it was idle: the request goes on a fresh one, once and whole."""
    script = live.script = EndingProvider(how, read_first=False)
    assert live.get(request("GET", "/p/warm")).body == b"ok"
    script.end.give()
    script.ended.read()
    got = live.get(REQUESTS[kind]("/p/x"))
    assert (got.status, got.body) == (200, b"fresh")
    assert script.targets() == [(1, b"/warm"), (2, b"/x")]
    sizes = {"streamed POST": 200_000, "held POST": len(post("")) - post("").index(b"{")}
    assert len(script.requests[1][1].body) == sizes.get(kind, 0)
    record = live.trace(got)
    assert [one["outcome"] for one in record["attempts"]] == ["ok"]
    assert_settles(live.daemon)


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("reused", [True, False], ids=["reused", "fresh"])
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_request_whose_connection_dies_is_reported_and_not_sent_again(
    live: LiveProxy, how: str, reused: bool, kind: str
) -> None:
    """502, and the provider saw it once: it may have done the work, so SDKs must not repeat it."""
    script = live.script = EndingProvider(how, read_first=True)
    if reused:
        assert live.get(request("GET", "/p/warm")).body == b"ok"
    got = live.get(REQUESTS[kind]("/p/x"))
    assert (got.status, got.error) == (502, "upstream_broken")
    assert got.values(b"x-should-retry") == [b"false"]
    assert script.targets() == [(1, b"/warm"), (1, b"/x")][not reused :]
    record = live.trace(got)
    assert record["end_reason"] == "upstream_broken"
    assert [one["outcome"] for one in record["attempts"]] == ["upstream_broken"]
    assert_settles(live.daemon)


def test_a_stalled_upload_is_not_begun_anew(live: LiveProxy) -> None:
    """A provider that ends in the middle of the request's body has seen the request once."""
    seen = Notes()

    def script(wire: Wire) -> None:
        first, _ = wire.read_head()
        seen.put(first)
        wire.read(10_000)

    live.script = script
    before = live.provider.accepted
    got = live.get(post("/p/x", b'{"a":"' + b"a" * 8_000_000 + b'"}'))
    assert (got.status, got.error) == (502, "upstream_broken")
    assert seen.read() == b"POST /x HTTP/1.1"
    assert live.provider.accepted == before + 1
    assert_settles(live.daemon)
