"""The tap of a WebSocket: responses of two APIs from copies of frames, bounded and harmless."""

from __future__ import annotations

import itertools
import json
import os
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import FrameProtocol

from llmproxy.errors import EndReason
from llmproxy.stream.tap import Degraded, Result
from llmproxy.stream.websocket import Messages, SocketResponse, WebSocketTap
from tests.support.websocket import BINARY, CLOSE, PING, frame

MASK = b"\x01\x02\x03\x04"
MIB = 1024 * 1024
USAGE = {"input_tokens": 10, "output_tokens": 20}


class Sender:
    """One side that sends, with a context of its own."""

    def __init__(self, *, client: bool = False, forgets: bool = False) -> None:
        extension = PerMessageDeflate()
        words = "permessage-deflate"
        if forgets:
            words += "; server_no_context_takeover; client_no_context_takeover"
        extension.finalize(words)
        self.extensions = words.encode()
        self._frames = FrameProtocol(client, [extension])

    def text(self, *pieces: str) -> bytes:
        """Return a compressed message, a frame for each piece."""
        last = len(pieces) - 1
        return b"".join(
            bytes(self._frames.send_data(piece, fin=at == last)) for at, piece in enumerate(pieces)
        )


class Taken:
    """What a reader of messages has taken."""

    def __init__(self, **options: Any) -> None:
        self.messages: list[bytes] = []
        self.degraded: list[Degraded] = []
        self.time = 0.0
        usual: dict[str, Any] = {"from_server": True, "extensions": None, "most": MIB}
        self.reader = Messages(
            **{**usual, **options},
            clock=lambda: self.time,
            take=self.messages.append,
            degraded=self.degraded.append,
        )


def fed(wire: bytes, cuts: list[int], **options: Any) -> Taken:
    """Return what was taken from bytes that were split at these places."""
    taken = Taken(**options)
    points = sorted({0, len(wire), *(cut for cut in cuts if cut < len(wire))})
    for begin, end in itertools.pairwise(points):
        taken.reader.feed(wire[begin:end])
    return taken


# --- messages -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2000), max_size=10), st.booleans(), st.booleans())
def test_text_messages_are_read_at_any_split(
    cuts: list[int], from_client: bool, forgets: bool
) -> None:
    """Compressed with or without context takeover, in fragments with control frames between."""
    mask = MASK if from_client else b""
    sender = Sender(client=from_client, forgets=forgets)
    words = [f'{{"n": {n}, "text": "the same words again and again"}}' for n in range(4)]
    wire = sender.text(words[0]) + frame(b"x" * 300, BINARY, mask=mask) + sender.text(words[1])
    halves = sender.text(words[2][:20], words[2][20:])
    first = 2 + (halves[1] & 0x7F) + (4 if from_client else 0)
    wire += halves[:first] + frame(b"p", PING, mask=mask) + halves[first:]
    wire += sender.text("") + frame(words[3].encode(), mask=mask)
    taken = fed(wire, cuts, from_server=not from_client, extensions=sender.extensions)
    assert [message.decode() for message in taken.messages] == [*words[:3], "", words[3]]
    assert not taken.degraded


@pytest.mark.parametrize("bits", range(9, 16))
def test_a_smaller_window_is_read(bits: int) -> None:
    """Each side may be told to look back less far; its context lasts from message to message."""
    words = f"permessage-deflate; server_max_window_bits={bits}; client_max_window_bits={bits}"
    packed = zlib.compressobj(9, zlib.DEFLATED, -bits)
    random = os.urandom(300).hex()
    messages = [f"{number} {random * 20}".encode() for number in range(3)]
    wire = b"".join(
        frame((packed.compress(one) + packed.flush(zlib.Z_SYNC_FLUSH))[:-4], rsv=4)
        for one in messages
    )
    taken = fed(wire, [], extensions=words.encode())
    assert (taken.messages, taken.degraded) == (messages, [])


@pytest.mark.parametrize("is_compressed", [True, False])
def test_a_message_that_is_too_long_is_left_out(is_compressed: bool) -> None:
    """Whatever it is on the wire; the next ones are read, for which its context is needed."""
    sender = Sender()
    long, short = "y" * 200_001, "y" * 100
    wire = sender.text(long) + sender.text(short)
    if not is_compressed:
        wire = frame(long.encode()) + frame(short.encode())
    taken = fed(wire, [], most=200_000, extensions=sender.extensions)
    assert taken.messages == [short.encode()]
    assert taken.degraded == [Degraded.OVERLONG]


def test_a_bomb_is_given_up() -> None:
    """A message that makes too much work for the time in which it came ends the tap."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(b"\0" * 40 * MIB) + packed.flush(zlib.Z_SYNC_FLUSH)
    taken = Taken(extensions=b"permessage-deflate")
    taken.reader.feed(frame(data[:-4], rsv=4))
    assert taken.degraded == [Degraded.BOMB]
    assert not taken.reader.is_reading


def test_a_binary_message_that_inflates_is_paid_for_too() -> None:
    """Its output is dropped, but takes time."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packed.compress(b"\0" * 40 * MIB) + packed.flush(zlib.Z_SYNC_FLUSH)
    taken = Taken(extensions=b"permessage-deflate")
    taken.reader.feed(frame(data[:-4], BINARY, rsv=4))
    assert taken.degraded == [Degraded.BOMB]


@pytest.mark.parametrize(
    ("wire", "extensions"),
    [
        (frame(b"x", rsv=4), None),
        (frame(b"x", 3), None),
        (frame(b"x", mask=MASK), None),
        (frame(b"\xff\xff\xff", rsv=4), b"permessage-deflate"),
        (frame(b"x"), b"x-webkit-deflate-frame"),
        (frame(b"x"), b"permessage-deflate, other"),
    ],
)
def test_what_cannot_be_read_ends_the_tap(wire: bytes, extensions: bytes | None) -> None:
    """It is reported once."""
    taken = Taken(extensions=extensions)
    for _ in range(2):
        taken.reader.feed(wire)
    assert (taken.messages, taken.degraded) == ([], [Degraded.ENCODING])


@given(st.binary(max_size=500), st.lists(st.integers(0, 500), max_size=5), st.booleans())
def test_no_bytes_raise(wire: bytes, cuts: list[int], from_server: bool) -> None:
    """Whatever comes, nothing is raised to the relay."""
    fed(wire, cuts, from_server=from_server, extensions=b"permessage-deflate")


def test_nothing_is_read_behind_a_close_frame() -> None:
    """What comes behind one is no message."""
    taken = Taken()
    taken.reader.feed(frame(b"{}") + frame(b"", CLOSE) + frame(b"{}"))
    assert (taken.messages, taken.degraded) == ([b"{}"], [])


# --- responses ------------------------------------------------------------------------------------


class Tapped:
    """A tap, and what it found."""

    def __init__(self, *, capture: Any = "usage", model: str | None = None) -> None:
        self.ended: list[SocketResponse] = []
        self.degraded: list[Degraded] = []
        self.time = 0.0
        self.tap = WebSocketTap(
            extensions=None,
            model=model,
            capture=capture,
            accumulate=MIB,
            event=MIB,
            clock=lambda: self.time,
            name="x",
            ended=self.ended.append,
            degraded=self.degraded.append,
        )

    def client(self, **event: Any) -> None:
        """The client sends an event."""
        self.tap.feed_client(frame(json.dumps(event).encode(), mask=os.urandom(4)))

    def provider(self, kind: str, **event: Any) -> None:
        """The provider sends one."""
        self.tap.feed_provider(frame(json.dumps({"type": kind, **event}).encode()))

    def is_busy(self) -> bool:
        """Return whether a response is under way."""
        return self.tap.is_busy

    @property
    def results(self) -> list[Result]:
        """What the responses held."""
        return [one.result(EndReason.CLIENT_GONE) for one in self.ended]


def test_a_response_of_responses() -> None:
    """The model is the request's; usage stands in the last event."""
    tapped = Tapped()
    assert not tapped.is_busy()
    tapped.client(type="response.create", model="gpt-5", input="hi")
    assert tapped.is_busy()
    tapped.time = 1.0
    tapped.provider("response.created", response={"id": "r1", "status": "in_progress"})
    tapped.time = 2.0
    tapped.provider("response.output_text.delta", delta="hel", sequence_number=2)
    tapped.provider("response.output_text.delta", delta="lo")
    usage = {**USAGE, "input_tokens_details": {"cached_tokens": 4}}
    usage["output_tokens_details"] = {"reasoning_tokens": 5}
    response = {"id": "r1", "status": "completed", "model": "gpt-5-2026", "usage": usage}
    tapped.provider("response.completed", response=response)
    assert not tapped.is_busy()
    (result,) = tapped.results
    assert (tapped.ended[0].model, tapped.ended[0].first_at) == ("gpt-5", 2.0)
    assert (result.end_reason, result.model) == (EndReason.COMPLETE, "gpt-5-2026")
    assert (result.usage.input_tokens, result.usage.output_tokens) == (10, 20)
    assert (result.usage.cache_read_tokens, result.usage.reasoning_tokens) == (4, 5)
    assert (result.usage.provenance, result.events, result.text) == ("reported", 4, "")


def test_a_response_of_realtime() -> None:
    """The model is the session's, and a response may begin by itself; two may run at once."""
    tapped = Tapped(capture="content", model="gpt-realtime")
    tapped.provider("session.created", session={"model": "gpt-realtime-2026"})
    tapped.provider("response.created", response={"id": "r1"})
    tapped.client(type="response.create", response={"conversation": "none"})
    tapped.provider("response.created", response={"id": "r2"})
    for name, text in (("r1", "one"), ("r2", "two"), ("r1", " more")):
        tapped.provider("response.output_text.delta", response_id=name, delta=text)
    usage = {**USAGE, "input_token_details": {"cached_tokens": 3}}
    for name in ("r2", "r1"):
        response = {"id": name, "status": "completed", "usage": usage}
        tapped.provider("response.done", response=response)
    assert [one.text for one in tapped.results] == ["two", "one more"]
    assert [one.usage.cache_read_tokens for one in tapped.results] == [3, 3]
    assert [one.model for one in tapped.ended] == ["gpt-realtime-2026"] * 2


def test_a_warm_up_is_not_wanted() -> None:
    """``generate: false``: the connection is busy, and it is nobody's response."""
    tapped = Tapped()
    tapped.client(type="response.create", model="m", generate=False)
    tapped.provider("response.created", response={"id": "r0"})
    assert tapped.is_busy()
    tapped.provider("response.completed", response={"id": "r0", "usage": USAGE})
    assert [one.is_wanted for one in tapped.ended] == [False]


@pytest.mark.parametrize("has_begun", [True, False])
def test_an_error_ends_a_response(has_begun: bool) -> None:
    """That which runs, or that which was asked for and did not begin."""
    tapped = Tapped()
    tapped.client(type="response.create")
    if has_begun:
        tapped.provider("response.created", response={"id": "r1"})
    tapped.provider("error", error={"type": "server_error", "message": "no"})
    (result,) = tapped.results
    assert result.end_reason is EndReason.UPSTREAM_FAILED
    assert result.error == ("server_error", "no")
    assert not tapped.is_busy()


@pytest.mark.parametrize(
    ("kind", "response"),
    [
        ("response.failed", {"status": "failed", "error": {"code": "server_error"}}),
        ("response.done", {"status": "failed", "status_details": {"error": {"type": "x"}}}),
    ],
)
def test_a_response_may_fail(kind: str, response: dict[str, Any]) -> None:
    """The provider says so in its last event."""
    tapped = Tapped()
    tapped.provider("response.created", response={"id": "r1"})
    tapped.provider(kind, response={"id": "r1", "usage": USAGE, **response})
    (result,) = tapped.results
    assert (result.end_reason, result.usage.input_tokens) == (EndReason.UPSTREAM_FAILED, 10)


def test_what_has_not_ended_is_there_at_the_end() -> None:
    """A response that runs, and one that was asked for."""
    tapped = Tapped()
    tapped.provider("response.created", response={"id": "r1"})
    tapped.client(type="response.create", model="m")
    left = tapped.tap.finish()
    assert [one.result(EndReason.DRAINED).end_reason for one in left] == [EndReason.DRAINED] * 2
    assert not tapped.is_busy()


def test_a_last_event_may_be_too_long() -> None:
    """The response has ended, and its tokens are not known."""
    tapped = Tapped()
    tapped.provider("response.created", response={"id": "r1"})
    tapped.provider("response.output_text.done", text="x" * 2 * MIB)
    assert tapped.is_busy()
    response = {"id": "r1", "status": "completed", "output": "x" * 2 * MIB, "usage": USAGE}
    tapped.provider("response.completed", response=response)
    assert (tapped.is_busy(), tapped.degraded) == (False, [Degraded.OVERLONG])
    (result,) = tapped.results
    assert (result.end_reason, result.usage.provenance) == (EndReason.COMPLETE, "none")
    assert tapped.tap.knows_all


def test_a_name_that_comes_again_is_another_response() -> None:
    """Each that was asked for comes to an end: it may hold a place of its client's."""
    tapped = Tapped()
    for number in range(3):
        tapped.client(type="response.create", model=f"m{number}")
        for _ in range(2):
            tapped.provider("response.created", response={"id": "always the same"})
    tapped.provider("response.completed", response={"id": "always the same"})
    assert [one.model for one in tapped.ended] == ["m0", "m1", "m2"]
    reasons = [one.result(EndReason.COMPLETE).end_reason for one in tapped.ended]
    assert reasons == [EndReason.UPSTREAM_FAILED, EndReason.UPSTREAM_FAILED, EndReason.COMPLETE]
    assert not tapped.is_busy()


def test_however_many_run_each_comes_to_an_end() -> None:
    """Those that ran longest are given up first; more than are followed cannot be asked for."""
    tapped = Tapped()
    for number in range(300):
        assert not tapped.tap.is_full
        tapped.client(type="response.create", model=f"m{number}")
        tapped.provider("response.created", response={"id": f"r{number}"})
    assert [one.model for one in tapped.ended] == [f"m{number}" for number in range(44)]
    for _ in range(256):
        assert not tapped.tap.is_full
        tapped.client(type="response.create")
    assert tapped.tap.is_full
    assert len(tapped.ended) + len(tapped.tap.finish()) == 556


def test_an_odd_event_degrades_the_record_alone() -> None:
    """What the provider sends is read on; what the client sends is the provider's to judge."""
    tapped = Tapped()
    tapped.tap.feed_client(frame(b"no json", mask=MASK))
    assert (tapped.degraded, tapped.tap.knows_all) == ([], True)
    tapped.tap.feed_provider(frame(b"no json"))
    tapped.tap.feed_provider(frame(b"[]"))
    assert (tapped.degraded, tapped.tap.knows_all) == ([Degraded.UNREADABLE], True)
    tapped.tap.feed_provider(frame(b"x", 3))
    assert not tapped.tap.knows_all
