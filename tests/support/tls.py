"""A certificate authority of the tests' own, and contexts of both sides."""

from __future__ import annotations

import ssl
from datetime import datetime
from pathlib import Path

import trustme


class Authority:
    """Issues certificates; ``ca_path`` is what a client must trust.

    Args:
        folder: where the authority's certificate is written.
    """

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.ca_path = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca_path))
        self._folder = folder

    def server(self, *names: str, not_after: datetime | None = None) -> ssl.SSLContext:
        """Return a server's context with a certificate for ``names`` (default ``localhost``)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*(names or ("localhost",)), not_after=not_after).configure_cert(context)
        return context

    def client(self) -> ssl.SSLContext:
        """Return a client's context that trusts this authority."""
        context = ssl.create_default_context()
        self._ca.configure_trust(context)
        return context

    def key_and_certificate(self) -> tuple[Path, Path]:
        """Write a key and a certificate for ``localhost``; return their paths."""
        issued = self._ca.issue_cert("localhost")
        key, certificate = self._folder / "key.pem", self._folder / "cert.pem"
        issued.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        return key, certificate
