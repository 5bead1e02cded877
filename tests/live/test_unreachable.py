"""Providers that cannot be reached or trusted: the error says so, and nothing is sent."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, provider_config
from tests.support.live_proxy import Response, assert_settles, post, read_response, trace_of
from tests.support.sockets import Provider, Wire, connect
from tests.support.tls import Authority

SHORT = 'timeouts = { connect = "300ms" }\n'


def ask(daemon: Daemon, sent: bytes) -> Response:
    """Send one request on a connection of its own."""
    with connect(daemon.port) as client:
        client.send(sent)
        return read_response(client)


def assert_fails(folder: Path, config: str, status: int, reason: str) -> None:
    """Check response and record of a request whose connection to the provider fails."""
    with Daemon(folder, config) as daemon:
        got = ask(daemon, post("/p/x"))
        assert (got.status, got.error) == (status, reason)
        assert got.values(b"x-should-retry") == [], "nothing was sent, so it may be sent again"
        assert b"127.0.0.1" not in got.body
        assert b"localhost" not in got.body
        (name,) = got.values(b"x-llmproxy-request-id")
        record = trace_of(daemon, id=name.decode())
        ended = (record["end_reason"], record["error"], record["status"])
        assert ended == (reason, reason, status)
        assert [one["outcome"] for one in record["attempts"]] == [reason]
        (line,) = daemon.wait_ended(1)
        assert line["detail"], "the log says more than the client reads"
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
    """upstream_unreachable; the log has more than the client reads."""
    config = provider_config(f"{scheme}://127.0.0.1:{closed_port}")
    assert_fails(tmp_path, config, 502, "upstream_unreachable")


def test_a_name_that_does_not_resolve_is_a_502(tmp_path: Path) -> None:
    """The name is one that never does (RFC 6761)."""
    assert_fails(tmp_path, provider_config("https://nowhere.invalid"), 502, "upstream_unreachable")


def test_a_full_backlog_ends_at_the_connect_timeout(tmp_path: Path) -> None:
    """The client gets a 504 where the provider's kernel does not respond."""
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
        assert_fails(tmp_path, config, 504, "upstream_timeout")
        for one in waiting:
            one.close()


def test_without_a_ca_only_the_public_authorities_are_trusted(
    tmp_path: Path, authority: Authority
) -> None:
    """upstream_tls; what else a certificate may lack is in test_upstream_wire_tls."""

    def script(wire: Wire) -> None:
        with suppress(ssl.SSLError):
            wire.sock = authority.server().wrap_socket(wire.sock, server_side=True)

    with Provider(script) as provider:
        url = f"https://localhost:{provider.port}"
        assert_fails(tmp_path, provider_config(url), 502, "upstream_tls")
