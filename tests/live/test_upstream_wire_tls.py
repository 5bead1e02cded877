"""The cause of a TLS failure is in trace, metric and log, and not in the caller's response."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from tests.support.daemon import Daemon, provider_config, provider_table, route_table
from tests.support.live_proxy import assert_settles, post, read_response, trace_of
from tests.support.scripts import Notes
from tests.support.sockets import Provider, Wire, connect
from tests.support.tls import Authority

DAY = timedelta(days=1)


class Fault(NamedTuple):
    """What is wrong with a provider.

    Attributes:
        cause: the word for it.
        status: what the caller gets.
        error: the reason word for the caller.
        context: makes the provider's side of TLS; None where it speaks none.
        plain: what it does instead.
    """

    cause: str
    status: int = 502
    error: str = "upstream_tls"
    context: Callable[[Authority, Path], ssl.SSLContext] | None = None
    plain: Callable[[Wire], Any] = Wire.wait_closed


def dated(authority: Authority, before: datetime, after: datetime) -> ssl.SSLContext:
    """Return a server's context with a certificate that is valid between two moments."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca = authority._ca
    ca.issue_cert("localhost", not_before=before, not_after=after).configure_cert(context)
    return context


def now() -> datetime:
    """Return the present."""
    return datetime.now(UTC)


def speaks_http(wire: Wire) -> None:
    """Answer the ClientHello as a plain server does."""
    wire.receive()
    wire.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    wire.wait_closed()


def hangs_up(wire: Wire) -> None:
    """Read the ClientHello and close."""
    wire.receive()


def resets(wire: Wire) -> None:
    """Read the ClientHello and reset."""
    wire.receive()
    wire.reset()


FAULTS = {
    "expired": Fault("expired", context=lambda ca, _: dated(ca, now() - 9 * DAY, now() - DAY)),
    "not yet valid": Fault(
        "not_yet_valid", context=lambda ca, _: dated(ca, now() + DAY, now() + 9 * DAY)
    ),
    "wrong name": Fault("wrong_name", context=lambda ca, _: ca.server("secret-host.test")),
    "a wider name": Fault("wrong_name", context=lambda ca, _: ca.server("*.localhost")),
    "an address": Fault("wrong_name", context=lambda ca, _: ca.server("127.0.0.1")),
    "unknown authority": Fault(
        "unknown_authority", context=lambda _, folder: Authority(folder).server()
    ),
    "plain HTTP": Fault("protocol", plain=speaks_http),
    "a hang-up": Fault("protocol", plain=hangs_up),
    "a reset": Fault("protocol", plain=resets),
    "a handshake that hangs": Fault("handshake", status=504, error="upstream_timeout"),
}


class FaultyProvider:
    """A provider's script with one fault, which notes what it could decrypt of a request."""

    def __init__(self, fault: Fault, context: ssl.SSLContext | None) -> None:
        self._fault, self._context = fault, context
        self.decrypted = Notes()

    def __call__(self, wire: Wire) -> None:
        """Serve one connection."""
        data = b""
        try:
            if self._context is None:
                self._fault.plain(wire)
                data = wire.buffer
            else:
                wire.sock = self._context.wrap_socket(wire.sock, server_side=True)
                data = wire.receive()
        except OSError:
            pass
        finally:
            self.decrypted.put(data)


class FaultyProviders(NamedTuple):
    """A daemon, and the script of one provider for each fault."""

    daemon: Daemon
    scripts: dict[str, FaultyProvider]


@pytest.fixture(scope="module")
def faulty(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[FaultyProviders]:
    """A daemon in front of every provider with a fault."""
    folder = tmp_path_factory.mktemp("causes")
    (folder / "other").mkdir()
    scripts: dict[str, FaultyProvider] = {}
    config = ""
    with ExitStack() as stack:
        for number, (name, fault) in enumerate(FAULTS.items()):
            context = None if fault.context is None else fault.context(authority, folder / "other")
            scripts[name] = FaultyProvider(fault, context)
            provider = stack.enter_context(Provider(scripts[name]))
            patience = "300ms" if fault.cause == "handshake" else "10s"
            config += provider_table(
                f"p{number}",
                f'ca = "{authority.ca_path}"',
                f'timeouts = {{ connect = "{patience}" }}',
                url=f"https://localhost:{provider.port}",
            ) + route_table(f"/p/{number}", f"p{number}")
        yield FaultyProviders(stack.enter_context(Daemon(folder, config)), scripts)


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_handshake_reports_its_cause_to_the_operator_alone(
    faulty: FaultyProviders, name: str
) -> None:
    """Trace, metric and log have the word; the caller's response has a reason word and no more."""
    daemon, fault, number = faulty.daemon, FAULTS[name], list(FAULTS).index(name)
    with connect(daemon.port) as client:
        client.send(post(f"/p/{number}", b'{"secret":"of the caller"}'))
        got = read_response(client)

    assert (got.status, got.error) == (fault.status, fault.error)
    assert got.values(b"x-should-retry") == []
    error = got.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (fault.error, "server_error", None)
    public = {"upstream_tls", "upstream_timeout"}
    words = b" ".join(sum(got.fields, ())).decode() + error["message"]
    for word in (fault.cause, "localhost", "127.0.0.1", "secret", "certificate", "OpenSSL"):
        assert word in public or word not in words

    assert b"secret" not in faulty.scripts[name].decrypted.read().replace(b"secret-host", b"")

    (identity,) = got.values(b"x-llmproxy-request-id")
    record = trace_of(daemon, id=identity.decode())
    assert (record["end_reason"], record["error"]) == (fault.error, fault.error)
    (attempt,) = record["attempts"]
    assert (attempt["provider"], attempt["outcome"]) == (f"p{number}", fault.error)
    assert attempt["cause"] == fault.cause
    line = daemon.wait_log(f"/p/{number}", id=identity.decode())
    assert line["cause"] == fault.cause
    assert line["detail"]
    sample = f'llmproxy_upstream_failures_total{{cause="{fault.cause}",provider="p{number}"}}'
    assert daemon.metrics()[sample] == 1
    assert_settles(daemon)


def test_no_fault_is_counted_under_another_s_name(faulty: FaultyProviders) -> None:
    """Each provider failed for its one cause, and for as often as it was asked."""
    found = {key for key in faulty.daemon.metrics() if "upstream_failures_total" in key}
    for number, fault in enumerate(FAULTS.values()):
        mine = {key for key in found if f'provider="p{number}"' in key}
        assert mine <= {
            f'llmproxy_upstream_failures_total{{cause="{fault.cause}",provider="p{number}"}}'
        }


def test_a_certificate_that_signed_itself_is_of_an_unknown_authority(
    tmp_path: Path, authority: Authority
) -> None:
    """An authority's own certificate, shown as a server's, is not trusted for being complete."""
    other = trustme.CA()
    pem = tmp_path / "self.pem"
    pem.write_bytes(other.private_key_pem.bytes() + other.cert_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    fault = Fault("unknown_authority")
    seen = FaultyProvider(fault, context)
    with Provider(seen) as provider:
        keys = f'ca = "{authority.ca_path}"'
        config = provider_config(f"https://localhost:{provider.port}", provider=keys)
        with Daemon(tmp_path, config) as daemon, connect(daemon.port) as client:
            client.send(post("/p/x"))
            assert read_response(client).error == "upstream_tls"
            (attempt,) = trace_of(daemon, path="/p/x")["attempts"]
    assert attempt["cause"] == "unknown_authority"
    assert seen.decrypted.read() == b""
