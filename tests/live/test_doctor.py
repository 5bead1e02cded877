"""The doctor before real hops: the verdict is right, and the guilty hop is named."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from llmproxy.cli.doctor.diagnosis import Diagnosis, conclude, diagnose
from llmproxy.cli.doctor.examination import Checks, Observations, examine
from llmproxy.cli.doctor.exchange import Trust
from llmproxy.cli.doctor.target import target
from llmproxy.cli.doctor.verdict import Kind, Level, State
from llmproxy.dialects.dialect import Dialect
from tests.support.hops import hop, is_installed
from tests.support.live_proxy import LiveProxy, live_fixture
from tests.support.paced import OPEN_FIELDS, PacedServer
from tests.support.scripts import DONE, LAST, SSE
from tests.support.sockets import Provider, Script, Wire, chunked

PACE = "/-/pace?n=16&interval_ms=100&bytes=200"
CHECKS = Checks(timeout_s=20.0, stall_s=1.0, patience_s=1.0)
GZIP = ("gzip on;", "gzip_types text/event-stream;")
HTTP_11 = ("proxy_http_version 1.1;", 'proxy_set_header Connection "";')
OFF = ("proxy_buffering off;",)
SMALL = ("proxy_buffer_size 1k;", "proxy_buffers 2 1k;", "proxy_busy_buffers_size 1k;")


class Case(NamedTuple):
    """A hop as it is configured, and what is found of it.

    Args:
        kind: which program.
        lines: of its configuration.
        held: how it holds a stream back, if it does.
        warned: what else it does.
        programs: what it is, by its own words.
        framing: of the stream behind it.
        fields: of the stream's head.
    """

    kind: str
    lines: tuple[str, ...] = ()
    held: Kind | None = None
    warned: tuple[Kind, ...] = ()
    programs: tuple[str, ...] = ("nginx",)
    framing: str = "chunked"
    fields: tuple[str, ...] = ()


TAKES, HIDDEN = Kind.TAKES_MUCH, Kind.BREAK_HIDDEN
CASES = {
    "nginx, as it comes": Case("nginx", warned=(TAKES,)),
    "nginx, for a stream without framing": Case(
        "nginx", held=Kind.BLOCKS, warned=(TAKES,), framing="close"
    ),
    "nginx, without buffering": Case("nginx", OFF, framing="close"),
    "nginx, with gzip": Case("nginx", (*HTTP_11, *GZIP), held=Kind.COMPRESSED, warned=(TAKES,)),
    "nginx, with gzip and without buffering": Case("nginx", (*HTTP_11, *GZIP, *OFF)),
    "nginx, with gzip, for llmproxy's head": Case("nginx", (*HTTP_11, *GZIP), fields=OPEN_FIELDS),
    "HAProxy, as it comes": Case(
        "haproxy", held=Kind.LATE, warned=(Kind.CANCEL_LOST_IN_SILENCE,), programs=("HAProxy",)
    ),
    "HAProxy, with http-no-delay": Case(
        "haproxy",
        ("option http-no-delay",),
        warned=(Kind.CANCEL_LOST_IN_SILENCE,),
        programs=(),
    ),
    "Caddy 2.6, as it comes": Case("caddy", warned=(HIDDEN,), programs=("Caddy",)),
    "Caddy 2.6, with compression": Case(
        "caddy", ("encode gzip",), warned=(HIDDEN,), programs=("Caddy",)
    ),
}


def examined(case: Case) -> Diagnosis:
    """What the doctor says of a far end, behind the hop and without it."""
    server = PacedServer(*case.fields, framing=case.framing)
    with Provider(server) as origin, hop(case.kind, origin.port, *case.lines) as port:
        return diagnosed(f"http://127.0.0.1:{port}{PACE}", f"{origin.url}{PACE}")


def diagnosed(*urls: str, checks: Checks = CHECKS) -> Diagnosis:
    """What the doctor says of URLs; examined at the same time, it takes half as long."""

    def one(url: str) -> Observations:
        return examine(target(url), checks, Trust(), lambda words: None)

    with ThreadPoolExecutor() as threads:
        return conclude([*threads.map(one, urls)])


@pytest.mark.parametrize("name", CASES)
def test_what_a_hop_does_is_found_and_put_down_to_it(name: str) -> None:
    """And nothing else is; the far end itself is healthy."""
    case = CASES[name]
    if not is_installed(case.kind):
        pytest.skip(f"{case.kind} is not installed")
    found = examined(case)
    outer, inner = found.verdicts
    assert inner.state is State.HEALTHY
    assert outer.state is (State.BUFFERED if case.held else State.HEALTHY), outer
    assert found.code == (1 if case.held else 0)
    bad = [one.kind for one in outer.findings if one.level is Level.BAD]
    assert bad == ([case.held] if case.held else [])
    guilts = [guilt for guilt, _ in found.guilts if guilt.at == outer.target]
    assert {guilt.kind for guilt in guilts} == {*bad, *case.warned}, guilts
    for guilt in guilts:
        assert (guilt.before, tuple(guilt.programs)) == (inner.target, case.programs)
    for guilt, lines in found.guilts:
        if guilt.at == outer.target:
            assert lines[0].program == (case.programs or ("HAProxy",))[0]


def test_the_size_of_a_buffer_is_told() -> None:
    """As nginx's configuration has it."""
    if not is_installed("nginx"):
        pytest.skip("nginx is not installed")
    outer, _ = examined(Case("nginx", SMALL, framing="close")).verdicts
    assert outer.words.startswith("held in blocks of 1,024 bytes"), outer


def test_a_silence_that_a_hop_cuts_is_timed() -> None:
    """nginx gives up after ``proxy_read_timeout``, and the line that sets it is named."""
    if not is_installed("nginx"):
        pytest.skip("nginx is not installed")
    with (
        Provider(PacedServer(*OPEN_FIELDS)) as origin,
        hop("nginx", origin.port, *HTTP_11, *OFF, "proxy_read_timeout 1s;") as port,
    ):
        checks = Checks(timeout_s=20.0, idle_s=3.0, stall_s=0.5, patience_s=1.0)
        found = diagnosed(f"http://127.0.0.1:{port}{PACE}", f"{origin.url}{PACE}", checks=checks)
    outer, inner = found.verdicts
    assert [one.kind for one in inner.findings] == []
    cut = re.fullmatch(r"cut after (\d\.\d) s of silence", outer.words)
    assert cut, outer
    assert 0.5 < float(cut[1]) < 3.0  # nginx begins to count when it last looked at its clock
    (guilt, lines) = found.guilts[0]
    assert (guilt.kind, guilt.programs) == (Kind.CUT_IN_SILENCE, ["nginx"])
    assert lines[0].lines == ("proxy_read_timeout 1h;",)
    assert lines[1].lines == ('heartbeat = "15s"',)


# --- a real request through llmproxy --------------------------------------------------------------

live = live_fixture()


def words(count: int, *, pause_s: float) -> Script:
    """Play a provider that sends events in the shape of a chat, with pauses or all at once."""

    def script(wire: Wire) -> None:
        request = wire.read_request()
        assert request.target.endswith(b"/chat/completions")
        events = [b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'] * count
        if pause_s:
            wire.send(SSE)
            for one in events:
                wire.send(chunked(one))
                time.sleep(pause_s)
            wire.send(chunked(DONE), LAST)
        else:
            time.sleep(1.2)
            wire.send(SSE + chunked(b"".join([*events, DONE])) + LAST)

    return script


def called(live: LiveProxy) -> Diagnosis:
    """What is said of llmproxy, and of the provider that is asked directly."""
    ways = ((f"http://127.0.0.1:{live.daemon.port}/p", False), (live.provider.url, True))
    calls = [target(url, dialect=Dialect.OPENAI, model="m", direct=direct) for url, direct in ways]
    return diagnose(calls, checks=CHECKS)


def test_a_call_through_llmproxy_streams(live: LiveProxy) -> None:
    """As it does at the provider itself."""
    live.script = words(12, pause_s=0.1)
    found = called(live)
    assert (found.code, found.guilts) == (0, [])
    assert [one.shape.events for one in found.verdicts] == [13, 13]


def test_a_provider_that_holds_its_stream_is_not_put_down_to_llmproxy(live: LiveProxy) -> None:
    """It is held at both URLs, so that the inner one is to blame."""
    live.script = words(12, pause_s=0)
    found = called(live)
    assert found.code == 1
    assert [one.state for one in found.verdicts] == [State.BUFFERED] * 2
    (guilt, _), *more = found.guilts
    assert (guilt.kind, guilt.at, guilt.programs, more) == (
        *(Kind.HELD, found.verdicts[1].target, []),
        [],
    )


def test_the_daemons_own_paced_stream(live: LiveProxy) -> None:
    """It shows everything, and nginx does not hold it: its head forbids that."""
    if not is_installed("nginx"):
        pytest.skip("nginx is not installed")
    with hop("nginx", live.daemon.port) as port:
        ports = (port, live.daemon.port)
        checks = Checks(timeout_s=20.0, idle_s=1.0, stall_s=1.0, patience_s=5.0)
        found = diagnosed(*(f"http://127.0.0.1:{one}{PACE}" for one in ports), checks=checks)
    assert [one.state for one in found.verdicts] == [State.HEALTHY] * 2
    assert [(one.kind, one.programs) for one, _ in found.guilts] == [(Kind.ASKED_IN_1_0, ["nginx"])]
    for seen in found.seen:
        tried = (seen.broken, seen.cancel_sending, seen.cancel_silent, seen.unread, seen.silence)
        assert None not in tried
