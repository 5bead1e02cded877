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

import httpx2
import openai
import pytest

from tests.support.live_proxy import assert_settles, read_response
from tests.support.scripts import SSE, event
from tests.support.sockets import WAIT, chunked, connect, request
from tests.support.tls_proxy import EVENTS, KEY, PROXY, TlsProxy, open_tls_proxy, short_reply

DEADLINE = 1.0
"""Seconds that a handshake may take on the impatient daemon."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsProxy]:
    """A stand whose certificate stays as it is."""
    with open_tls_proxy(tmp_path_factory.mktemp("tls")) as live:
        yield live


@pytest.fixture(autouse=True)
def _replying(live: TlsProxy) -> None:
    """Let each test begin with a provider that replies shortly."""
    live.script = short_reply


# --- clients --------------------------------------------------------------------------------------


def test_an_sdk_streams_over_tls(live: TlsProxy) -> None:
    """The SDK of OpenAI hands out each event before the next one is sent."""
    turn = live.stream(*EVENTS)
    url = f"https://localhost:{live.daemon.tls_port}/p/v1"
    numbers = []
    with (
        httpx2.Client(verify=live.vault.client(), trust_env=False, timeout=WAIT) as http,
        openai.OpenAI(base_url=url, api_key=KEY, http_client=http, max_retries=0) as client,
    ):
        turn.give()
        for part in client.chat.completions.create(model="m", messages=[], stream=True):
            numbers.append(getattr(part, "n"))  # noqa: B009 - the SDK's type has none
            turn.give()
        turn.give()
    assert numbers == [0, 1, 2]
    assert_settles(live.daemon)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("tls", ["1.2", "1.3"])
def test_curl_prints_tokens_one_by_one(live: TlsProxy, version: str, tls: str) -> None:
    """It does so in TLS 1.2 and 1.3, also if it prefers HTTP/2, and exits with 0."""
    turn = live.stream(*EVENTS)
    command = ["curl", "-sSN", "--max-time", str(int(WAIT)), version, "--noproxy", "*"]
    command += ["--cacert", str(live.vault.ca_path), f"--tlsv{tls}", "--tls-max", tls]
    command += ["-d", "{}", f"https://localhost:{live.daemon.tls_port}/p/x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            for expected in EVENTS:
                assert not select.select([process.stdout], [], [], 0)[0]
                turn.give()
                assert select.select([process.stdout], [], [], WAIT)[0], "curl printed nothing"
                assert os.read(process.stdout.fileno(), 65536) == expected
            turn.give()
            _, complaint = process.communicate(timeout=WAIT)
            assert (process.returncode, complaint) == (0, b"")
        finally:
            process.kill()
    assert_settles(live.daemon)


def test_plain_and_tls_stand_beside_each_other(live: TlsProxy) -> None:
    """The plain listener serves as before, and each speaks its own protocol only."""
    with connect(live.daemon.port) as wire:
        wire.send(request("GET", "/p/x"))
        assert read_response(wire).body == b"ok"
    assert live.seen() == live.shown.der
    with connect(live.daemon.tls_port) as wire:
        wire.send(request("GET", "/p/x"))
        wire.wait_closed()
        assert b"HTTP/" not in wire.buffer
    assert_settles(live.daemon)


@pytest.mark.parametrize("close_notify", [False, True])
def test_a_client_that_leaves_over_tls_is_noticed(live: TlsProxy, close_notify: bool) -> None:
    """The provider's work ends while it is silent, with TLS's close_notify or without."""
    ended = live.hold(SSE, chunked(event(0)))
    with live.begin("/p/x") as wire:
        assert wire.read_chunk() == event(0)
        if close_notify:
            assert isinstance(wire.sock, ssl.SSLSocket)
            wire.sock.settimeout(0.2)
            wire.close_notify()
            ended.read()
    if not close_notify:
        ended.read()
    assert_settles(live.daemon)


def test_a_listener_with_tls_alone(tmp_path: Path) -> None:
    """`listen = []` leaves nothing that is plain."""
    with open_tls_proxy(tmp_path, proxy=PROXY + "listen = []\n") as live:
        assert live.seen() == live.shown.der
        assert live.daemon.port == 0
        sites = [line["tls"] for line in live.daemon.log if line.get("site") == "proxy"]
        assert sites == [True]


# --- handshakes that do not end -------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsProxy]:
    """A stand whose requests, and so handshakes, have a second."""
    more = f'[timeouts]\nrequest_head = "{DEADLINE:.0f}s"\nclient_idle = "60s"\n'
    with open_tls_proxy(tmp_path_factory.mktemp("impatient"), more=more) as live:
        yield live


def hello() -> bytes:
    """Return what a client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    shaking = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        shaking.do_handshake()
    return outgoing.read()


def test_a_handshake_that_trickles_is_ended(impatient: TlsProxy) -> None:
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


def test_after_the_handshake_the_deadline_is_another(impatient: TlsProxy) -> None:
    """A client that shook hands may wait with its request."""
    context = impatient.vault.client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # no tickets come behind its handshake
    with connect(impatient.daemon.tls_port, tls=context) as wire:
        assert not select.select([wire.sock], [], [], DEADLINE * 2.5)[0]
        wire.send(request("GET", "/p/x"))
        assert read_response(wire).body == b"ok"
