"""curl as a client: it prints tokens one by one, and takes no broken response for whole.

Each kind of break is seen by curl in both versions of HTTP, plainly and by TLS, from a provider
that is reached plainly and by TLS: eight curls at once. That curl does not complain of whole
responses is the proof that these tests can fail.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import pytest

from tests.live.breaks import BARE_FIN, BREAKS, HELD, REPORTED, UNREPORTED, WHOLE, Sent
from tests.live.curls import CLIENTS, CurlClient, CurlProxy, CurlResult, CurlRun
from tests.support.live_proxy import assert_settles, post
from tests.support.scripts import DONE, LAST, SSE, Turn, event
from tests.support.sockets import WAIT, Wire, chunked, connect
from tests.support.tls import Authority

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

FINE, PARTIAL_FILE, RECEIVE_ERROR = 0, 18, 56
"""curl's own exit codes: whole; short of the framing; the connection's end is an error."""

T = TypeVar("T")


@pytest.fixture(scope="module")
def curls(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[CurlProxy]:
    """One daemon for all."""
    curls = CurlProxy(tmp_path_factory.mktemp("breaks"), authority)
    with curls.providers["plain"], curls.providers["tls"], curls.daemon:
        yield curls


def exit_code(sent: Sent, client: CurlClient) -> int:
    """Return what curl must say of a break, by TLS or not."""
    return PARTIAL_FILE if sent.tells_by_framing(client.version) else RECEIVE_ERROR


def results(runs: dict[CurlClient, CurlRun], due: bytes) -> dict[CurlClient, CurlResult]:
    """Return what each curl said, where ``due`` is the body that it should have got."""
    return {client: run.result(due) for client, run in runs.items()}


def broken(sent: Sent) -> dict[CurlClient, CurlResult]:
    """Return what each curl must say of a break."""
    count = len(sent.content)
    return {client: CurlResult(exit_code(sent, client), 200, count) for client in CLIENTS}


def assert_recorded(curls: CurlProxy, runs: dict[CurlClient, CurlRun], reason: str) -> None:
    """Check the records, that curl complained in words just where it did by code, and the rest."""
    for client, run in runs.items():
        record = run.record
        assert record["end_reason"] == reason, client
        assert record["is_complete"] is (reason == "complete"), client
        assert (record["status"], record["bytes_out"]) == (run.status, len(run.body)), client
        assert bool(run.complaint) == (run.code != FINE), (client, run.complaint)
    assert_settles(curls.daemon)


@pytest.mark.parametrize("client", CLIENTS, ids=str)
def test_tokens_are_printed_one_by_one(curls: CurlProxy, client: CurlClient) -> None:
    """`curl -N` prints each token before the provider sends the next."""
    turn, tokens = Turn(), [*map(event, range(3)), DONE]

    def script(wire: Wire) -> None:
        wire.send(SSE)
        for token in tokens:
            turn.take()
            wire.send(chunked(token))
        turn.take()
        wire.send(LAST)

    curls.scripts["tokens"] = script
    with curls.start(client, f"/{client.provider}/relayed/tokens", "-") as curl:
        try:
            assert curl.stdout is not None
            for token in tokens:
                assert not select.select([curl.stdout], [], [], 0)[0]
                turn.give()
                assert select.select([curl.stdout], [], [], WAIT)[0], "curl printed nothing"
                assert os.read(curl.stdout.fileno(), 65536) == token
            turn.give()
            printed, complaint = curl.communicate(timeout=WAIT)
            assert (curl.returncode, printed, complaint) == (FINE, "200 0", "")
        finally:
            curl.kill()


@pytest.mark.parametrize("name", BREAKS)
def test_all_that_came_is_there_and_an_error(curls: CurlProxy, name: str) -> None:
    """Exit 18 where the framing shows it, 56 where only a reset can; the record knows why."""
    sent = BREAKS[name]
    runs = curls.run_all(f"broken, {name}", sent)
    assert results(runs, sent.content) == broken(sent)
    assert_recorded(curls, runs, sent.reason)


@pytest.mark.parametrize("name", HELD)
def test_what_nobody_had_read_when_the_break_came_is_read_later(
    curls: CurlProxy, name: str
) -> None:
    """The request is over and its bytes are in the kernel's queues before curl goes on."""
    sent = HELD[name]
    runs = curls.run_all(f"held, {name}", sent, held=True)
    assert results(runs, sent.content) == broken(sent)
    assert_recorded(curls, runs, sent.reason)


@pytest.mark.parametrize("name", BARE_FIN)
def test_a_bare_fin_is_an_end_without_tls_and_a_break_with_it(curls: CurlProxy, name: str) -> None:
    """A provider that speaks TLS and sends no close_notify may have been cut off by anybody."""
    sent = BARE_FIN[name]
    runs = curls.run_all(f"bare, {name}", sent)
    count = len(sent.content)
    assert results(runs, sent.content) == {
        client: CurlResult(
            FINE if client.provider == "plain" else exit_code(sent, client), 200, count
        )
        for client in CLIENTS
    }
    for provider, reason in (("plain", "complete"), ("tls", "upstream_broken")):
        own = {client: run for client, run in runs.items() if client.provider == provider}
        assert_recorded(curls, own, reason)


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_response_is_no_error(curls: CurlProxy, name: str) -> None:
    """curl exits with 0 for each framing, in each version."""
    sent = WHOLE[name]
    runs = curls.run_all(f"whole, {name}", sent)
    assert results(runs, sent.content) == dict.fromkeys(
        CLIENTS, CurlResult(FINE, 200, len(sent.content))
    )
    assert_recorded(curls, runs, "complete")


@pytest.mark.parametrize("name", REPORTED)
def test_an_error_event_is_the_last_that_comes(curls: CurlProxy, name: str) -> None:
    """It follows all the content, and curl still reports its error."""
    sent = REPORTED[name]
    runs = curls.run_all(f"reported, {name}", sent)
    for client, run in runs.items():
        assert (run.code, run.status) == (exit_code(sent, client), 200), client
        assert run.body.startswith(sent.content), client
        added = run.body[len(sent.content) :]
        if sent.kind == "text/event-stream":
            assert added.startswith(b"data: "), client
            assert added.endswith(b"\n\n"), client
        assert json.loads(added.removeprefix(b"data: "))["error"]["code"] == sent.reason, client
    assert_recorded(curls, runs, sent.reason)


@pytest.mark.parametrize("name", UNREPORTED)
def test_no_event_is_put_where_none_can_be(curls: CurlProxy, name: str) -> None:
    """Only the content arrives, although the route asks for an event."""
    sent = UNREPORTED[name]
    runs = curls.run_all(f"unreported, {name}", sent)
    assert results(runs, sent.content) == broken(sent)
    assert_recorded(curls, runs, sent.reason)


def test_a_break_before_the_head_is_a_whole_error_body(curls: CurlProxy) -> None:
    """While nothing has left, curl can be added properly: a 502, and no complaint of the wire."""
    runs = curls.run_all("headless", Sent("", "fin", b"", b"HTTP/1.1 200 OK\r\nContent-"))
    for client, run in runs.items():
        assert (run.code, run.status) == (FINE, 502), client
        assert json.loads(run.body)["error"]["code"] == "upstream_broken", client
    assert_recorded(curls, runs, "upstream_broken")


class TlsEnd(NamedTuple):
    """What came to a client, whether TLS's close_notify did, and how TCP ended."""

    content: bytes
    close_notify: bool
    end: str


def read_tls_end(curls: CurlProxy, path: str) -> TlsEnd:
    """Ask in HTTP/1.0 over TLS, and read to the connection's end, record by record."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = curls.authority.client().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with connect(curls.daemon.tls_port) as wire:

        def after(step: Callable[[], T]) -> T:
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    if outgoing.pending:  # sending, even nothing, reports a reset before its time
                        wire.send(outgoing.read())
                    received = wire.receive()
                    if not received:
                        raise
                    incoming.write(received)

        after(tls.do_handshake)
        tls.write(post(path, version="1.0"))
        wire.send(outgoing.read())
        content = b""
        try:
            while piece := after(lambda: tls.read(65536)):
                content += piece
        except ssl.SSLWantReadError:
            return TlsEnd(content, False, "fin")
        except ConnectionError:
            return TlsEnd(content, False, "reset")
        wire.sock.shutdown(socket.SHUT_WR)
        return TlsEnd(content, True, wire.wait_closed())


@pytest.mark.parametrize("name", ["small, chunked", "big, close"])
def test_a_whole_body_without_framing_ends_with_close_notify(curls: CurlProxy, name: str) -> None:
    """close_notify, then a FIN: by TLS's own words nothing is missing."""
    curls.scripts["proper-end"] = WHOLE[name].play
    tls_end = read_tls_end(curls, "/plain/relayed/proper-end")
    assert tls_end.content.endswith(WHOLE[name].content)
    assert (tls_end.close_notify, tls_end.end) == (True, "fin")


@pytest.mark.parametrize("provider", ["plain", "tls"])
@pytest.mark.parametrize(
    "name",
    [
        "chunked, fin between chunks",
        "chunked, reset between chunks",
        "chunked, bad size",
        "close, reset",
        "no byte, chunked, fin",
        "big, chunked, fin inside a chunk",
        "big, close, reset",
    ],
)
def test_a_broken_body_without_framing_ends_without_close_notify(
    curls: CurlProxy, name: str, provider: str
) -> None:
    """All that came, no close_notify behind it, and a RST: neither layer says that it is whole."""
    sent = BREAKS[name]
    curls.scripts["no-proper-end"] = sent.play
    tls_end = read_tls_end(curls, f"/{provider}/{sent.route}/no-proper-end")
    head, _, body = tls_end.content.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == sent.content
    assert (tls_end.close_notify, tls_end.end) == (False, "reset")
