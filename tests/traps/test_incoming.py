"""Request bodies on their way in: which are refused, how large they may be, and where they lie."""

from __future__ import annotations

import os
import stat

import pytest
from pytest_twisted import ensureDeferred

from tests.support.kernel import held
from tests.support.sockets import WAIT, Provider, Wire, chunked, connect, request
from tests.traps.asking import ClientResponse, ask, read_response
from tests.traps.calls import OK, Responding, Step
from tests.traps.parts import Ports
from tests.traps.waits import thread, until

JSON = "Content-Type: application/json"
OPAQUE = "Content-Type: application/octet-stream"
EXPECT = "Expect: 100-continue"
LAST = b"0\r\n\r\n"


# -- C6 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JSON, OPAQUE], ids=["held", "streamed"])
@ensureDeferred
async def test_a_client_that_may_send_a_body_gets_100_continue(proxy: Ports, kind: str) -> None:
    """``100 Continue`` comes before the body, and the response behind it."""

    def invited(port: int) -> list[ClientResponse]:
        with connect(port) as wire:
            wire.send(request("POST", "/p/x", kind, EXPECT, "Content-Length: 2"))
            first = read_response(wire, WAIT)
            wire.send(b"{}")
            return [first, read_response(wire, WAIT)]

    with Provider(Responding()) as provider:
        first, second = await thread(invited, proxy(provider.url))
    assert first.status == 100
    assert (second.status, second.body) == (200, b"ok")


@pytest.mark.trap("C6")
@pytest.mark.parametrize(
    ("target", "fields", "status"),
    [
        ("/p/x", ["Content-Length: 9", "Authorization: Bearer sk-wrong"], 401),
        ("/p/x", ["Transfer-Encoding: chunked", "Authorization: Bearer sk-wrong"], 401),
        ("/p/x", ["Content-Length: 9", "x-llmproxy-key: sk-wrong", OPAQUE], 401),
        ("/p/x", ["Content-Length: 1025"], 413),
        ("/p/x", ["Content-Length: 1025", OPAQUE], 413),
        ("/nowhere", ["Content-Length: 9"], 404),
        ("/p/../x", ["Content-Length: 9"], 400),
    ],
    ids=["key", "key, chunked", "key, streamed", "size", "size, streamed", "route", "path"],
)
@ensureDeferred
async def test_a_client_that_is_refused_gets_no_100_continue(
    proxy: Ports, patience: float, target: str, fields: list[str], status: int
) -> None:
    """The first response to a client that waits for ``100 Continue`` is the refusal."""
    with Provider(Responding()) as provider:
        port = proxy(provider.url, body_limit=1024)
        got = await thread(ask, port, patience, request("POST", target, EXPECT, *fields))
    assert (got.status, provider.accepted) == (status, 0)
    assert got.message


@pytest.mark.trap("C6")
@pytest.mark.parametrize("body", [b"{}", b""], ids=["a body", "no body"])
@pytest.mark.parametrize(
    "fields",
    [["Expect: the-best"], ["Expect: 100-continue, the-best"], [EXPECT, "Expect: the-best"]],
    ids=["alone", "in a list", "on a second line"],
)
@ensureDeferred
async def test_an_expectation_that_cannot_be_met_is_refused(
    proxy: Ports, patience: float, fields: list[str], body: bytes
) -> None:
    """417, whether there is no body or all of it came along, and nothing reaches the provider."""
    with Provider(Responding()) as provider:
        sent = request("POST", "/p/x", JSON, *fields, body=body)
        got = await thread(ask, proxy(provider.url), patience, sent)
    assert (got.status, provider.accepted) == (417, 0)
    assert got.message


# -- C7 -------------------------------------------------------------------------------------


@pytest.mark.trap("C7")
@pytest.mark.parametrize(
    ("framing", "body"),
    [("Content-Length: 100000000", b""), ("Transfer-Encoding: chunked", chunked(bytes(1025)))],
    ids=["announced", "chunked"],
)
@ensureDeferred
async def test_a_body_over_the_limit_is_refused_before_its_end(
    proxy: Ports, patience: float, framing: str, body: bytes
) -> None:
    """413 as soon as it is known, from the head or from the first byte too many."""
    with Provider(Responding()) as provider:
        port = proxy(provider.url, body_limit=1024)
        got = await thread(ask, port, patience, request("POST", "/p/x", JSON, framing), body)
    assert (got.status, provider.accepted) == (413, 0)
    assert got.message
    assert got.how == "fin"


def open_files() -> set[tuple[int, int]]:
    """Return which regular files this process has open, with or without a name."""
    files = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found = os.fstat(int(descriptor))
        except OSError:
            continue  # it was listed only because we looked, or was closed since
        if stat.S_ISREG(found.st_mode):
            files.add((found.st_dev, found.st_ino))
    return files


@pytest.mark.trap("C7")
@pytest.mark.parametrize("kind", [JSON, OPAQUE], ids=["held", "streamed"])
@pytest.mark.parametrize("size", [10, 200_000])
@pytest.mark.parametrize("framing", ["chunked", "length"])
@ensureDeferred
async def test_a_body_lies_in_no_file_meanwhile(
    proxy: Ports, patience: float, framing: str, size: int, kind: str
) -> None:
    """All but its end has been read, and the process has opened no file for it."""
    body = b'{"a":"%b"}' % (b"x" * size)
    if framing == "chunked":
        start = request("POST", "/p/x", kind, "Transfer-Encoding: chunked") + chunked(body)
        end = LAST
    else:
        start = request("POST", "/p/x", kind, body=body)[:-1]
        end = body[-1:]

    def is_read(port: int) -> bool:
        arrived = held(local=port)
        return arrived.received == len(start) and not arrived.unread

    with Provider(Responding()) as provider:
        port = proxy(provider.url)
        before = open_files()
        with await thread(connect, port) as wire:
            await thread(wire.send, start)
            assert await until(lambda: is_read(port), patience)
            meanwhile = open_files()
            wire.send(end)
            got = await thread(read_response, wire, patience)
    assert (got.status, got.body) == (200, b"ok")
    assert meanwhile - before == set()


@pytest.mark.trap("C7")
@ensureDeferred
async def test_a_request_whose_body_streams_starts_with_its_head(
    proxy: Ports, patience: float
) -> None:
    """The provider reads the head before the client has sent a byte of the body."""
    begun, bodies = Step(), []

    def script(wire: Wire) -> None:
        _, fields = wire.read_head()
        begun.give()
        bodies.append(wire.read_body(fields))
        wire.send(OK)

    with Provider(script) as provider, await thread(connect, proxy(provider.url)) as wire:
        wire.send(request("POST", "/p/x", OPAQUE, "Transfer-Encoding: chunked"))
        early = await begun.happens(patience)
        wire.send(chunked(b"body"), LAST)
        got = await thread(read_response, wire, patience)
    assert (got.status, bodies) == (200, [b"body"])
    assert early
