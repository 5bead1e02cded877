"""TLS towards clients: the handshake, the certificate, and how a certificate is replaced."""

from __future__ import annotations

import re
import socket
import ssl
import warnings
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from OpenSSL import SSL
from pytest_twisted import ensureDeferred
from trustme import KeyType

from llmproxy.config import Keypair, Secret, Timeouts
from llmproxy.server.tls import ListenerTls
from tests.support.keypairs import Issued, Vault, shown_to
from tests.support.served import GET, Served, ask
from tests.support.sockets import WAIT, Wire, connect


def served_by(
    vault: Vault, issued: Issued | None = None, timeouts: Timeouts | None = None
) -> Served:
    """Return a site behind a TLS listener with a certificate of the vault's."""
    return Served(tls=ListenerTls((issued or vault.issue()).keypair()), timeouts=timeouts)


def refuse(port: int, context: ssl.SSLContext) -> str:
    """Connect, see the handshake fail, and return the error of the client."""
    with connect(port) as wire, pytest.raises(ssl.SSLError) as caught:
        context.wrap_socket(wire.sock, server_hostname="localhost")
    return str(caught.value).lower().replace("_", " ")


# --- the handshake --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["http/1.1"], "http/1.1"),
        (["h2", "http/1.1"], "http/1.1"),
        (["http/1.0", "spdy/1", "http/1.1", "h2"], "http/1.1"),
        (["http/1.0"], "http/1.0"),
        ([], None),
    ],
    ids=["http/1.1", "both", "last but one", "http/1.0", "nothing"],
)
@ensureDeferred
async def test_http_1_1_is_chosen(vault: Vault, offered: list[str], chosen: str | None) -> None:
    """It may stand anywhere in the list; clients with HTTP/1.0 or without ALPN are served, too."""

    def client() -> tuple[str | None, bytes]:
        with connect(served.port, tls=vault.client(protocols=offered)) as wire:
            assert isinstance(wire.sock, ssl.SSLSocket)
            return wire.sock.selected_alpn_protocol(), ask(wire)

    async with served_by(vault) as served:
        assert await served.run(client) == (chosen, b"127.0.0.1")


@pytest.mark.parametrize("offered", [["h2"], ["h2", "h3"], ["http/0.9"], ["HTTP/1.1"]])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@ensureDeferred
async def test_other_protocols_are_refused_in_the_handshake(
    vault: Vault, version: ssl.TLSVersion, offered: list[str]
) -> None:
    """The alert says so (RFC 7301, section 3.2), and no failure is logged."""
    context = vault.client(protocols=offered)
    context.maximum_version = version
    async with served_by(vault) as served:
        reason = await served.run(refuse, served.port, context)
        assert "alert no application protocol" in reason
        await served.until_connected(0)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("key_type", [KeyType.RSA, KeyType.ECDSA])
@ensureDeferred
async def test_both_versions_work_with_both_kinds_of_key(
    vault: Vault, version: ssl.TLSVersion, key_type: KeyType
) -> None:
    """TLS 1.2 and 1.3 work with RSA and elliptic keys; the ciphers are forward secret and AEAD."""
    issued = vault.issue(key_type=key_type)
    context = vault.client()
    context.minimum_version = context.maximum_version = version

    def client() -> tuple[bytes | None, tuple[str, str, int] | None, bytes]:
        with connect(served.port, tls=context) as wire:
            assert isinstance(wire.sock, ssl.SSLSocket)
            return shown_to(wire), wire.sock.cipher(), ask(wire)

    async with served_by(vault, issued) as served:
        shown, cipher, response = await served.run(client)
    assert (shown, response) == (issued.der, b"127.0.0.1")
    assert cipher is not None
    assert re.search("GCM|CHACHA20", cipher[0])
    assert cipher[0].startswith(("ECDHE-", "TLS_"))


def old_client(vault: Vault, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a client with no version but this one, and with any cipher."""
    context = vault.client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of versions before 1.2
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = version
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@ensureDeferred
async def test_older_versions_are_refused(vault: Vault, version: ssl.TLSVersion) -> None:
    """The alert is the listener's own (RFC 8996)."""
    context = old_client(vault, version)
    async with served_by(vault) as served:
        reason = await served.run(refuse, served.port, context)
        assert "alert protocol version" in reason
        await served.until_connected(0)


@pytest.mark.parametrize(
    "cipher",
    ["AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA", "ECDHE-RSA-AES256-SHA384", "AECDH-AES128-SHA"],
    ids=["no forward secrecy", "CBC", "CBC and SHA-384", "nobody authenticated"],
)
@ensureDeferred
async def test_weak_ciphers_are_refused(vault: Vault, cipher: str) -> None:
    """A TLS 1.2 client with nothing better shares no cipher with us (RFC 9325, section 4)."""
    context = vault.client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(f"{cipher}:@SECLEVEL=0")
    async with served_by(vault, vault.issue(key_type=KeyType.RSA)) as served:
        reason = await served.run(refuse, served.port, context)
        assert "alert handshake failure" in reason


# --- renegotiation --------------------------------------------------------------------------------


@ensureDeferred
async def test_renegotiation_is_refused(vault: Vault) -> None:
    """A TLS 1.2 client cannot make us repeat the work of a handshake."""

    def client() -> tuple[bytes, list[str]]:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        with connect(served.port) as wire:
            blocking(wire.sock)
            connection = SSL.Connection(context, wire.sock)
            connection.set_connect_state()
            connection.do_handshake()
            connection.sendall(GET)
            response = b""
            while not response.endswith(b"127.0.0.1"):
                response += connection.recv(65536)
            assert connection.renegotiate()
            with pytest.raises(SSL.Error) as caught:
                connection.do_handshake()
            return response, [str(reason) for _, _, reason in caught.value.args[0]]

    async with served_by(vault) as served:
        response, reasons = await served.run(client)
    assert response.startswith(b"HTTP/1.1 200 ")
    assert reasons == ["no renegotiation"]


def blocking(sock: socket.socket) -> None:
    """Let the kernel itself bound a socket's waits: pyOpenSSL takes a timeout for non-blocking."""
    sock.settimeout(None)
    seconds = int(WAIT).to_bytes(8, "little") + bytes(8)  # struct timeval
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)


# --- the certificate ------------------------------------------------------------------------------


def chain_of(port: int) -> list[bytes]:
    """Return the certificates that a client gets, as PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding

    with connect(port) as wire:
        blocking(wire.sock)
        connection = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), wire.sock)
        connection.set_connect_state()
        connection.do_handshake()
        sent = connection.get_peer_cert_chain(as_cryptography=True) or []
        return [certificate.public_bytes(Encoding.PEM) for certificate in sent]


@ensureDeferred
async def test_the_chain_is_sent_whole(vault: Vault) -> None:
    """It is byte for byte in the file's order, so that a client needs only the root."""
    issued = vault.issue()
    async with served_by(vault, issued) as served:
        assert b"".join(await served.run(chain_of, served.port)) == issued.chain
        with await served.run(connect, served.port, tls=vault.client()) as wire:
            assert await served.run(ask, wire) == b"127.0.0.1"


@ensureDeferred
async def test_no_more_than_the_file_is_sent(vault: Vault) -> None:
    """A certificate that is missing in the file is not found elsewhere."""
    issued = vault.issue()
    alone = Keypair(
        certificate=issued.leaf, key=Secret(issued.key.decode()), not_after=issued.not_after
    )
    async with Served(tls=ListenerTls(alone)) as served:
        assert await served.run(chain_of, served.port) == [issued.leaf]
        assert "certificate verify failed" in await served.run(refuse, served.port, vault.client())


# --- how it is replaced ---------------------------------------------------------------------------


@ensureDeferred
async def test_an_open_connection_keeps_its_certificate(vault: Vault) -> None:
    """A new client gets the new certificate; an open connection goes on."""
    later = datetime.now(UTC) + timedelta(days=7)
    old, new = vault.issue(), vault.issue(key_type=KeyType.RSA, not_after=later)
    tls = ListenerTls(old.keypair())
    assert tls.not_after == old.not_after
    async with Served(tls=tls) as served:
        with await served.run(connect, served.port, tls=vault.client()) as before:
            assert await served.run(ask, before) == b"127.0.0.1"
            tls.show(ListenerTls(new.keypair()))
            assert tls.not_after == new.not_after != old.not_after
            with await served.run(connect, served.port, tls=vault.client()) as after:
                assert await served.run(ask, after) == b"127.0.0.1"
                assert (shown_to(before), shown_to(after)) == (old.der, new.der)
            assert await served.run(ask, before) == b"127.0.0.1"


@ensureDeferred
async def test_a_handshake_ends_with_the_certificate_that_it_began_with(vault: Vault) -> None:
    """A certificate may be replaced between a client's first bytes and its last."""
    old, new = vault.issue(), vault.issue()
    tls = ListenerTls(old.keypair())
    async with Served(tls=tls) as served:
        with connect(served.port) as wire:
            await served.until_connected(1)
            tls.show(ListenerTls(new.keypair()))

            def finish() -> bytes | None:
                context = vault.client()
                sock = context.wrap_socket(wire.sock, server_hostname="localhost")
                with Wire(sock) as secure:
                    assert ask(secure) == b"127.0.0.1"
                    return shown_to(secure)

            assert await served.run(finish) == old.der


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@ensureDeferred
async def test_a_session_is_resumed_until_the_certificate_changes(
    vault: Vault, version: ssl.TLSVersion
) -> None:
    """A client that returns saves the handshake while the certificate is the same."""
    old, new = vault.issue(), vault.issue()
    tls = ListenerTls(old.keypair())
    context = vault.client()
    context.maximum_version = version

    def visit(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, Any]:
        sock = socket.create_connection(("127.0.0.1", served.port), WAIT)
        secure = context.wrap_socket(sock, server_hostname="localhost", session=session)
        with Wire(secure) as wire:
            assert ask(wire) == b"127.0.0.1"
            secure.settimeout(WAIT)
            return secure.session, secure.session_reused

    async with Served(tls=tls) as served:
        session, reused = await served.run(visit, None)
        assert (session is not None, reused) == (True, False)
        assert (await served.run(visit, session))[1] is True
        tls.show(ListenerTls(new.keypair()))
        assert (await served.run(visit, session))[1] is False


def test_a_refusal_of_openssl_is_reported(vault: Vault) -> None:
    """A key of another certificate is an error, and nothing is made."""
    old, new = vault.issue(), vault.issue()
    mixed = Keypair(certificate=new.chain, key=Secret(old.key.decode()), not_after=0.0)
    with pytest.raises(ValueError, match=r"^proxy\.certificate: OpenSSL refuses it"):
        ListenerTls(mixed)


# --- how long a handshake may take ----------------------------------------------------------------


@pytest.mark.parametrize(
    "hello",
    [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"],
    ids=["nothing", "byte by byte"],
)
@ensureDeferred
async def test_a_handshake_has_the_deadline_of_a_head(vault: Vault, hello: bytes) -> None:
    """Bytes do not extend ``request_head``, and ``client_idle`` is longer; nothing is sent."""
    async with served_by(vault, timeouts=Timeouts(request_head=10, client_idle=1000)) as served:
        with connect(served.port) as wire:
            await served.until_connected(1)
            for at in range(9):
                wire.send(hello[at : at + 1])
                await served.pass_time(1)
            assert len(served.site.connections) == 1
            await served.pass_time(4)
            await served.until_connected(0)
            assert await served.run(wire.wait_closed) == "reset"
            assert wire.buffer == b""


@ensureDeferred
async def test_after_the_handshake_a_client_may_wait(vault: Vault) -> None:
    """The request has ``client_idle``, counted from the handshake."""
    async with served_by(vault, timeouts=Timeouts(request_head=10, client_idle=100)) as served:
        with await served.run(connect, served.port, tls=vault.client()) as wire:
            await served.pass_time(95)
            assert await served.run(ask, wire) == b"127.0.0.1"


@ensureDeferred
async def test_a_handshake_may_have_no_deadline(vault: Vault) -> None:
    """``request_head = "off"`` holds for the handshake, too."""
    async with served_by(vault, timeouts=Timeouts(request_head=None, client_idle=5)) as served:
        with connect(served.port):
            await served.until_connected(1)
            await served.pass_time(60)
            assert len(served.site.connections) == 1


@pytest.mark.parametrize(
    "sent", [GET, b"\x16\x03\x01\x00\x05hello", b"\0" * 600], ids=["HTTP", "a broken hello", "NUL"]
)
@ensureDeferred
async def test_bytes_that_are_not_tls_are_no_failure(vault: Vault, sent: bytes) -> None:
    """A client that does not speak TLS is closed, and no failure is logged."""

    def client() -> str:
        with connect(served.port) as wire:
            wire.send(sent)
            ended = wire.wait_closed()
            assert b"HTTP/" not in wire.buffer
            return ended

    async with served_by(vault) as served:
        assert await served.run(client) in ("fin", "reset")
        await served.until_connected(0)
