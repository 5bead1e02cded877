"""The last response of a connection: its client gets every byte, and the record waits for that.

A kernel takes megabytes for a client that does not read.  That a response is written says little;
only what the client has acknowledged has arrived.
"""

from __future__ import annotations

import random
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from tests.support.keypairs import LISTEN_TLS
from tests.support.live_proxy import (
    ONE_ROUTE,
    LiveProxy,
    assert_settles,
    listener_credentials,
    open_live_proxy,
    post,
    read_response,
    trace_of,
    until,
)
from tests.support.sockets import WAIT, Wire, connect, request
from tests.support.tls import Authority

BODY = random.Random(14).randbytes(2_000_000)

PAUSE = threading.Event()
"""Never set: a wait for it is a pause."""

PATIENT = """
[timeouts]
client_stall = "30s"
client_idle = "1s"
"""

ENDINGS = {
    "kept": b"Content-Length: %d\r\n" % len(BODY),
    "close": b"Content-Length: %d\r\n" % len(BODY),
    "broken": b"Content-Length: %d\r\n" % (len(BODY) + 1),
    "old": b"Transfer-Encoding: chunked\r\n",
}
"""How a response and its connection end, with what the provider says of the body's framing."""


def script(wire: Wire) -> None:
    """Respond as the request's path asks."""
    got = wire.read_request()
    ending = got.target.rpartition(b"/")[2].decode()
    wire.send(b"HTTP/1.1 200 OK\r\n" + ENDINGS[ending] + b"Connection: close\r\n\r\n")
    if ending == "old":
        wire.send(b"%x\r\n" % len(BODY), BODY, b"\r\n0\r\n\r\n")
    else:
        wire.send(BODY)


def ask(ending: str, path: str) -> bytes:
    """Return a request whose response ends in this way."""
    version = "1.0" if ending == "old" else "1.1"
    return request("GET", path, *["Connection: close"] * (ending == "close"), version=version)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[LiveProxy]:
    """One route, reached plainly and by TLS."""
    folder = tmp_path_factory.mktemp("last")
    config = ONE_ROUTE + PATIENT + listener_credentials(folder, authority)
    with open_live_proxy(folder, config, proxy=f"anonymous = true\n{LISTEN_TLS}") as live:
        live.script = script
        yield live


@pytest.fixture
def ways(authority: Authority) -> dict[str, ssl.SSLContext | None]:
    """How a client is connected: its TLS, or none."""
    return {"plain": None, "tls": authority.client()}


def open_client(live: LiveProxy, context: ssl.SSLContext | None) -> Wire:
    """Connect as a client whose kernel takes little for it."""
    port = live.daemon.port if context is None else live.daemon.tls_port
    return connect(port, receive_buffer=16_384, tls=context)


def await_provider(live: LiveProxy) -> None:
    """Wait until the provider has been let go of."""

    def is_done() -> bool:
        figures = live.daemon.metrics().items()
        return not sum(n for name, n in figures if name.startswith("llmproxy_upstream_connections"))

    until(is_done, "the provider is done")


def test_a_client_that_pauses_gets_every_byte(
    live: LiveProxy, ways: dict[str, ssl.SSLContext | None]
) -> None:
    """It pauses for much longer than ``client_idle``; nothing is lost, however it all ends."""
    clients: list[tuple[str, str, Wire]] = []
    for (kind, context), ending in product(ways.items(), ENDINGS):
        client, path = open_client(live, context), f"/p/{kind}/{ending}"
        client.send(ask(ending, path))
        client.read_head()
        clients.append((ending, path, client))
    PAUSE.wait(7)
    for ending, path, client in clients:
        assert client.read(len(BODY)) == BODY
        if ending == "kept":
            client.send(ask("close", f"{path}/again/close"))
            assert read_response(client).body == BODY
        assert client.wait_closed() == "fin"
        client.close()
        record = trace_of(live.daemon, path=path)
        assert record["bytes_out"] == len(BODY)
        if ending == "broken":
            assert record["end_reason"] == "upstream_broken"
        else:
            assert (record["end_reason"], record["is_complete"]) == ("complete", True)
            assert record["duration_s"] > 6
    assert_settles(live.daemon)


def test_a_slow_client_is_not_cut(live: LiveProxy, ways: dict[str, ssl.SSLContext | None]) -> None:
    """A few hundred KB a second are progress, whatever the kernel holds."""
    with ExitStack() as stack:
        clients = {
            f"/p/slow/{kind}/close": stack.enter_context(open_client(live, context))
            for kind, context in ways.items()
        }
        for path, client in clients.items():
            client.send(ask("close", path))
            client.read_head()
        got = {path: bytearray() for path in clients}
        while any(len(one) < len(BODY) for one in got.values()):
            for path, client in clients.items():
                got[path] += client.read(min(40_000, len(BODY) - len(got[path])))
            PAUSE.wait(0.1)
        for path, client in clients.items():
            assert (bytes(got[path]) == BODY, client.wait_closed()) == (True, "fin")
    for path in clients:
        assert trace_of(live.daemon, path=path)["end_reason"] == "complete"


@pytest.mark.parametrize("ending", ["kept", "close", "old"])
@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_a_client_that_leaves_the_rest_is_gone(
    live: LiveProxy, ways: dict[str, ssl.SSLContext | None], kind: str, ending: str
) -> None:
    """The provider is done, and the kernel has the whole response; the client has not."""
    path = f"/p/gone/{kind}/{ending}"
    client = open_client(live, ways[kind])
    client.send(ask(ending, path))
    client.read_head()
    client.read(100_000)
    await_provider(live)
    client.reset()
    record = trace_of(live.daemon, path=path)
    assert (record["end_reason"], record["is_complete"]) == ("client_gone", False)
    assert_settles(live.daemon)


def test_what_follows_a_request_does_not_cost_its_response(live: LiveProxy) -> None:
    """Bytes that nobody reads would make the kernel reset the connection."""
    for number in range(20):
        with connect(live.daemon.port, receive_buffer=16_384) as client:
            sent = ask("close", f"/p/{number}/close")
            sender = threading.Thread(target=client.send, args=(sent, b"x" * 300_000))
            sender.start()
            assert read_response(client).body == BODY
            assert client.wait_closed() == "fin"
            sender.join(WAIT)


def is_waiting(live: LiveProxy) -> bool:
    """Return whether a drain waits for the one client."""
    return live.gauge("drain_remaining_requests") == 1


def test_a_drain_counts_what_arrived(
    tmp_path: Path, authority: Authority, ways: dict[str, ssl.SSLContext | None]
) -> None:
    """It waits for the client, and a response is finished when the client has it."""
    proxy = f"anonymous = true\n{LISTEN_TLS}"
    drains: list[tuple[LiveProxy, Wire, bool]] = []
    with ExitStack() as stack:
        for (kind, context), reads in product(ways.items(), [True, False]):
            folder = tmp_path / f"{kind}-{reads}"
            folder.mkdir()
            config = ONE_ROUTE + PATIENT + listener_credentials(folder, authority)
            live = stack.enter_context(open_live_proxy(folder, config, proxy=proxy))
            live.script = script
            client = stack.enter_context(open_client(live, context))
            client.send(ask("kept", "/p/kept"))
            client.read_head()
            await_provider(live)
            drains.append((live, client, reads))
        for live, _, _ in drains:
            live.daemon.terminate()
            live.daemon.wait_log("draining")
            until(partial(is_waiting, live), "it is waited for")
        PAUSE.wait(3)
        for live, client, reads in drains:
            if reads:
                assert client.read(len(BODY)) == BODY
                assert client.wait_closed() == "fin"
            else:
                live.daemon.terminate()
                assert client.wait_closed() in ("reset", "truncated")
            finished, cut = (1, 0) if reads else (0, 1)
            live.daemon.wait_log("drained: ", finished=finished, cut=cut)
            record = trace_of(live.daemon, path="/p/kept")
            assert record["end_reason"] == ("complete" if reads else "drained")


def test_a_flood_of_requests_leaves_nothing_behind(live: LiveProxy) -> None:
    """Of a client that asks and does not read, one response waits; it is cut like any other."""
    with connect(live.daemon.port, receive_buffer=4096) as client:
        client.sock.settimeout(1)
        with pytest.raises(TimeoutError):
            client.sock.sendall(post("/nowhere", b"{}") * 100_000)
        assert live.gauge("buffered_bytes") < 128 * 1024
    assert_settles(live.daemon)
