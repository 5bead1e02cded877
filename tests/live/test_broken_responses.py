"""Answers that break, or are not HTTP: told apart, and never taken for whole (design 6 and 7)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support.daemon import provider_config
from tests.support.sockets import Wire, chunked, request
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
    read_got,
    response,
    trace_of,
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, link: Link) -> Iterator[Stage]:
    """One route."""
    folder = tmp_path_factory.mktemp("broken")
    with open_stage(
        folder, lambda url: provider_config(url, provider=link.keys), link=link
    ) as stage:
        yield stage


NOT_HTTP = {
    "nonsense": b"nonsense\r\n\r\n",
    "no version": b"200 OK\r\n\r\n",
    "status": b"HTTP/1.1 2_00 OK\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nX-A: 1\r\n more\r\n\r\n",
    "control": b"HTTP/1.1 200 OK\r\nX-A: a\0b\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "both": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "switch": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X-Long: %b\r\n" % (b"x" * 1000) * 100 + b"\r\n",
    "endless interim": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100,
}


@pytest.mark.parametrize("case", NOT_HTTP)
def test_a_response_that_is_not_http_is_a_502(stage: Stage, case: str) -> None:
    """upstream_protocol; the provider may have done the work, and is let go of."""
    ended = Notes()

    def script(wire: Wire) -> None:
        wire.read_request()
        with suppress(OSError):  # it may be cut off before it has sent everything
            wire.send(NOT_HTTP[case])
        ended.put(wire.wait_closed())

    stage.script = script
    got = stage.get(request("GET", "/p/x"))
    assert got.status == 502
    assert got.values(b"x-llmproxy-error") == [b"upstream_protocol"]
    assert got.values(b"x-should-retry") == [b"false"]
    ended.read()
    assert stage.trace(got)["end_reason"] == "upstream_protocol"
    assert_settles(stage.daemon)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-"])
@pytest.mark.parametrize("end", ["fin", "reset"])
def test_a_provider_that_ends_before_its_head_is_a_502(stage: Stage, sent: bytes, end: str) -> None:
    """upstream_broken, and not asked again: it was asked once."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(sent)
        if end == "reset":
            wire.reset()

    stage.script = script
    before = stage.provider.accepted
    got = stage.get(post("/p/x"))
    assert got.status == 502
    assert got.values(b"x-llmproxy-error") == [b"upstream_broken"]
    assert got.values(b"x-should-retry") == [b"false"]
    assert stage.provider.accepted == before + 1
    assert stage.trace(got)["end_reason"] == "upstream_broken"


@pytest.mark.parametrize(
    "rest", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n", b"1;" + b"x" * 5000, b"0\r\nbad\r\n\r\n"]
)
def test_a_body_whose_framing_breaks_is_cut(stage: Stage, rest: bytes) -> None:
    """What was content arrives, and no last chunk."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)), rest)
        wire.wait_closed()

    stage.script = script
    path = f"/p/framing/{rest[:12].hex()}"
    with stage.connect() as client:
        client.send(post(path))
        client.read_head()
        client.wait_closed()
        content = client.buffer
        assert content.startswith(chunked(event(0))[:-2]) or event(0) in content
        assert not content.endswith(LAST)
    assert trace_of(stage.daemon, path=path)["end_reason"] == "upstream_protocol"
    assert_settles(stage.daemon)


def test_bytes_behind_a_response_reach_nobody(stage: Stage) -> None:
    """A provider that sends a second response unasked is not asked again on that connection."""
    evil = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    fine = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine"

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(fine, evil)
        wire.wait_closed()

    stage.script = script
    with stage.connect() as client:
        for _ in range(5):
            client.send(request("GET", "/p/x"))
            assert read_got(client).body == b"fine"


def test_a_body_on_head_or_204_reaches_nobody(stage: Stage) -> None:
    """What follows a response that has no body is not the next response."""

    def script(wire: Wire) -> None:
        method = wire.read_request().method
        if method == b"GET":
            wire.send(response(200, body=b"fine"))
            return
        status = 204 if method == b"PUT" else 200
        wire.send(b"HTTP/1.1 %d X\r\nContent-Length: 4\r\n\r\nevil" % status)
        wire.wait_closed()

    stage.script = script
    for method in ("HEAD", "PUT"):
        with stage.connect() as client:
            client.send(request(method, "/p/x"))
            first, _ = client.read_head()
            assert first.startswith(b"HTTP/1.1 20")
            client.send(request("GET", "/p/x"))
            assert read_got(client).body == b"fine"
