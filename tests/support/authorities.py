"""Authorities for intercepted hosts: as ``llmproxy ca new`` makes them, and odd ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtensionOID, NameOID

from llmproxy.cli.ca import NewAuthority, new_authority
from llmproxy.config import Authority, Intercept, Secret
from llmproxy.config.authority import Chain, authority

DAY_S = 86400.0


class OpenAuthority:
    """An authority of ``llmproxy ca new``, in a folder with a credentials directory.

    Args:
        folder: where the files are written.
        hosts: what it may sign for.
        now: when it is made, in seconds since the epoch; by default now.
        days: for how long it is valid.

    Attributes:
        made: what the command made.
        root, chain: the paths of what clients trust, and of what signs.
        directory: the credentials directory, with ``ca-key``.
    """

    def __init__(
        self, folder: Path, *hosts: str, now: float | None = None, days: int = 365
    ) -> None:
        self.made: NewAuthority = new_authority(
            hosts, now=time.time() if now is None else now, days=days
        )
        self.hosts = hosts
        self.root, self.chain = folder / "root.pem", folder / "ca.pem"
        self.root.write_bytes(self.made.root)
        self.directory = folder / "credentials"
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.put(self.made.chain, self.made.key)

    def put(self, chain: bytes, key: bytes) -> None:
        """Write what signs, and its key, over what was there."""
        self.chain.write_bytes(chain)
        (self.directory / "ca-key").write_bytes(key)

    def intercept(self, *hosts: str) -> Intercept:
        """Return it as the configuration would have read it, by default for all its hosts."""
        return Intercept(
            hosts=hosts or self.hosts, authority=as_read(self.made.chain, self.made.key)
        )

    def config(self, *hosts: str) -> str:
        """Return the sections of a configuration."""
        return (
            f'[credentials]\ndirectory = "{self.directory}"\n'
            f"[intercept]\nhosts = {json.dumps(hosts or self.hosts)}\n"
            f'ca_certificate = "{self.chain}"\nca_key = "ca-key"\n'
        )


def as_read(chain: bytes, key: bytes) -> Authority:
    """Return an authority as the configuration would have read it."""
    return authority(Chain("/ca.pem", chain), Secret(key.decode()))


class Signed(NamedTuple):
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: Any

    @property
    def pem(self) -> bytes:
        """The certificate as a file has it."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as a file has it."""
        pem: bytes = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return pem


def signed(
    issuer: Signed | None = None,
    *,
    key: Any = None,
    name: str = "odd",
    ca: bool | None = True,
    critical: bool = True,
    path_length: int | None = None,
    signs: bool | None = True,
    identified: bool = True,
    names_issuer: bool = True,
    broken: bool = False,
    limits: x509.NameConstraints | None = None,
    purposes: Iterable[x509.ObjectIdentifier] = (),
    begins: float = -1.0,
    ends: float = 30.0,
) -> Signed:
    """Sign a certificate with any mixture of extensions.

    Args:
        issuer: signs; None signs itself.
        key: the certificate's; by default a new one.
        name: its common name.
        ca: what its basic constraints say; None leaves them out.
        critical: whether they are.
        path_length: what they say beside.
        signs: whether the key usage allows it to sign; None leaves the usage out.
        identified: it has a subject key identifier.
        names_issuer: it has an authority key identifier.
        broken: its subject alternative name cannot be read.
        limits: its name constraints.
        purposes: its extended key usage.
        begins, ends: when it is valid, in days from now.
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        subject if issuer is None else issuer.certificate.subject,
        subject,
        key.public_key(),
        x509.random_serial_number(),
        now + timedelta(days=begins),
        now + timedelta(days=ends),
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, path_length), critical)
    if signs is not None:
        usage = x509.KeyUsage(True, False, False, False, False, signs, False, False, False)
        builder = builder.add_extension(usage, critical=True)
    if identified:
        found = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(found, critical=False)
    if issuer is not None and names_issuer:
        above: Any = issuer.key.public_key()
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(above)
        builder = builder.add_extension(by, critical=False)
    if broken:
        garbage = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"garbage")
        builder = builder.add_extension(garbage, critical=False)
    if limits is not None:
        builder = builder.add_extension(limits, critical=True)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    signer = key if issuer is None else issuer.key
    bare = isinstance(signer, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return Signed(builder.sign(signer, None if bare else hashes.SHA256()), key)


def limits(permitted: Iterable[str] = (), excluded: Iterable[str] = ()) -> x509.NameConstraints:
    """Return name constraints of hosts."""
    return x509.NameConstraints(
        [x509.DNSName(one) for one in permitted] or None,
        [x509.DNSName(one) for one in excluded] or None,
    )
