"""Everything that is tried with one URL, against a paced server on real sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from urllib.parse import parse_qsl

import pytest

from llmproxy.cli.doctor.diagnosis import diagnose
from llmproxy.cli.doctor.examination import Checks, Observations, examine
from llmproxy.cli.doctor.exchange import End, Trust
from llmproxy.cli.doctor.target import target
from llmproxy.cli.doctor.verdict import State, judge
from tests.support.paced import OPEN_FIELDS, PacedServer
from tests.support.scripts import DONE, LAST, SSE, event
from tests.support.sockets import Provider, Script, Wire, chunked

QUICK = "n=12&interval_ms=50&bytes=150"
SHORT = Checks(timeout_s=20.0, stall_s=0.5, patience_s=0.5)


def examined(
    script: Script, path: str = f"/-/pace?{QUICK}", checks: Checks = SHORT
) -> tuple[Observations, list[str]]:
    """What is seen, and what was said to be tried."""
    said: list[str] = []
    with Provider(script) as provider:
        seen = examine(target(provider.url + path), checks, Trust(), said.append)
    return seen, said


def queries(server: PacedServer) -> list[dict[str, str]]:
    """What each request asked for."""
    return [dict(parse_qsl(one.target.decode().partition("?")[2])) for one in server.requests]


def test_a_paced_stream_shows_everything() -> None:
    """Each check has its answer, and the far end was told of those who left."""
    server = PacedServer(*OPEN_FIELDS)
    seen, said = examined(server, checks=Checks(stall_s=0.5, patience_s=5.0, idle_s=0.3))
    assert said == [
        *("the stream", "a broken body", "a client that leaves", "a slow reader"),
        "a silence of 0.3 s",
    ]
    assert len(seen.stream.events) == 12
    assert (seen.plain, seen.wide) == (None, None)
    assert seen.broken is not None
    assert (seen.broken.end, len(seen.broken.events)) == (End.CUT, 5)
    for told in (seen.cancel_sending, seen.cancel_silent):
        assert told is not None
        assert told.seconds is not None
    assert seen.unread is not None
    assert seen.unread.far_end_waited
    assert seen.silence is not None
    assert (seen.silence.end, len(seen.silence.events)) == (End.WHOLE, 4)
    assert seen.arrived == {"version": "1.1", "accept-encoding": "identity"}
    marks = [asked["mark"] for asked in queries(server)]
    assert len({*marks}) == len(marks)  # no cache can answer the second one


def test_the_stream_is_asked_for_as_a_client_does_that_takes_gzip() -> None:
    """All others are not, for only the first is about compression."""
    server = PacedServer(*OPEN_FIELDS)
    examined(server)
    codings = [request.values(b"accept-encoding") for request in server.requests]
    assert codings[0] == [b"gzip"]
    assert {coding for (coding,) in codings[1:]} == {b"identity"}


@pytest.mark.parametrize(
    ("word", "unknown"),
    [
        ("break_after", ["broken"]),
        ("ended", ["cancel_sending", "cancel_silent", "arrived"]),
        ("silence_ms", ["cancel_silent", "silence"]),
    ],
)
def test_a_far_end_that_does_not_know_a_word(word: str, unknown: list[str]) -> None:
    """What needs it is not known, and all else is."""
    checks = Checks(stall_s=0.3, patience_s=5.0, idle_s=0.2)
    seen, _ = examined(PacedServer(unknown=(word,)), checks=checks)
    names = ("broken", "cancel_sending", "cancel_silent", "arrived", "silence", "unread")
    assert [name for name in names if getattr(seen, name) is None] == [
        name for name in names if name in unknown
    ]


@pytest.mark.parametrize("most", [1, 2])
def test_a_client_that_has_used_up_its_requests(most: int) -> None:
    """What is refused is not known, and is no finding."""
    checks = Checks(stall_s=0.3, patience_s=0.3, idle_s=0.2)
    server = PacedServer(*OPEN_FIELDS, most=most)
    seen, _ = examined(server, checks=checks)
    assert (seen.broken is None) is (most == 1)
    unknown = (seen.cancel_sending, seen.cancel_silent, seen.unread, seen.silence)
    assert unknown == (None,) * 4
    assert judge(seen).findings == []


class Relay:
    """A hop that does something to the response of a far end.

    Args:
        change: is called with what the client and the far end are reached by.

    Attributes:
        origin: the port of the far end.
    """

    def __init__(self, change: Callable[[Wire, socket.socket], None]) -> None:
        self.origin = 0
        self._change = change

    def __call__(self, wire: Wire) -> None:
        """Serve one request."""
        request = wire.read_until(b"\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.origin)) as far:
            far.sendall(request)
            self._change(wire, far)


def hold(wire: Wire, far: socket.socket) -> None:
    """Read to the end before anything is sent; the far end is not told who leaves."""
    held = b"".join(iter(lambda: far.recv(1 << 20), b""))
    wire.send(held)


def end_well(wire: Wire, far: socket.socket) -> None:
    """Put the last chunk behind a broken body."""
    last = b""
    while data := far.recv(1 << 20):
        wire.send(data)
        last = data
    if not last.endswith(LAST):
        wire.send(LAST)


def through(change: Callable[[Wire, socket.socket], None], checks: Checks) -> Observations:
    """What is seen of a paced stream behind a hop that does this to it."""
    relay = Relay(change)
    with Provider(relay) as hop, Provider(PacedServer(*OPEN_FIELDS)) as origin:
        relay.origin = origin.port
        return examine(target(f"{hop.url}/-/pace?{QUICK}"), checks, Trust(), lambda words: None)


def test_a_held_stream_is_looked_at_again() -> None:
    """Without compression, and with larger events; whoever leaves is not noticed."""
    seen = through(hold, Checks(timeout_s=3.0, stall_s=0.2, patience_s=0.3))
    assert seen.plain is not None
    assert seen.wide is not None
    assert seen.wide.size > 12 * 3000
    assert seen.cancel_sending is not None
    assert seen.cancel_sending.seconds is None


def test_a_break_that_is_hidden_is_seen_as_whole() -> None:
    """Five events, and a proper end."""
    seen = through(end_well, SHORT)
    assert seen.broken is not None
    assert (seen.broken.end, len(seen.broken.events)) == (End.WHOLE, 5)


def test_a_stream_that_is_not_paced_is_only_looked_at() -> None:
    """Nothing else is asked of a provider."""
    asked = []

    def script(wire: Wire) -> None:
        asked.append(wire.read_request().target)
        wire.send(SSE, chunked(event(0)), chunked(DONE), LAST)

    seen, said = examined(script, "/v1/stream")
    assert asked == [b"/v1/stream"]
    assert said == ["the stream"]
    assert (seen.broken, seen.cancel_sending, seen.unread, seen.arrived) == (None,) * 4


def test_a_url_that_is_refused_is_asked_once() -> None:
    """There is nothing to measure."""
    server = PacedServer(unknown=("n",))
    seen, said = examined(server)
    assert (seen.stream.status, said) == (400, ["the stream"])


def test_several_urls_make_one_diagnosis() -> None:
    """In their order, with the worst as the exit code; nothing is printed."""
    said = []
    with Provider(PacedServer(*OPEN_FIELDS)) as provider:
        there = target(f"{provider.url}/-/pace?{QUICK}")
        away = target("http://127.0.0.1:1/-/pace")
        found = diagnose(
            [there, away], checks=SHORT, progress=lambda number, words: said.append((number, words))
        )
    assert [one.state for one in found.verdicts] == [State.HEALTHY, State.UNREACHABLE]
    assert (found.code, found.guilts) == (2, [])
    assert said[-1] == (1, "the stream")


def test_a_run_is_bounded_by_its_timeout() -> None:
    """A stream without end is left."""
    began = time.monotonic()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        while True:
            wire.send(chunked(event(0)))
            time.sleep(0.02)

    seen, _ = examined(script, "/endless", Checks(timeout_s=0.5))
    assert seen.stream.end is End.OPEN
    assert time.monotonic() - began < 10
