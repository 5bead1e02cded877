"""curl as a client: tokens one by one, and no broken body that it takes for whole."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import WAIT, Wire, chunked
from tests.support.stage import (
    DONE,
    LAST,
    SSE,
    Link,
    Stage,
    Turn,
    assert_settles,
    chunked_answer,
    event,
    open_stage,
)

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

PARTIAL_FILE, RECEIVE_ERROR = 18, 56
"""curl's own exit codes."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """One route."""
    folder = tmp_path_factory.mktemp("curl")
    with open_stage(
        folder, lambda url: provider_config(url, provider=link.keys), link=link
    ) as stage:
        yield stage


@contextmanager
def curl(stage: Stage, path: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run curl against the proxy; it is gone afterwards."""
    url = f"http://127.0.0.1:{stage.daemon.port}{path}"
    command = ["curl", "-sS", "--max-time", str(int(WAIT)), *options, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def read_some(process: subprocess.Popen[bytes]) -> bytes:
    """Read what curl has printed, once it has printed something."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], WAIT)
    assert ready, "curl printed nothing"
    return os.read(process.stdout.fileno(), 65536)


def has_printed(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether there is something to read now."""
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0)[0])


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
def test_tokens_are_printed_one_by_one(stage: Stage, version: str) -> None:
    """`curl -N` shows each before the next was sent, in either version of HTTP."""
    turn = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE)
        for number in range(5):
            turn.take()
            wire.send(chunked(event(number)))
        turn.take()
        wire.send(chunked(DONE), LAST)

    stage.script = script
    with curl(stage, "/p/x", "-N", version, "-d", '{"stream":true}') as process:
        for number in range(5):
            assert not has_printed(process)
            turn.give()
            assert read_some(process) == event(number)
        turn.give()
        assert read_some(process) == DONE
        assert read_some(process) == b""
        assert process.wait(WAIT) == 0


def test_a_body_that_is_whole_is_whole(stage: Stage) -> None:
    """Exit 0 in each version, for each framing."""
    for reply in (
        chunked_answer(b"data: 1\n\n", DONE),
        b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n" + DONE,
    ):

        def script(wire: Wire, reply: bytes = reply) -> None:
            wire.read_request()
            wire.send(reply)
            wire.farewell()

        stage.script = script
        for version in ("--http1.1", "--http1.0"):
            with curl(stage, "/p/x", "-N", version) as process:
                printed, told = process.communicate(timeout=WAIT)
                assert (process.returncode, told) == (0, b"")
                assert printed == b"data: 1\n\n" + DONE


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
@pytest.mark.parametrize("end", ["fin", "reset"])
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_broken_body_is_an_error_behind_all_that_came(
    stage: Stage, framing: str, end: str, version: str
) -> None:
    """Exit 18 or 56, never 0, and every byte that came before the break was printed."""
    turn = Turn()
    pieces = [event(number) for number in range(3)] + [b"data: " + b"x" * 300_000]
    whole = b"".join(pieces)
    head = SSE.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000000")

    def script(wire: Wire) -> None:
        wire.read_request()
        if framing == "chunked":
            wire.send(SSE, chunked(*pieces))
        else:
            wire.send(head, whole)
        turn.take()
        if end == "reset":
            wire.reset()

    stage.script = script
    with curl(stage, "/p/x", "-N", version) as process:
        printed = b""
        while len(printed) < len(whole):
            printed += read_some(process)
        turn.give()
        rest, told = process.communicate(timeout=WAIT)
        assert printed + rest == whole
        assert process.returncode in (PARTIAL_FILE, RECEIVE_ERROR)
        assert told.startswith(b"curl: (")
    assert_settles(stage.daemon)


def test_all_that_came_reaches_a_slow_reader_before_the_reset(stage: Stage) -> None:
    """An HTTP/1.0 client that has read nothing when the body breaks still gets every byte."""
    whole = b"x" * 3_000_000

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(whole))

    stage.script = script
    with curl(stage, "/p/x", "--http1.0", "--limit-rate", "3M") as process:
        printed, _ = process.communicate(timeout=WAIT)
        assert process.returncode in (PARTIAL_FILE, RECEIVE_ERROR)
        assert printed == whole
    assert_settles(stage.daemon)


def test_curl_that_is_stopped_ends_the_providers_work(stage: Stage) -> None:
    """A killed client is a client that left."""
    ended = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        wire.wait_closed()
        ended.give()

    stage.script = script
    with curl(stage, "/p/x", "-N") as process:
        assert read_some(process) == event(0)
    ended.take()
    assert_settles(stage.daemon)
