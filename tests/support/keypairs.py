"""What a TLS listener of the proxy's own is given: certificates, keys, and a place for both."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from trustme import KeyType

from llmproxy.config import Keypair, Secret
from tests.support.sockets import Wire

LISTEN_TLS = (
    'listen_tls = ["tcp:0:interface=127.0.0.1"]\ncertificate = "certificate"\nkey = "key"\n'
)
"""What ``[proxy]`` says of it; the listener's endpoint is one of the kernel's choice."""


class Issued:
    """One certificate with its chain and its key, all as PEM.

    Attributes:
        leaf: the certificate itself.
        chain: it, then the certificate of the authority that issued it.
        key: its private key.
        der: the certificate as a client sees it.
    """

    def __init__(self, cert: trustme.LeafCert) -> None:
        self.leaf = cert.cert_chain_pems[0].bytes()
        self.chain = b"".join(blob.bytes() for blob in cert.cert_chain_pems)
        self.key = cert.private_key_pem.bytes()
        self.der = x509.load_pem_x509_certificate(self.leaf).public_bytes(Encoding.DER)

    @property
    def not_after(self) -> float:
        """When it expires, in seconds since the epoch."""
        return x509.load_pem_x509_certificate(self.leaf).not_valid_after_utc.timestamp()

    def keypair(self) -> Keypair:
        """Return it as the configuration would have read it."""
        return Keypair(
            certificate=self.chain, key=Secret(self.key.decode()), not_after=self.not_after
        )

    def key_as(self, form: PrivateFormat, passphrase: bytes = b"") -> bytes:
        """Return the key in another PEM format, encrypted where there is a passphrase."""
        encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        return load_pem_private_key(self.key, None).private_bytes(Encoding.PEM, form, encryption)


class Vault:
    """A credentials directory for a TLS listener, and the authority that its clients trust.

    Certificates are issued by an authority below the trusted one: a client that is not sent the
    whole chain refuses them.

    Args:
        folder: where the directory is made, and the trusted authority's certificate written.

    Attributes:
        directory: closed to others; the files ``certificate`` and ``key`` are put there.
        ca_path: what a client must trust.
    """

    def __init__(self, folder: Path) -> None:
        self._root = trustme.CA()
        self._issuer = self._root.create_child_ca()
        self.ca_path = folder / "listener-ca.pem"
        self._root.cert_pem.write_to_path(str(self.ca_path))
        self.directory = folder / "credentials"
        self.directory.mkdir(mode=0o700, exist_ok=True)

    @property
    def config(self) -> str:
        """The section of the configuration that leads to the directory."""
        return f'[credentials]\ndirectory = "{self.directory}"\n'

    def issue(
        self, *, key_type: KeyType = KeyType.ECDSA, not_after: datetime | None = None
    ) -> Issued:
        """Issue a certificate for ``localhost``."""
        return Issued(
            self._issuer.issue_cert(
                "localhost", "127.0.0.1", key_type=key_type, not_after=not_after
            )
        )

    def put(self, issued: Issued | None = None) -> Issued:
        """Write a certificate and its key, a new one by default, over those that were there."""
        issued = issued or self.issue()
        self.write("certificate", issued.chain)
        self.write("key", issued.key)
        return issued

    def write(self, name: str, content: bytes) -> None:
        """Write a credential file."""
        (self.directory / name).write_bytes(content)

    def client(self, *, protocols: Iterable[str] = ()) -> ssl.SSLContext:
        """Return a client's context that trusts the authority, and offers these by ALPN."""
        context = ssl.create_default_context(cafile=str(self.ca_path))
        if offered := list(protocols):
            context.set_alpn_protocols(offered)
        return context


def shown_to(wire: Wire) -> bytes | None:
    """Return the certificate that a client was shown, as DER."""
    assert isinstance(wire.sock, ssl.SSLSocket)
    return wire.sock.getpeercert(binary_form=True)
