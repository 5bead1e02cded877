"""Deadlines towards providers: each phase has its own (design 4)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import Wire, chunked
from tests.support.stage import (
    LAST,
    SSE,
    Link,
    Notes,
    Stage,
    assert_settles,
    event,
    open_stage,
    post,
    trace_of,
    until,
)

PACE = threading.Event()
"""Never set: a wait for it is a pause."""


def routes(url: str, keys: str) -> str:
    """Return routes with short deadlines, and one provider with its own."""
    parts = [provider_config(url, provider=keys)]
    for name, timeouts in {
        "first": 'first_byte = "300ms"',
        "idle": 'idle = "300ms"',
        "idle-1s": 'idle = "1s"',
        "total": 'total = "500ms"',
        "wins": 'first_byte = "300ms"',
    }.items():
        provider = "slow" if name == "wins" else "p"
        parts.append(f"""
[[routes]]
path = "/{name}"
providers = ["{provider}"]
timeouts = {{ {timeouts} }}
""")
    parts.append(f"""
[providers.slow]
url = "{url}"
dialect = "anthropic"
timeouts = {{ first_byte = "100s", idle = "300ms" }}
{keys}
""")
    return "".join(parts)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """One provider, and routes of different patience."""
    folder = tmp_path_factory.mktemp("deadlines")
    with open_stage(folder, lambda url: routes(url, link.keys), link=link) as stage:
        yield stage


def silent_after(stage: Stage, *pieces: bytes) -> Notes:
    """Let the provider send these and then nothing; the note tells how its connection ended."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(*pieces)
        ended.put(wire.wait_closed())

    stage.script = script
    return ended


@pytest.mark.parametrize("route", ["first", "wins"])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nX-Half: ", b"HTTP/1.1 102 P\r\n\r\n"])
def test_a_response_that_does_not_begin_is_a_504(stage: Stage, sent: bytes, route: str) -> None:
    """first_byte ends with the whole head, and the client is told that the work may be done."""
    ended = silent_after(stage, sent)
    got = stage.get(post(f"/{route}/x"))
    assert got.status == 504
    assert got.values(b"x-llmproxy-error") == [b"upstream_timeout"]
    assert got.values(b"x-should-retry") == [b"false"]
    ended.read()
    record = stage.trace(got)
    assert record["end_reason"] == "upstream_timeout"
    assert [one["outcome"] for one in record["attempts"]] == ["upstream_timeout"]
    assert_settles(stage.daemon)


@pytest.mark.parametrize("body", [b"", chunked(event(0))])
@pytest.mark.parametrize("route", ["idle", "wins"])
def test_silence_inside_a_body_breaks_it(stage: Stage, route: str, body: bytes) -> None:
    """upstream_idle: what came arrives, the end does not, and the provider is let go of."""
    ended = silent_after(stage, SSE, body)
    path = f"/{route}/silent{len(body)}"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        client.wait_closed()
        assert client.buffer == body
    ended.read()
    record = trace_of(stage.daemon, path=path)
    assert (record["end_reason"], record["error"]) == ("upstream_idle", "upstream_idle")
    assert (record["status"], record["is_complete"]) == (200, False)
    assert_settles(stage.daemon)


def test_every_byte_winds_the_idle_clock_up(stage: Stage) -> None:
    """A stream lives longer than `idle` as long as something comes, be it a byte."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for _ in range(4):
            PACE.wait(0.4)
            wire.send(chunked(b":"))
        wire.send(LAST)

    stage.script = script
    got = stage.get(post("/idle-1s/x"))
    assert got.body == b"::::"
    assert stage.trace(got)["end_reason"] == "complete"


def test_the_idle_clock_stands_still_while_the_client_is_slow(stage: Stage) -> None:
    """A client that pauses for longer than `idle` gets its whole body after that."""
    body = bytes(range(256)) * 4 * 6_000

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
        wire.send(body)

    stage.script = script
    with stage.connect(receive_buffer=16384) as client:
        client.send(post("/idle/slow-client"))
        client.read_head()

        def paused() -> bool:
            return stage.daemon.metrics()["llmproxy_pause_seconds_total"] > 1.0

        until(paused, "the stream is paused for longer than three times `idle`")
        assert stage.daemon.metrics()["llmproxy_paused_streams"] == 1
        assert client.read(len(body)) == body
    record = trace_of(stage.daemon, path="/idle/slow-client")
    assert record["end_reason"] == "complete"
    assert record["paused_s"] > 0.9


def test_total_ends_a_request_that_is_not_answered(stage: Stage) -> None:
    """504 while the client has nothing, whatever the phase."""
    ended = silent_after(stage)
    got = stage.get(post("/total/x"))
    assert got.status == 504
    assert got.values(b"x-llmproxy-error") == [b"upstream_timeout"]
    ended.read()
    assert stage.trace(got)["end_reason"] == "upstream_timeout"


def test_total_ends_a_stream_that_does_not(stage: Stage) -> None:
    """However busy it is; the body breaks."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        try:
            for number in range(1000):
                wire.send(chunked(event(number)))
                PACE.wait(0.02)
        except OSError:
            ended.put("cut")
            raise

    stage.script = script
    with stage.connect() as client:
        client.send(post("/total/busy"))
        client.read_head()
        client.wait_closed()
        assert client.buffer.startswith(chunked(event(0)))
        assert not client.buffer.endswith(LAST)
    assert ended.read() == "cut"
    record = trace_of(stage.daemon, path="/total/busy")
    assert record["end_reason"] == "upstream_timeout"
    assert 0.4 < record["duration_s"] < 5
    assert_settles(stage.daemon)
