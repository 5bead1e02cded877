"""Responses over WebSocket through the daemon: their records, their limits, and how they end."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.sync.client import ClientConnection
from websockets.sync.server import ServerConnection

from tests.support.live_proxy import client_config, trace_of, until
from tests.support.scripts import Notes, Turn
from tests.support.sockets import WAIT
from tests.support.websocket_peers import KEY, Peers, running_peers

USAGE = {
    "input_tokens": 10,
    "output_tokens": 20,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens_details": {"reasoning_tokens": 5},
}
LIMITED, NARROW, SLOTTED = "sk-limited", "sk-narrow", "sk-slotted"
LIMITED_COLD, MANY = "sk-limited-cold", "sk-many"
OTHERS = "".join(
    (
        client_config("limited", LIMITED, "requests_per_minute = 2\ntokens_per_day = 1000000"),
        client_config("cold", LIMITED_COLD, "requests_per_minute = 2"),
        client_config("many", MANY, "max_streams = 1000"),
        client_config("narrow", NARROW, 'models = ["gpt-5", "gpt-4*"]'),
        client_config("slotted", SLOTTED, "max_streams = 1"),
    )
)


class Provider:
    """Plays Responses over WebSocket.

    Attributes:
        asked: what the provider got, message by message.
        turn: each response takes one before it ends, if it is set.
        warms: a warm-up is answered with nothing but its beginning and its end.
    """

    def __init__(self) -> None:
        self.asked = Notes()
        self.turn: Turn | None = None
        self.warms = True

    def __call__(self, connection: ServerConnection) -> None:
        number = 0
        for message in connection:
            event = json.loads(message)
            self.asked.put(event)
            if event["type"] == "response.create":
                number += 1
                is_warm_up = self.warms and event.get("generate") is False
                name, model = f"resp_{number}", event.get("model", "none")
                self._respond(connection, name, model, is_warm_up=is_warm_up)

    def _respond(
        self, connection: ServerConnection, name: str, model: str, *, is_warm_up: bool
    ) -> None:
        def send(kind: str, **more: Any) -> None:
            connection.send(json.dumps({"type": kind, **more}))

        response: dict[str, Any] = {"id": name, "model": f"{model}-2026", "status": "in_progress"}
        send("response.created", response=response)
        if not is_warm_up:
            send("response.output_text.delta", delta="hello")
        if self.turn is not None:
            self.turn.take()
        usage = {**USAGE, "output_tokens": 0} if is_warm_up else USAGE
        response |= {"status": "completed", "usage": usage, "output": []}
        send("response.completed", response=response)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    """A daemon with a ledger, and clients with limits."""
    folder = tmp_path_factory.mktemp("peers")
    ledger = f'ledger = "{folder / "ledger.sqlite3"}"\n'
    with running_peers(folder, config=OTHERS, trace=ledger) as running:
        yield running


@pytest.fixture
def provider(peers: Peers) -> Provider:
    """What the provider does in one test."""
    provider = Provider()
    peers.play = provider
    return provider


def by(key: str) -> dict[str, Any]:
    """Return the options of a client with this key."""
    return {"additional_headers": {"Authorization": f"Bearer {key}", "x-session-id": "s-1"}}


def create(client: ClientConnection, **more: Any) -> None:
    """Ask for a response."""
    client.send(json.dumps({"type": "response.create", **more}))


def read(client: ClientConnection) -> dict[str, Any]:
    """Read one event."""
    event: dict[str, Any] = json.loads(client.recv(WAIT))
    return event


def types(client: ClientConnection, count: int = 3) -> list[str]:
    """Return the types of the next events."""
    return [read(client)["type"] for _ in range(count)]


WHOLE = ["response.created", "response.output_text.delta", "response.completed"]
WARMED = ["response.created", "response.completed"]


def outputs(peers: Peers) -> float:
    """Return how many tokens of output were counted so far."""
    metrics = peers.daemon.metrics().items()
    kind = 'type="output"'
    return sum(v for k, v in metrics if k.startswith("llmproxy_tokens_total") and kind in k)


# --- records --------------------------------------------------------------------------------------


def test_each_response_has_a_record(peers: Peers, provider: Provider) -> None:
    """The connection's own sums them up, and no report counts both."""
    before = outputs(peers)
    with peers.connect("/p/v1/responses", **by(KEY)) as client:
        for model in ("gpt-5", "gpt-6"):
            create(client, model=model, input="hi")
            assert types(client) == WHOLE
    whole = trace_of(peers.daemon, path="/p/v1/responses", responses=2)
    assert (whole["end_reason"], whole["status"], whole["usage"]) == ("complete", 101, "reported")
    assert (whole["input_tokens"], whole["output_tokens"]) == (20, 40)
    assert (whole["cache_read_tokens"], whole["reasoning_tokens"]) == (8, 10)
    for number, model in ((1, "gpt-5"), (2, "gpt-6")):
        one = trace_of(peers.daemon, id=f"{whole['id']}-{number}")
        assert (one["model"], one["served_model"]) == (model, f"{model}-2026")
        assert (one["input_tokens"], one["output_tokens"], one["usage"]) == (10, 20, "reported")
        assert (one["end_reason"], one["is_complete"], one["responses"]) == ("complete", True, None)
        assert one["session"] == whole["session"] == "s-1"
        assert one["first_chunk_s"] <= one["duration_s"] <= whole["duration_s"]

    def reported() -> Any:
        (row,) = peers.daemon.usage("--by", "client")["groups"]
        return row if row["requests"] == 2 else None

    row = until(reported, "both are in the ledger")
    assert (row["complete"], row["input_tokens"], row["output_tokens"]) == (2, 20, 40)
    assert outputs(peers) - before == 40


def test_a_warm_up_is_not_recorded(peers: Peers, provider: Provider) -> None:
    """Codex sends one first; the connection's record has nothing of it."""
    with peers.connect("/p/warm/responses") as client:
        create(client, model="gpt-5", generate=False)
        assert types(client, 2) == WARMED
    whole = trace_of(peers.daemon, path="/p/warm/responses")
    assert (whole["responses"], whole["input_tokens"], whole["usage"]) == (0, None, "none")


def test_a_warm_up_that_is_answered_is_a_response(peers: Peers, provider: Provider) -> None:
    """A provider may not know the word: then nobody gets anything past the records and limits."""
    provider.warms = False
    with peers.connect("/p/cold/responses", **by(LIMITED_COLD)) as client:
        for _ in range(2):
            create(client, model="gpt-5", generate=False)
            assert types(client) == WHOLE
        create(client, model="gpt-5", generate=False)
        assert read(client)["error"]["code"] == "rate_limit_exceeded"
    whole = trace_of(peers.daemon, path="/p/cold/responses", responses=2)
    assert (whole["input_tokens"], whole["output_tokens"]) == (20, 40)


def leave(client: ClientConnection) -> None:
    """End the connection without a close frame, as Codex does."""
    client.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionClosed):
        client.recv(WAIT)


def test_a_client_may_leave_without_a_close_frame(peers: Peers, provider: Provider) -> None:
    """Behind a whole response that is no failure."""
    with peers.connect("/p/left/responses") as client:
        create(client, model="gpt-5")
        assert types(client) == WHOLE
        leave(client)
    whole = trace_of(peers.daemon, path="/p/left/responses", responses=1)
    assert whole["end_reason"] == "complete"


def test_a_client_that_leaves_within_a_response_is_gone(peers: Peers, provider: Provider) -> None:
    """The response has a record, too."""
    provider.turn = Turn()
    with peers.connect("/p/within/responses") as client:
        create(client, model="gpt-5")
        assert types(client, 2) == WHOLE[:2]
        leave(client)
    whole = trace_of(peers.daemon, path="/p/within/responses", responses=1)
    one = trace_of(peers.daemon, id=f"{whole['id']}-1")
    assert whole["end_reason"] == one["end_reason"] == "client_gone"
    assert (one["usage"], one["is_complete"]) == ("none", False)
    provider.turn.give()


def test_what_runs_can_be_seen(peers: Peers, provider: Provider) -> None:
    """A gauge, and a line among the streams."""
    with peers.connect("/p/v1/realtime?model=gpt-seen") as client:
        create(client)
        assert types(client) == WHOLE
        assert peers.daemon.metrics()["llmproxy_websocket_connections"] == 1
        peers.daemon.process.send_signal(signal.SIGUSR1)
        row = peers.daemon.wait_log("streaming since", model="gpt-seen")
        assert (row["client"], row["route"]) == ("team", "p")
        assert row["bytes"] > 0
    until(
        lambda: peers.daemon.metrics()["llmproxy_websocket_connections"] == 0,
        "no WebSocket is open",
    )


# --- limits ---------------------------------------------------------------------------------------


def test_a_limit_is_told_on_the_open_connection(peers: Peers, provider: Provider) -> None:
    """By an event; the provider sees nothing of what is refused, and the connection goes on."""
    with peers.connect("/p/limited/responses", **by(LIMITED)) as client:
        assert client.protocol.extensions == [], "what is left out would be missing in the context"
        for _ in range(3):
            create(client, model="gpt-5", generate=False)
            assert types(client, 2) == WARMED
        for _ in range(2):
            create(client, model="gpt-5", text="x" * 100_000)
            assert types(client) == WHOLE
        create(client, model="gpt-5")
        event = read(client)
        assert (event["type"], event["status"]) == ("error", 429)
        assert event["error"]["code"] == "rate_limit_exceeded"
        assert "2 requests in a minute" in event["error"]["message"]
        client.send(json.dumps({"type": "other"}))
        client.send([json.dumps({"type": "more"})[:5], json.dumps({"type": "more"})[5:]])
        seen = [provider.asked.read()["type"] for _ in range(7)]
        assert seen == ["response.create"] * 5 + ["other", "more"]
    whole = trace_of(peers.daemon, path="/p/limited/responses", responses=2)
    assert whole["counted_tokens"] == 60
    with peers.connect("/p/again/responses", **by(LIMITED)) as client:  # no 429
        create(client, model="gpt-5")
        assert read(client)["error"]["code"] == "rate_limit_exceeded"


def test_a_slot_is_that_of_a_response(peers: Peers, provider: Provider) -> None:
    """Not of a connection: it is free as soon as the response has ended."""
    provider.turn = Turn()
    with (
        peers.connect("/p/a/responses", **by(SLOTTED)) as one,
        peers.connect("/p/b/responses", **by(SLOTTED)) as other,
    ):
        create(one, model="gpt-5")
        assert types(one, 2) == WHOLE[:2]
        create(other, model="gpt-5")
        assert "1 request under way" in read(other)["error"]["message"]
        provider.turn.give()
        assert types(one, 1) == WHOLE[2:]
        create(other, model="gpt-5")
        provider.turn.give()
        assert types(other) == WHOLE


def test_more_responses_than_are_followed_cannot_be_asked_for(
    peers: Peers, provider: Provider
) -> None:
    """Each has a place of its client's until it ends, and none may be lost sight of."""
    provider.turn = Turn()
    with peers.connect("/p/many/responses", **by(MANY)) as client:
        create(client, model="gpt-5")
        assert types(client, 2) == WHOLE[:2]
        for _ in range(257):
            create(client, model="gpt-5")
        assert "256 responses" in read(client)["error"]["message"]
        provider.turn.give(257)
        assert types(client, 1 + 256 * 3) == [WHOLE[2], *WHOLE * 256]
    whole = trace_of(peers.daemon, path="/p/many/responses", responses=257)
    assert whole["end_reason"] == "complete"


@pytest.mark.parametrize(
    ("event", "passes"),
    [
        ({"type": "response.create", "model": "gpt-5"}, True),
        ({"type": "response.create", "model": "gpt-4o"}, True),
        ({"type": "response.create", "model": "gpt-6"}, False),
        ({"type": "response.create"}, False),
        ({"type": "session.update", "session": {"model": "gpt-6"}}, False),
        ({"type": "response.create", "response": {"model": "gpt-6"}}, False),
        ({"type": "response.create", "model": "gpt-6", "response": {"model": "gpt-5"}}, False),
        ({"type": "response.create", "model": "gpt-5", "response": {"model": "gpt-6"}}, False),
        ({"type": "something.else"}, True),
    ],
)
def test_models_are_looked_at_in_each_message(
    peers: Peers, provider: Provider, event: dict[str, Any], passes: bool
) -> None:
    """A client that may not use all of them opens a connection that names none."""
    with peers.connect("/p/narrow/responses", **by(NARROW)) as client:
        client.send(json.dumps(event))
        if passes:
            assert provider.asked.read() == event
        else:
            refused = read(client)
            assert (refused["type"], refused["error"]["code"]) == ("error", "model_forbidden")
            client.close()
            assert provider.asked.empty()


def test_a_message_that_cannot_be_read_is_refused_where_it_matters(
    peers: Peers, provider: Provider
) -> None:
    """Who has no limits may send anything."""
    with peers.connect("/p/odd/responses", **by(NARROW)) as client:
        for message in ("{", b"\0\1\2"):
            client.send(message)
            assert read(client)["error"]["code"] == "bad_event"
        client.send(json.dumps({"type": "response.create", "model": "gpt-6"}).encode())
        assert read(client)["error"]["code"] == "model_forbidden"
    assert provider.asked.empty()


def test_a_message_may_be_as_long_as_a_body(tmp_path: Path) -> None:
    """A longer one is refused by an event and left out; what was held counts no more."""
    config = client_config("narrow", NARROW, 'models = ["gpt-5"]')
    with running_peers(tmp_path, config=config, route='request_body = "100KiB"') as peers:
        peers.play = provider = Provider()
        with peers.connect("/p/long/responses", **by(NARROW)) as client:
            create(client, model="gpt-5", input="x" * 200_000)
            assert read(client)["error"]["code"] == "too_large"
            create(client, model="gpt-5", input="x" * 100_000)
            assert types(client) == WHOLE
            assert len(provider.asked.read()["input"]) == 100_000
        assert peers.daemon.metrics()["llmproxy_request_bytes_held"] == 0


# --- a shutdown -----------------------------------------------------------------------------------


def test_a_drain_lets_a_response_end(tmp_path: Path) -> None:
    """Idle connections are closed at once, the other one behind its response; both with 1001."""
    with running_peers(tmp_path) as peers:
        peers.play = provider = Provider()
        provider.turn = Turn()
        with peers.connect("/p/responses") as idle, peers.connect("/p/responses") as busy:
            create(busy, model="gpt-5")
            assert types(busy, 2) == WHOLE[:2]
            peers.daemon.terminate()
            assert _end_of(idle).code == 1001
            provider.turn.give()
            assert types(busy, 1) == WHOLE[2:]
            assert _end_of(busy).code == 1001
        assert peers.daemon.process.wait(WAIT) == 0
        ends = [one["end_reason"] for one in peers.daemon.traces()]
        assert ends == ["complete"] * 3


def _end_of(client: ClientConnection) -> Any:
    with pytest.raises(ConnectionClosedOK) as raised:
        client.recv(WAIT)
    return raised.value.rcvd
