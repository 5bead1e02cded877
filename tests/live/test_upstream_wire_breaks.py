"""Providers that reset, close or fall silent, in every phase: one reason for each way."""

from __future__ import annotations

import threading
from typing import NamedTuple

import pytest

from tests.support.daemon import provider_config, route_table
from tests.support.kernel import held
from tests.support.live_proxy import Link, LiveProxy, assert_settles, live_fixture, trace_of
from tests.support.scripts import Notes, hold
from tests.support.sockets import WAIT, Wire, request

NO_HEAD, SILENT = 'timeouts = { first_byte = "150ms" }', 'timeouts = { idle = "150ms" }'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"


class Phase(NamedTuple):
    """Where a response stops: what was sent by then, and the content in it (None: no head yet)."""

    sent: bytes
    content: bytes | None


PHASES = {
    "before the head": Phase(b"", None),
    "behind a 100": Phase(b"HTTP/1.1 100 Continue\r\n\r\n", None),
    "in the status line": Phase(b"HTTP/1.1 20", None),
    "in the fields": Phase(CHUNKED[:-4], None),
    "before the head's last byte": Phase(CHUNKED[:-1], None),
    "behind the head": Phase(CHUNKED, b""),
    "in a chunk's size": Phase(CHUNKED + b"3\r\none\r\n1", b"one"),
    "in a size's line end": Phase(CHUNKED + b"3\r\none\r\n3\r", b"one"),
    "in a chunk's data": Phase(CHUNKED + b"3\r\none\r\n3\r\ntw", b"onetw"),
    "before a chunk's line end": Phase(CHUNKED + b"3\r\none", b"one"),
    "before the last chunk": Phase(CHUNKED + b"3\r\none\r\n", b"one"),
    "in the last chunk": Phase(CHUNKED + b"3\r\none\r\n0\r\n", b"one"),
    "in the trailer": Phase(CHUNKED + b"3\r\none\r\n0\r\nx-sum: 1\r\n", b"one"),
    "short of a length": Phase(LENGTH + b"one", b"one"),
    "before a body with a length": Phase(LENGTH, b""),
    "in a body without framing": Phase(CLOSE + b"one", b"one"),
}

# Only a provider that falls silent has to be given up soon; the other breaks may take their time.
live = live_fixture(
    provider_config("URL", provider="KEYS")
    + route_table("/no-head", "p", NO_HEAD)
    + route_table("/silent", "p", SILENT),
    both_links=True,
)


class StoppingProvider:
    """A provider's script that stops at ``phase`` in one way.

    Attributes:
        ended: notes that the proxy closed a stalled connection.
    """

    def __init__(self, sent: bytes, how: str) -> None:
        self._sent, self._how = sent, how
        self.ended = Notes()

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        if self._how == "stall":
            hold(self.ended, self._sent)(wire)
            return
        wire.read_request()
        wire.send(self._sent)
        if self._how == "close_notify":
            wire.close_notify()
        elif self._how == "reset":
            _wait_acknowledged(wire)
            wire.reset()


def _wait_acknowledged(wire: Wire) -> None:
    """Wait until the peer's kernel has everything: what a reset overtakes is lost for good."""
    tick = threading.Event()
    for _ in range(int(WAIT / 0.002)):
        if not held(local=wire.sock.getsockname()[1], peer=wire.sock.getpeername()[1]).unsent:
            return
        tick.wait(0.002)


def expected(phase: Phase, how: str, tls: bool) -> str:
    """Return why the request must end."""
    if how == "stall":
        return "upstream_timeout" if phase.content is None else "upstream_idle"
    proper = how == "close_notify" or (how == "fin" and not tls)
    if phase.sent.startswith(CLOSE) and proper:
        return "complete"
    return "upstream_broken"


@pytest.mark.parametrize("how", ["fin", "close_notify", "reset", "stall"])
@pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES.keys())
def test_a_break_is_called_by_its_name_in_every_phase(
    live: LiveProxy, link: Link, phase: Phase, how: str, request: pytest.FixtureRequest
) -> None:
    """The caller gets what came before, no proper end behind it, and the record says why."""
    script = live.script = StoppingProvider(phase.sent, how)
    tls = link.context is not None
    reason = expected(phase, how, tls)
    short = "/no-head/" if phase.content is None else "/silent/"
    route = short if how == "stall" else "/p/"
    path = route + request.node.callspec.id.replace(" ", "-")
    if phase.content is None:
        got = live.get(_get(path))
        assert got.status == (504 if how == "stall" else 502)
        assert got.values(b"x-llmproxy-error") == [reason.encode()]
        assert got.values(b"x-should-retry") == [b"false"]
        assert got.json()["error"]["code"] == reason
    else:
        with live.connect() as client:
            client.send(_get(path))
            head = client.read_until(b"\r\n\r\n")
            client.wait_closed() if reason != "complete" else client.read_until(b"0\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            if reason != "complete":
                content = client.buffer if phase.sent.startswith(LENGTH) else unchunk(client.buffer)
                assert content == phase.content
                assert not client.buffer.endswith(b"0\r\n\r\n")
    if how == "stall":
        script.ended.read()
    record = trace_of(live.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == (reason, reason == "complete")
    assert_settles(live.daemon)


def _get(path: str) -> bytes:
    return request("GET", path)


def unchunk(raw: bytes) -> bytes:
    """Return the content of whole chunks; there is nothing else in ``raw``."""
    content = b""
    while raw:
        line, _, raw = raw.partition(b"\r\n")
        size = int(line, 16)
        assert raw[size : size + 2] == b"\r\n"
        content, raw = content + raw[:size], raw[size + 2 :]
    return content
