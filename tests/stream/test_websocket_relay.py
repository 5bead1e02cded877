"""The pump of a WebSocket in memory: where frames of ours stand, at any split of the others."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from llmproxy.errors import ClientGone, Cut
from llmproxy.stream.frames import close_frame, frame
from llmproxy.stream.websocket_relay import Ending, WebSocketRelay
from tests.support.websocket import PING
from tests.support.websocket import frame as sent

MASK = b"\x01\x02\x03\x04"
OURS = frame(1, b"ours", masked=False)
GOING_AWAY = close_frame(1001, masked=False)


class Side:
    """One side's transport, as far as the relay uses it."""

    transport = None
    dataBuffer, offset, _tempDataLen = b"", 0, 0  # noqa: N815 - Twisted's names

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.calls: list[str] = []
        self.producer: Any = None

    @property
    def written(self) -> bytes:
        """All that was written."""
        return b"".join(self.out)

    def write(self, data: bytes) -> None:
        self.out.append(data)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def loseConnection(self) -> None:
        self.calls.append("close")

    def abortConnection(self) -> None:
        self.calls.append("abort")


class Pumped:
    """A relay between two such sides."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.busy = False
        usual: dict[str, Any] = {"idle": None, "stall": None, "is_busy": lambda: self.busy}
        self.relay = WebSocketRelay(self.clock, self.clock.seconds, **{**usual, **options})
        self.client, self.provider = Side(), Side()
        self.endings: list[Ending] = []
        self.relay.provider.makeConnection(self.provider)
        self.relay.client.makeConnection(self.client)
        self.relay.over().addCallback(self.endings.append)

    def is_ending(self) -> bool:
        """Return whether anything has ended it."""
        return self.relay.ending is not None

    def lose(self, *, client: Exception | None = None, provider: Exception | None = None) -> None:
        """Report the end of either connection."""
        if client is not None:
            self.relay.client.connectionLost(Failure(client))
        if provider is not None:
            self.relay.provider.connectionLost(Failure(provider))


def test_a_message_of_ours_stands_between_two_messages() -> None:
    """At once where nothing is under way; never within a frame, or within a fragmented message."""
    begun, more, rest = sent(b"one", fin=False), sent(b"two", 0, fin=False), sent(b"three", 0)
    after = sent(b"after")
    wire = begun + sent(b"p", PING) + more + rest + after
    whole = len(wire) - len(after)
    for cut in range(1, whole):
        pumped = Pumped()
        pumped.relay.provider.dataReceived(wire[:cut])
        pumped.relay.tell(OURS)
        assert pumped.client.written == wire[:cut]
        pumped.relay.provider.dataReceived(wire[cut:])
        assert pumped.client.written == wire[:whole] + OURS + after
    pumped = Pumped()
    pumped.relay.provider.dataReceived(wire[:whole])
    pumped.relay.tell(OURS)
    assert pumped.client.out == [wire[:whole], OURS]


def test_a_close_frame_of_ours_stands_between_two_frames() -> None:
    """In both directions, and nothing is forwarded behind it; a message may stay in pieces."""
    wire = sent(b"one", fin=False, mask=MASK) + sent(b"two", 0, mask=MASK)
    first = len(sent(b"one", fin=False, mask=MASK))
    for cut in range(len(wire)):
        pumped = Pumped()
        pumped.relay.provider.dataReceived(wire[:cut])
        pumped.relay.client.dataReceived(wire[:cut])
        pumped.relay.end(Cut())
        pumped.relay.provider.dataReceived(wire[cut:])
        pumped.relay.client.dataReceived(wire[cut:])
        end = 0 if cut == 0 else first if cut <= first else len(wire)
        assert pumped.client.written == wire[:end] + GOING_AWAY
        assert pumped.provider.written[: end + 2] == wire[:end] + b"\x88\x82"
        assert len(pumped.provider.written) == end + 8
        assert (pumped.client.calls, pumped.provider.calls) == (["close"], ["close"])
        pumped.lose(client=ConnectionDone(), provider=ConnectionDone())
        (ending,) = pumped.endings
        assert isinstance(ending.why, Cut)
        assert not pumped.clock.getDelayedCalls()


def test_no_second_close_frame_is_sent() -> None:
    """A side that has sent one gets none of ours in its direction."""
    pumped = Pumped()
    theirs = close_frame(1000, masked=False)
    pumped.relay.provider.dataReceived(theirs)
    pumped.relay.end(None)
    assert pumped.client.written == theirs
    assert pumped.provider.written.startswith(b"\x88\x82")


def test_sides_that_do_not_let_us_end_are_dropped() -> None:
    """After a second."""
    pumped = Pumped()
    for side in (pumped.relay.provider, pumped.relay.client):
        side.dataReceived(sent(b"never finished")[:5])
    pumped.relay.end(Cut())
    assert pumped.client.calls == pumped.provider.calls == []
    pumped.clock.advance(1.0)
    assert pumped.client.calls == pumped.provider.calls == ["abort"]


@pytest.mark.parametrize("busy", [True, False])
def test_a_drain_waits_for_what_is_under_way(busy: bool) -> None:
    """Until the event that ends it has been forwarded."""
    pumped = Pumped()
    pumped.busy = busy
    pumped.relay.end_soon()
    if busy:
        assert pumped.client.calls == []
        pumped.busy = False
        pumped.relay.provider.dataReceived(sent(b"done"))
        assert pumped.client.written == sent(b"done") + GOING_AWAY
    assert pumped.client.calls == ["close"]


def test_each_side_holds_up_the_other() -> None:
    """And a client's pause is no silence of the provider's."""
    pumped = Pumped(idle=10.0)
    pumped.client.producer.pauseProducing()
    assert (pumped.provider.calls, pumped.relay.is_paused) == (["pause"], True)
    pumped.clock.pump([9.0, 9.0])
    assert not pumped.is_ending()
    assert pumped.relay.paused_s == 18.0
    pumped.client.producer.resumeProducing()
    assert pumped.provider.calls == ["pause", "resume"]
    pumped.clock.pump([9.0])
    assert not pumped.is_ending()
    pumped.clock.pump([9.0])
    assert pumped.is_ending()
    assert pumped.relay.paused_s == 18.0


@pytest.mark.parametrize(
    ("reason", "calls"), [(ConnectionDone(), ["close", "abort"]), (ConnectionLost(), ["abort"])]
)
def test_a_client_that_leaves_takes_the_provider_along(reason: Exception, calls: list[str]) -> None:
    """Behind a FIN the provider has 50 ms to take what came before; then it is dropped."""
    pumped = Pumped()
    pumped.lose(client=reason)
    assert pumped.provider.calls == calls[:1]
    pumped.clock.advance(0.05)
    assert pumped.provider.calls == calls
    pumped.lose(provider=ConnectionLost())
    assert pumped.endings == [Ending("client")]


def test_a_client_that_is_dropped_says_why() -> None:
    """The reason is that of the connection."""
    pumped = Pumped()
    gone = ClientGone()
    pumped.lose(client=gone, provider=ConnectionLost())
    assert pumped.endings == [Ending("client", why=gone)]
