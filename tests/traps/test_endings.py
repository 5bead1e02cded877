"""How a broken response reaches a client that is slow to read it."""

from __future__ import annotations

import threading

import pytest
from pytest_twisted import ensureDeferred

from tests.support.kernel import held
from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request
from tests.support.tls import Authority
from tests.traps.endings import Ending, read_ending
from tests.traps.parts import Ports
from tests.traps.waits import thread, until

SMALL = 4096
"""A kernel buffer in bytes; Linux gives twice as much, and bookkeeping takes part of it."""

KERNEL, QUEUE, PAUSED = 400_000, 28_000, 120_000
"""Bytes before the break: what our kernel can take, what our queue can, and what neither can."""

PIECE = 8192


def content_of(size: int) -> bytes:
    """Return bytes in which no place is like another."""
    return b"".join(b"%07d\n" % place for place in range(size // 8))


class Breaking:
    """A provider's script that sends part of a chunked body and breaks it off.

    Args:
        content: what it sends before.
        reset: whether it breaks off by a RST, once everything has arrived, and not by a FIN.
    """

    def __init__(self, content: bytes, *, reset: bool) -> None:
        self._content = content
        self._reset = reset

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        wire.read_request()
        content = self._content
        pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunked(*pieces))
        if self._reset:
            port = wire.sock.getsockname()[1]
            tick = threading.Event()
            for _ in range(int(WAIT / 0.002)):
                if not held(local=port).unsent:
                    break
                tick.wait(0.002)
            wire.reset()


@pytest.mark.trap("C13")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize(
    "size", [KERNEL, QUEUE, PAUSED], ids=["in the kernel", "in the queue", "behind a pause"]
)
@pytest.mark.parametrize(
    ("version", "reset"),
    [("1.1", False), ("1.1", True), ("1.0", False)],
    ids=["1.1, fin", "1.1, reset", "1.0, fin"],
)
@ensureDeferred
async def test_what_came_before_a_break_reaches_a_slow_client(
    proxy: Ports,
    authority: Authority,
    patience: float,
    tls: bool,
    size: int,
    version: str,
    reset: bool,
) -> None:
    """A client that reads only after the break gets every byte before it, and no proper end.

    In HTTP/1.1 the missing last chunk shows it, behind a clean close; in HTTP/1.0 only a reset can.
    """
    content = content_of(size)
    with Provider(Breaking(content, reset=reset)) as provider:
        port = proxy(provider.url, tls=tls, send_buffer=1 << 20 if size == KERNEL else SMALL)
        context = authority.client() if tls else None
        wire = await thread(connect, port, receive_buffer=SMALL, tls=context)
        with wire:
            wire.send(request("GET", "/p/x", version=version))
            assert await until(lambda: provider.accepted and not held(local=provider.port).sockets)
            if size != PAUSED:
                assert await until(lambda: not held(peer=provider.port).sockets)
            arrived = held(peer=port).unread
            ending = await thread(read_ending, wire, patience)
    _, _, raw = ending.raw.partition(b"\r\n\r\n")
    if version == "1.1":
        got, whole = Ending(raw, ending.how).chunks()
        assert not whole
    else:
        got = raw
    assert len(got) == size
    assert got == content
    assert ending.how == ("fin" if version == "1.1" else "reset")
    # Else nothing was shown: the break must have come while most of it was on this side.
    assert arrived < size // 2
