"""A listener's certificate and its key, checked before anything listens.

Both are PEM, as authorities issue them: the certificate first, then the certificates that lead to
its root; the key without a passphrase, because nobody is there to type one.  No problem quotes
what stood in a file.
"""

from __future__ import annotations

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from llmproxy.config.credentials import Secret
from llmproxy.config.values import Wrong

_RSA_BITS = 2048
"""OpenSSL's own least, at the security level that it comes with."""


class Keypair(msgspec.Struct, frozen=True, kw_only=True):
    """What a listener shows and proves with: a PEM chain and its key.

    ``not_after`` is when the certificate expires, in seconds since the epoch.
    """

    certificate: bytes
    key: Secret
    not_after: float


def certificate_chain(pem: bytes) -> bytes:
    """Read a certificate and what leads to its root.

    Raises:
        Wrong: there is no certificate in it, or one that cannot be read.
    """
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError:
        found = []
    if not found or pem.count(b"-----BEGIN ") != len(found):
        # A file that was cut off would lose its last certificate without a word.
        raise Wrong("a PEM file of a certificate and its chain, and nothing else", hidden=True)
    return pem


def private_key(pem: bytes) -> Secret:
    """Read a private key.

    Raises:
        Wrong: it is none, or has a passphrase.
    """
    try:
        load_pem_private_key(pem, None)
        return Secret(pem.decode("ascii"))
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise Wrong("a PEM file of a private key without a passphrase", hidden=True) from None


def keypair(certificate: bytes, key: Secret) -> Keypair:
    """Put both together.

    Raises:
        Wrong: the key is not the certificate's, or none that clients of TLS 1.2 and newer accept.
    """
    leaf = x509.load_pem_x509_certificates(certificate)[0]
    own = load_pem_private_key(key.reveal().encode("ascii"), None).public_key()
    if own != leaf.public_key():
        raise Wrong("the key of `certificate`", hidden=True)
    if not is_strong(own):
        raise Wrong("an RSA key of 2048 bits or more, or an elliptic one", hidden=True)
    return Keypair(certificate=certificate, key=key, not_after=leaf.not_valid_after_utc.timestamp())


def is_strong(key: object) -> bool:
    """Return whether clients of TLS 1.2 and newer accept what a public key has signed."""
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size >= _RSA_BITS
    return isinstance(
        key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey
    )
