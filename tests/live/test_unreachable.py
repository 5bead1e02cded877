"""Providers that cannot be reached, or not be trusted: told in words, and nothing is sent."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import Response, assert_settles, post, read_response, trace_of
from tests.support.scripts import Notes
from tests.support.sockets import Provider, Wire, connect, request
from tests.support.tls import Authority

SHORT = 'timeouts = { connect = "300ms" }\n'


def ask(daemon: Daemon, sent: bytes) -> Response:
    """Send one request on a connection of its own."""
    with connect(daemon.port) as client:
        client.send(sent)
        return read_response(client)


def assert_failed(daemon: Daemon, got: Response, status: int, reason: str) -> None:
    """Check the response and the record of a connection that did not come about."""
    assert got.status == status
    assert got.values(b"x-llmproxy-error") == [reason.encode()]
    assert got.values(b"x-should-retry") == [], "nothing was sent, so it may be sent again"
    assert b"127.0.0.1" not in got.body
    assert b"localhost" not in got.body
    (name,) = got.values(b"x-llmproxy-request-id")
    record = trace_of(daemon, id=name.decode())
    assert (record["end_reason"], record["error"], record["status"]) == (reason, reason, status)
    assert [one["outcome"] for one in record["attempts"]] == [reason]
    assert_settles(daemon)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, kept from others."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_port_where_nobody_listens_is_a_502(
    tmp_path: Path, closed_port: int, scheme: str
) -> None:
    """upstream_unreachable; the log says more than the client is told."""
    with Daemon(tmp_path, provider_config(f"{scheme}://127.0.0.1:{closed_port}")) as daemon:
        got = ask(daemon, post("/p/x"))
        assert_failed(daemon, got, 502, "upstream_unreachable")
        (line,) = daemon.wait_ended(1)
        assert line["detail"]


def test_a_name_that_does_not_resolve_is_a_502(tmp_path: Path) -> None:
    """The name is one that never does (RFC 6761)."""
    with Daemon(tmp_path, provider_config("https://nowhere.invalid")) as daemon:
        assert_failed(daemon, ask(daemon, post("/p/x")), 502, "upstream_unreachable")


def test_a_full_backlog_ends_at_the_connect_timeout(tmp_path: Path) -> None:
    """504: the kernel of the provider does not even answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        with socket.socket() as probe:
            probe.settimeout(0.3)
            if probe.connect_ex(address) == 0:
                pytest.skip("this kernel takes connections beyond the backlog")
        config = provider_config(f"http://127.0.0.1:{address[1]}", provider=SHORT)
        with Daemon(tmp_path, config) as daemon:
            assert_failed(daemon, ask(daemon, post("/p/x")), 504, "upstream_timeout")
        for one in waiting:
            one.close()


def test_a_handshake_that_hangs_ends_at_the_connect_timeout(
    tmp_path: Path, authority: Authority
) -> None:
    """The deadline covers TLS, and the provider sees the end of its connection."""
    seen = Notes()

    def script(wire: Wire) -> None:
        wire.receive()
        seen.put(wire.wait_closed())

    with Provider(script) as provider:
        url = f"https://localhost:{provider.port}"
        config = provider_config(url, provider=SHORT + f'ca = "{authority.ca_path}"\n')
        with Daemon(tmp_path, config) as daemon:
            assert_failed(daemon, ask(daemon, post("/p/x")), 504, "upstream_timeout")
            seen.read()


def test_a_provider_that_is_trusted_is_asked(tmp_path: Path, authority: Authority) -> None:
    """The counterpart of what follows: the right name, in time, by a trusted authority."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    with Provider(script, tls=authority.server()) as provider:
        keys = f'ca = "{authority.ca_path}"\n'
        with Daemon(tmp_path, provider_config(provider.url, provider=keys)) as daemon:
            assert ask(daemon, request("GET", "/p/x")).body == b"ok"


@pytest.mark.parametrize("fault", ["untrusted", "other authority", "wrong name", "expired"])
def test_a_provider_that_is_not_trusted_is_told_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, authority: Authority, fault: str
) -> None:
    """upstream_tls, and no byte of the request leaves."""
    past = datetime.now(UTC) - timedelta(days=1)
    server = {
        "untrusted": authority.server,
        "other authority": authority.server,
        "wrong name": lambda: authority.server("other.test"),
        "expired": lambda: authority.server(not_after=past),
    }[fault]()
    trusted = authority.ca_path
    if fault == "other authority":
        trusted = Authority(tmp_path_factory.mktemp("other")).ca_path
    keys = "" if fault == "untrusted" else f'ca = "{trusted}"\n'
    seen = Notes()

    def script(wire: Wire) -> None:
        received = b""
        try:
            secure = Wire(server.wrap_socket(wire.sock, server_side=True))
            wire.sock = secure.sock
            received = secure.receive()
        except (ssl.SSLError, OSError):
            pass
        finally:
            seen.put(received)

    with Provider(script) as provider:
        url = f"https://localhost:{provider.port}"
        with Daemon(tmp_path, provider_config(url, provider=keys)) as daemon:
            got = ask(daemon, post("/p/x"))
            assert_failed(daemon, got, 502, "upstream_tls")
            assert seen.read() == b""


def test_a_provider_that_speaks_no_tls_is_told_nothing(tmp_path: Path) -> None:
    """A plain server behind an https URL is no trusted connection."""

    def script(wire: Wire) -> None:
        wire.receive()
        wire.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        wire.wait_closed()

    with Provider(script) as provider:
        url = f"https://localhost:{provider.port}"
        with Daemon(tmp_path, provider_config(url)) as daemon:
            assert_failed(daemon, ask(daemon, post("/p/x")), 502, "upstream_tls")


def test_a_handshake_that_is_cut_off_is_told(tmp_path: Path) -> None:
    """A provider that closes in the middle of the handshake was told nothing either."""

    def script(wire: Wire) -> None:
        wire.receive()

    with Provider(script) as provider:
        url = f"https://localhost:{provider.port}"
        with Daemon(tmp_path, provider_config(url)) as daemon:
            assert_failed(daemon, ask(daemon, post("/p/x")), 502, "upstream_tls")
