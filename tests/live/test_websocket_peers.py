"""WebSockets between real peers: ``websockets`` on both sides, and the daemon between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.http11 import Request
from websockets.sync.server import ServerConnection

from tests.support.live_proxy import trace_of, until
from tests.support.scripts import Notes, Turn
from tests.support.sockets import WAIT
from tests.support.websocket_peers import KEY, Peers, echo, running_peers

MB = 1024 * 1024
MASS = 50 * MB


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """One daemon, and one provider, for all tests."""
    with running_peers(tmp_path_factory.mktemp("peers")) as running:
        yield running


@pytest.fixture(autouse=True)
def _as_before(peers: Peers) -> None:
    peers.play, peers.answer = echo, lambda *_: None
    while not peers.seen.empty():
        peers.seen.get()


# --- what crosses ---------------------------------------------------------------------------------


def test_messages_cross_both_ways(peers: Peers) -> None:
    """Text and binary, empty and large, whole and in fragments."""
    messages: list[str | bytes] = ["", "héllo", b"", b"\0\xff" * 10, "x" * 200_000, b"y" * 5 * MB]
    with peers.connect() as client:
        for message in messages:
            client.send(message)
            assert client.recv(WAIT) == message
        client.send(["in ", "three ", "pieces"])
        assert client.recv(WAIT) == "in three pieces"


@pytest.mark.parametrize("takeover", [True, False])
def test_compression_is_between_the_two_sides(peers: Peers, takeover: bool) -> None:
    """With a context that lasts from message to message, or without one."""
    factory = ClientPerMessageDeflateFactory(
        server_no_context_takeover=not takeover, client_no_context_takeover=not takeover
    )
    with peers.connect(compression=None, extensions=[factory]) as client:
        extension: Any
        (extension,) = client.protocol.extensions
        assert extension.remote_no_context_takeover is not takeover
        for _ in range(20):
            message = "the same words again and again, " * 50
            client.send(message)
            assert client.recv(WAIT) == message


def test_no_compression_is_added(peers: Peers) -> None:
    """Where the client offers none, the provider is offered none."""
    with peers.connect(compression=None) as client:
        assert client.protocol.extensions == []
        client.send("plain")
        assert client.recv(WAIT) == "plain"
    assert "Sec-WebSocket-Extensions" not in peers.seen.read().headers


@pytest.mark.parametrize(("code", "words"), [(1000, ""), (1001, "bye"), (4321, "ours")])
def test_the_providers_close_code_crosses(peers: Peers, code: int, words: str) -> None:
    """And its words."""
    peers.play = lambda connection: connection.close(code, words)
    with peers.connect() as client:
        with pytest.raises((ConnectionClosedOK, ConnectionClosedError)) as raised:
            client.recv(WAIT)
        assert raised.value.rcvd is not None
        assert (raised.value.rcvd.code, raised.value.rcvd.reason) == (code, words)


def test_the_clients_close_code_crosses(peers: Peers) -> None:
    """And its words."""
    closed = Notes()

    def play(connection: ServerConnection) -> None:
        with suppress(ConnectionClosedError):
            connection.recv(WAIT)
        closed.put((connection.close_code, connection.close_reason))

    peers.play = play
    with peers.connect() as client:
        client.close(4000, "enough")
    assert closed.read() == (4000, "enough")


def test_pings_cross_both_ways(peers: Peers) -> None:
    """The other side's pong answers each, not the proxy's."""
    ponged = Notes()

    def play(connection: ServerConnection) -> None:
        ponged.put(connection.ping(b"from the provider").wait(WAIT))
        echo(connection)

    peers.play = play
    with peers.connect(ping_interval=None) as client:
        assert client.ping(b"from the client").wait(WAIT)
        assert ponged.read()


def test_a_client_without_a_close_frame_is_gone(peers: Peers) -> None:
    """The provider's side ends as if it were the client's own."""
    closed = Notes()

    def play(connection: ServerConnection) -> None:
        try:
            connection.recv(WAIT)
        except ConnectionClosedError as error:
            closed.put(error.rcvd)

    peers.play = play
    client = peers.connect("/p/gone")
    client.socket.close()
    assert closed.read() is None
    assert trace_of(peers.daemon, path="/p/gone")["end_reason"] == "client_gone"


# --- who calls ------------------------------------------------------------------------------------


def test_the_providers_credential_takes_the_place_of_the_clients_key(peers: Peers) -> None:
    """As on any request; who calls is recorded, and no key."""
    with peers.connect("/p/v1/realtime?model=gpt-realtime"):
        asked: Request = peers.seen.read()
    assert asked.headers.get_all("Authorization") == ["Bearer sk-of-provider"]
    assert asked.path == "/v1/realtime?model=gpt-realtime"
    record = trace_of(peers.daemon, path="/p/v1/realtime", model="gpt-realtime")
    assert (record["client"], record["model_from"]) == ("team", "query")
    assert KEY not in str(record)


def test_a_key_may_stand_among_the_subprotocols(peers: Peers) -> None:
    """It is cut out, and ``realtime`` is answered although the provider answers nothing."""
    key = f"openai-insecure-api-key.{KEY}"
    options = {"additional_headers": {}, "subprotocols": ["realtime", key, "openai-project.x"]}
    with peers.connect("/p/by-subprotocol", **options) as client:
        assert client.subprotocol == "realtime"
        client.send("on")
        assert client.recv(WAIT) == "on"
    asked: Request = peers.seen.read()
    assert asked.headers.get_all("Sec-WebSocket-Protocol") == ["realtime"]
    assert asked.headers.get_all("Authorization") == ["Bearer sk-of-provider"]
    assert KEY not in str(asked)
    assert "OpenAI-Project" not in asked.headers, "it says whose account pays, which is ours"
    assert trace_of(peers.daemon, path="/p/by-subprotocol")["client"] == "team"


@pytest.mark.parametrize(
    "options",
    [
        {"additional_headers": {}},
        {"additional_headers": {"Authorization": "Bearer wrong"}},
        {"additional_headers": {}, "subprotocols": ["realtime", "openai-insecure-api-key.wrong"]},
        {"additional_headers": {}, "subprotocols": ["realtime", KEY]},
    ],
)
def test_a_caller_who_is_not_known_is_refused(peers: Peers, options: dict[str, Any]) -> None:
    """With a 401 and words; the provider is not asked."""
    with pytest.raises(InvalidStatus) as raised, peers.connect(**options):
        pass
    assert raised.value.response.status_code == 401
    assert b"key" in (raised.value.response.body or b"")
    assert peers.seen.empty()


def test_a_providers_refusal_is_handed_on(peers: Peers) -> None:
    """With its body."""
    peers.answer = lambda connection, asked: connection.respond(403, "not today\n")
    with pytest.raises(InvalidStatus) as raised, peers.connect():
        pass
    assert raised.value.response.status_code == 403
    assert raised.value.response.body == b"not today\n"


# --- how much is held -----------------------------------------------------------------------------


def test_a_mass_crosses_in_flat_memory(peers: Peers) -> None:
    """50 MB each way, compressed and plain, exact."""
    got = Notes()

    def play(connection: ServerConnection) -> None:
        assert connection.recv(WAIT) == b"warm"
        total = 0
        while total < MASS:
            total += len(connection.recv(WAIT))
        got.put(total)
        for at in range(MASS // MB):
            connection.send(bytes((at,)) * MB)
        connection.recv(WAIT)

    peers.play = play
    for compression in ("deflate", None):
        with peers.connect(compression=compression) as client:
            client.send(b"warm")
            before = peers.memory()
            for at in range(MASS // MB):
                client.send(bytes((at,)) * MB)
            assert got.read() == MASS
            for at in range(MASS // MB):
                assert client.recv(WAIT) == bytes((at,)) * MB
            client.send(b"done")
            assert peers.memory() - before < 4 * MB


def test_a_slow_reader_stops_the_other_side(peers: Peers) -> None:
    """On either side; what the daemon holds meanwhile is bounded."""
    sent, turn = Notes(), Turn()

    def play(connection: ServerConnection) -> None:
        for _ in range(30):
            connection.send(b"x" * MB)
        sent.put("provider")
        turn.take()
        for _ in range(30):
            connection.recv(WAIT)
        sent.put("provider has it")

    peers.play = play
    before = peers.memory()
    with peers.connect(compression=None, max_queue=1) as client:
        until(
            lambda: peers.daemon.metrics()["llmproxy_paused_streams"] == 1,
            "the provider is paused",
        )
        assert sent.empty()
        for _ in range(30):
            assert len(client.recv(WAIT)) == MB
        assert sent.read() == "provider"

        def pour() -> None:
            for _ in range(30):
                client.send(b"y" * MB)
            sent.put("client")

        pouring = threading.Thread(target=pour)
        pouring.start()
        pouring.join(0.5)
        assert sent.empty(), "the client is paused"
        turn.give()
        assert {sent.read(), sent.read()} == {"client", "provider has it"}
        pouring.join(WAIT)
    assert peers.memory() - before < 4 * MB
