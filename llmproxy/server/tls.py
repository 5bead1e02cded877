"""TLS towards clients: what all of it has in common, and the certificate that a listener shows.

TLS 1.2 and newer is spoken, and HTTP/1 and nothing else in ALPN (RFC 7301): a client that offers
only other protocols is refused within the handshake.  A connection keeps the certificate that it
began with (ADR-0008).  What is served is not known here.  The certificates of intercepted hosts are
those of ``leaves.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from zope.interface import implementer

from llmproxy.config import Keypair

_CIPHERS = b"ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL"
"""For TLS 1.2: forward secret and authenticated, as RFC 9325, section 4.2, recommends."""


@implementer(IOpenSSLServerConnectionCreator)
class ServerTls:
    """Makes our side of each connection on which a client begins TLS.

    Args:
        context: what is shown, and the rules.
        not_after: when the certificate expires, in seconds since the epoch.
    """

    def __init__(self, context: SSL.Context, not_after: float) -> None:
        self._context = context
        self.not_after = not_after

    def serverConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """Return the OpenSSL side of one connection, for Twisted's layer."""
        return SSL.Connection(self._context, None)

    def on_socket(self, transport: Any) -> SSL.Connection:
        """Return the OpenSSL side of a transport of ``net/tls.py``."""
        return SSL.Connection(self._context, transport.socket)


class ListenerTls(ServerTls):
    """Makes the TLS side of each connection that a listener accepts.

    Args:
        keypair: what is shown to clients; the configuration has checked it.

    Raises:
        ValueError: OpenSSL would not use it.
    """

    def __init__(self, keypair: Keypair) -> None:
        certificate, *chain = x509.load_pem_x509_certificates(keypair.certificate)
        key = load_pem_private_key(keypair.key.reveal().encode("ascii"), None)
        try:
            context = server_context(certificate, chain, key)
        except SSL.Error as error:
            raise ValueError(f"proxy.certificate: OpenSSL refuses it: {error}") from error
        context.set_session_id(b"llmproxy")
        super().__init__(context, keypair.not_after)

    def show(self, other: ListenerTls) -> None:
        """Show what ``other`` shows, to clients that connect from now on."""
        self._context, self.not_after = other._context, other.not_after


def server_context(
    certificate: x509.Certificate, chain: Iterable[x509.Certificate], key: Any
) -> SSL.Context:
    """Return a context that shows a certificate, and follows the rules above.

    Args:
        certificate: what is shown.
        chain: what is sent along.
        key: the certificate's private key.

    Raises:
        SSL.Error: OpenSSL would not use them.
    """
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # a quiet connection holds no buffers
    context.set_cipher_list(_CIPHERS)
    context.use_certificate(certificate)
    for one in chain:
        context.add_extra_chain_cert(one)
    context.use_privatekey(key)  # any kind that TLS knows; others are refused here
    context.check_privatekey()
    context.set_alpn_select_callback(_select)
    return context


def _select(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    """Choose HTTP/1; the error ends the handshake with ``no_application_protocol``."""
    for name in (b"http/1.1", b"http/1.0"):  # the latter is all that `curl --http1.0` offers
        if name in offered:
            return name
    raise SSL.Error([("ALPN", "", "no protocol in common")])
