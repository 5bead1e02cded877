"""TLS towards clients: SDKs and curl over it, and handshakes that do not end."""

from __future__ import annotations

import os
import select
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import httpx2
import openai
import pytest

from tests.support.sockets import WAIT, Wire, chunked, connect, request
from tests.support.stage import SSE, Turn, assert_settles, event, post, read_got
from tests.support.tls_stand import EVENTS, KEY, PROXY, Stand, response, standing

DEADLINE = 1.0
"""Seconds that a handshake may take on the impatient daemon."""


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A stand whose certificate stays as it is."""
    with standing(tmp_path_factory.mktemp("tls")) as stand:
        yield stand


@pytest.fixture(autouse=True)
def _answering(stand: Stand) -> None:
    """Let each test begin with a provider that answers shortly."""
    stand.script = response


# --- clients --------------------------------------------------------------------------------------


def test_an_sdk_streams_over_tls(stand: Stand) -> None:
    """openai's hands out each event before the next one was sent."""
    turn = stand.stream()
    url = f"https://localhost:{stand.daemon.tls_port}/p/v1"
    numbers = []
    with (
        httpx2.Client(verify=stand.vault.client(), trust_env=False, timeout=WAIT) as http,
        openai.OpenAI(base_url=url, api_key=KEY, http_client=http, max_retries=0) as client,
    ):
        turn.give()
        for part in client.chat.completions.create(model="m", messages=[], stream=True):
            numbers.append(getattr(part, "n"))  # noqa: B009 - the SDK's type has none
            turn.give()
    assert numbers == [0, 1, 2]
    assert_settles(stand.daemon)


def test_httpx_speaks_http_1_1_over_tls(stand: Stand) -> None:
    """Bytes come as they were sent, on a connection that stays."""
    url = f"https://localhost:{stand.daemon.tls_port}/p/x"
    with httpx.Client(verify=stand.vault.client(), trust_env=False, timeout=WAIT) as client:
        for _ in range(2):
            turn, pieces = stand.stream(), []
            turn.give()
            with client.stream("POST", url, content=b"{}") as got:
                assert got.http_version == "HTTP/1.1"
                for piece in got.iter_raw():
                    pieces.append(piece)
                    turn.give()
            assert pieces == EVENTS
    assert_settles(stand.daemon)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("version", ["--http1.0", "--http1.1", "--http2"])
@pytest.mark.parametrize("tls", ["1.2", "1.3"])
def test_curl_prints_tokens_one_by_one(stand: Stand, version: str, tls: str) -> None:
    """Whichever HTTP it would rather speak, in TLS 1.2 and 1.3; and it exits with 0."""
    turn = stand.stream()
    command = ["curl", "-sSN", "--max-time", str(int(WAIT)), version, "--noproxy", "*"]
    command += ["--cacert", str(stand.vault.ca_path), f"--tlsv{tls}", "--tls-max", tls]
    command += ["-d", "{}", f"https://localhost:{stand.daemon.tls_port}/p/x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for expected in EVENTS:
                assert not select.select([process.stdout], [], [], 0)[0]
                turn.give()
                assert select.select([process.stdout], [], [], WAIT)[0], "curl printed nothing"
                assert os.read(process.stdout.fileno(), 65536) == expected
            _, told = process.communicate(timeout=WAIT)
            assert (process.returncode, told) == (0, b"")
        finally:
            process.kill()
    assert_settles(stand.daemon)


def test_plain_and_tls_stand_beside_each_other(stand: Stand) -> None:
    """The plain listener serves as before, and each answers in its own tongue only."""
    with connect(stand.daemon.port) as wire:
        wire.send(request("GET", "/p/x"))
        assert read_got(wire).body == b"ok"
    assert stand.seen() == stand.shown.der
    with connect(stand.daemon.tls_port) as wire:
        wire.send(request("GET", "/p/x"))
        wire.wait_closed()
        assert b"HTTP/" not in wire.buffer
    assert_settles(stand.daemon)


@pytest.mark.parametrize("farewell", [False, True])
def test_a_client_that_leaves_over_tls_is_noticed(stand: Stand, farewell: bool) -> None:
    """With TLS's farewell or without, the provider's work ends while it is silent."""
    ended = Turn()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(SSE, chunked(event(0)))
        wire.wait_closed()
        ended.give()

    stand.script = script
    with stand.connect() as wire:
        wire.send(post("/p/x"))
        wire.read_head()
        assert wire.read_chunk() == event(0)
        if farewell:
            assert isinstance(wire.sock, ssl.SSLSocket)
            wire.sock.settimeout(0.2)
            wire.farewell()
            ended.take()
    if not farewell:
        ended.take()
    assert_settles(stand.daemon)


def test_a_listener_with_tls_alone(tmp_path: Path) -> None:
    """`listen = []` leaves nothing that is plain."""
    with standing(tmp_path, proxy=PROXY + "listen = []\n") as stand:
        assert stand.seen() == stand.shown.der
        assert stand.daemon.port == 0
        sites = [line["tls"] for line in stand.daemon.log if line.get("site") == "proxy"]
        assert sites == [True]


# --- handshakes that do not end -------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """A stand whose requests, and so handshakes, have a second."""
    more = f'[timeouts]\nrequest_head = "{DEADLINE:.0f}s"\nclient_idle = "60s"\n'
    with standing(tmp_path_factory.mktemp("impatient"), more=more) as stand:
        yield stand


def hello() -> bytes:
    """Return what a client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    shaking = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        shaking.do_handshake()
    return outgoing.read()


def test_a_handshake_that_does_not_begin_is_ended(impatient: Stand) -> None:
    """At the deadline for a request's head, without a word, and without a line at `error`."""
    with connect(impatient.daemon.tls_port) as wire:
        began = time.monotonic()
        wire.wait_closed()
        assert wire.buffer == b""
        assert DEADLINE * 0.7 < time.monotonic() - began < DEADLINE + 8
    assert_settles(impatient.daemon)


def test_a_handshake_that_trickles_is_ended(impatient: Stand) -> None:
    """The deadline is absolute: a byte each tenth of a second does not push it back."""
    sent = 0
    with connect(impatient.daemon.tls_port) as wire:
        began = time.monotonic()
        wire.sock.settimeout(0.1)
        for byte in hello():
            try:
                wire.send(bytes([byte]))
                sent += 1
                if not wire.receive():
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        took = time.monotonic() - began
    assert DEADLINE * 0.7 < took < DEADLINE + 8
    assert 3 <= sent < 120
    assert_settles(impatient.daemon)


def test_a_handshake_that_stops_half_way_is_ended(impatient: Stand) -> None:
    """A client that says its hello, and nothing to the response."""
    with connect(impatient.daemon.tls_port) as wire:
        began = time.monotonic()
        wire.send(hello())
        wire.wait_closed()
        assert wire.buffer.startswith(b"\x16\x03")
        assert DEADLINE * 0.7 < time.monotonic() - began < DEADLINE + 8
    assert_settles(impatient.daemon)


def test_after_the_handshake_the_deadline_is_another(impatient: Stand) -> None:
    """A client that shook hands may wait with its request."""
    context = impatient.vault.client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # no tickets come behind its handshake
    with connect(impatient.daemon.tls_port, tls=context) as wire:
        assert not select.select([wire.sock], [], [], DEADLINE * 2.5)[0]
        wire.send(request("GET", "/p/x"))
        assert read_got(wire).body == b"ok"
