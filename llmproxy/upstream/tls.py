"""TLS towards a provider: trusted authorities, the name to verify, and why a handshake failed.

service-identity verifies the provider's name within the handshake, before a byte of a request is
sent.  A TLS session is kept for the next connection to the same provider; its certificate was
verified when the session began (ADR-0006).  TLS 1.2 and newer, ALPN ``http/1.1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from OpenSSL import SSL, crypto
from service_identity import CertificateError, VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from twisted.internet.ssl import (
    Certificate,
    CertificateOptions,
    platformTrust,
    trustRootFromCertificates,
)
from zope.interface import implementer

from llmproxy.config import Provider
from llmproxy.net.transport import tls_of

_MARK = b"-----BEGIN CERTIFICATE-----"

# openssl/x509_vfy.h: what the verification says of a certificate or its chain.
_CAUSES = {
    2: "unknown_authority",
    9: "not_yet_valid",
    10: "expired",
    18: "unknown_authority",
    19: "unknown_authority",
    20: "unknown_authority",
    21: "unknown_authority",
    23: "revoked",
}


class Verdict:
    """What a handshake found out about the peer.

    Attributes:
        cause: why it was refused, in one word, or None: ``expired``, ``not_yet_valid``,
            ``revoked``, ``unknown_authority``, ``untrusted``, ``wrong_name``.
    """

    __slots__ = ("cause",)

    def __init__(self) -> None:
        self.cause: str | None = None


@implementer(IOpenSSLClientConnectionCreator)
class ProviderTls:
    """Makes TLS connections to one provider; made once, because loading authorities takes long.

    Args:
        provider: its host and, where it has one, its own authority.

    Raises:
        OSError: the authority's file cannot be read.
    """

    def __init__(self, provider: Provider) -> None:
        self._host = provider.url.host
        self._is_address = isIPAddress(self._host) or isIPv6Address(self._host)
        options = CertificateOptions(
            trustRoot=platformTrust() if provider.ca is None else _authority(provider.ca),
        )
        self._context = options.getContext()  # TLS 1.2 is the least that Twisted allows
        self._context.set_alpn_protos([b"http/1.1"])
        self._session: SSL.Session | None = None

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        """Return the OpenSSL side of one connection; its protocol gets a :class:`Verdict`."""
        connection = SSL.Connection(self._context, None)
        connection.set_app_data(tlsProtocol)
        tlsProtocol.wrappedProtocol.verdict = self._prepare(connection)
        return connection

    def on_socket(self, transport: Any) -> SSL.Connection:
        """Do the same for a transport of ``net/tls.py``, which gets the :class:`Verdict`."""
        connection = SSL.Connection(self._context, transport.socket)
        transport.verdict = self._prepare(connection)
        return connection

    def _prepare(self, connection: SSL.Connection) -> Verdict:
        verdict = Verdict()
        if not self._is_address:
            connection.set_tlsext_host_name(self._host.encode("ascii"))
        connection.set_verify(
            SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, self._verifier(verdict)
        )
        if self._session is not None:
            connection.set_session(self._session)
        return verdict

    def remember(self, transport: Any) -> None:
        """Keep the session of a verified connection for the next one."""
        session = tls_of(transport).get_session()
        if session is not None:
            self._session = session

    def _verifier(
        self, verdict: Verdict
    ) -> Callable[[SSL.Connection, crypto.X509, int, int, int], bool]:
        def verify(_: SSL.Connection, cert: crypto.X509, error: int, depth: int, ok: int) -> bool:
            if not ok:
                verdict.cause = _CAUSES.get(error, "untrusted")
                return False
            if depth == 0 and not self._is_named_by(cert):
                verdict.cause = "wrong_name"
                return False
            return True

        return verify

    def _is_named_by(self, cert: crypto.X509) -> bool:
        verify = verify_certificate_ip_address if self._is_address else verify_certificate_hostname
        try:
            verify(cert.to_cryptography(), self._host)
        except (VerificationError, CertificateError):
            return False
        return True


def _authority(path: str) -> Any:
    with open(path, "rb") as file:
        pem = file.read()
    parts = pem.split(_MARK)[1:]
    return trustRootFromCertificates([Certificate.loadPEM(_MARK + part) for part in parts])


def client_options(provider: Provider) -> ProviderTls | None:
    """Return what makes TLS connections to ``provider``, or None where its URL is plain HTTP."""
    return ProviderTls(provider) if provider.url.scheme == "https" else None
