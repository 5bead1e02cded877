"""The authority that signs certificates for intercepted hosts, checked before anything listens.

Its file is PEM: the signing certificate first, then what leads to the root, without the root.  For
which names it may sign is what its name constraints say (RFC 5280, section 4.2.1.10): clients
refuse a certificate for any other name.  No problem quotes what stood in a file of a key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from llmproxy.config.credentials import Secret
from llmproxy.config.keypair import certificate_chain, is_strong
from llmproxy.config.values import Wrong, absolute_path, show_instant

E = TypeVar("E", bound=x509.ExtensionType)

_LARGEST_BYTES = 1024 * 1024

_MAKE_ONE = "`llmproxy ca new` makes one"

_SERVERS = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}


_IDENTIFIERS: Mapping[type[x509.ExtensionType], str] = {
    x509.SubjectKeyIdentifier: "subject key identifier",
    x509.AuthorityKeyIdentifier: "authority key identifier",
}


class Chain(msgspec.Struct, frozen=True):
    """A file of certificates: where it is, and what stands in it."""

    path: str
    pem: bytes


class Authority(msgspec.Struct, frozen=True, kw_only=True):
    """What signs, and what is sent along in a handshake.

    ``not_after`` is when the first certificate of ``chain`` expires, in seconds since the epoch.
    ``weaknesses`` are sentences about what some clients refuse or do not enforce.
    """

    chain: Chain
    key: Secret
    not_after: float
    weaknesses: tuple[str, ...] = ()


def signing_chain(value: object) -> Chain:
    """Read the path of a signing certificate and what leads to its root, and the file.

    Raises:
        Wrong: it is no path, or no such file.
    """
    if isinstance(value, str) and "-----BEGIN" in value:
        raise Wrong("the absolute path of a PEM file, and not what stands in it", hidden=True)
    path = absolute_path(value)
    if os.path.exists(path) and not os.path.isfile(path):
        raise Wrong("the path of a regular file")
    try:
        with open(path, "rb") as file:
            pem = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise Wrong(f"a PEM file that can be read ({error.strerror}); {_MAKE_ONE}") from None
    if len(pem) > _LARGEST_BYTES:
        raise Wrong("a PEM file of at most 1MiB")
    certificate_chain(pem)
    _check(x509.load_pem_x509_certificates(pem))
    return Chain(path, pem)


def authority(chain: Chain, key: Secret) -> Authority:
    """Put both together.

    Raises:
        Wrong: the key is not that of the signing certificate, or none that clients accept.
    """
    certificates = x509.load_pem_x509_certificates(chain.pem)
    own = load_pem_private_key(key.reveal().encode("ascii"), None).public_key()
    if own != certificates[0].public_key():
        raise Wrong("the key of the first certificate of `ca_certificate`", hidden=True)
    if not is_strong(own):
        raise Wrong("an RSA key of 2048 bits or more, or an elliptic one", hidden=True)
    return Authority(
        chain=chain,
        key=key,
        not_after=min(one.not_valid_after_utc.timestamp() for one in certificates),
        weaknesses=tuple(_weaknesses(certificates)),
    )


def check_time(chain: Chain, now: float) -> None:
    """See whether a chain can be used at a time, in seconds since the epoch.

    Raises:
        Wrong: a certificate has expired, or is not valid yet.
    """
    for one in x509.load_pem_x509_certificates(chain.pem):
        end, begin = one.not_valid_after_utc.timestamp(), one.not_valid_before_utc.timestamp()
        if end <= now:
            raise Wrong(
                f"a certificate that has not expired (this one did at {show_instant(end)}); "
                f"{_MAKE_ONE}"
            )
        if now < begin:
            raise Wrong(f"a certificate that is valid already (it will at {show_instant(begin)})")


def outside(chain: Chain, patterns: Sequence[str]) -> list[str]:
    """Return those of ``patterns`` for which, or for a part of which, a chain may not sign."""
    limits = [_constraints(one) for one in x509.load_pem_x509_certificates(chain.pem)]
    return [one for one in patterns if not all(_permits(limit, one) for limit in limits)]


# --- the certificates -----------------------------------------------------------------------------


def _check(certificates: Sequence[x509.Certificate]) -> None:
    """Refuse what could not sign a certificate that clients accept."""
    for at, one in enumerate(certificates):
        try:
            _check_one(one, below=at)
        except ValueError:  # an extension is malformed, or stands twice
            raise Wrong("certificates whose extensions can be read") from None
    for one, above in pairwise(certificates):
        if not _is_issued_by(one, above):
            raise Wrong(
                "the signing certificate first, and then each certificate behind the one that it "
                "has issued"
            )


def _check_one(one: x509.Certificate, *, below: int) -> None:
    if _is_issued_by(one, one):
        raise Wrong(
            "a signing certificate below the root, without the root: clients have that already, "
            f"and its key should not be here; {_MAKE_ONE}"
        )
    basic, usage = _basic(one), _extension(one, x509.KeyUsage)
    may_sign = basic is not None and basic.value.ca
    if not may_sign or usage is None or not usage.value.key_cert_sign:
        raise Wrong(f"a certificate of an authority, whose key may sign others; {_MAKE_ONE}")
    length = None if basic is None else basic.value.path_length
    if length is not None and length < below:
        raise Wrong("a chain that is no longer than its certificates allow")
    purposes = _extension(one, x509.ExtendedKeyUsage)
    if purposes is not None and not _SERVERS & set(purposes.value):
        raise Wrong("a certificate of an authority for servers")


def _is_issued_by(one: x509.Certificate, other: x509.Certificate) -> bool:
    try:
        one.verify_directly_issued_by(other)
    except Exception:  # each kind of key has errors of its own
        return False
    return True


def _weaknesses(certificates: Sequence[x509.Certificate]) -> Iterator[str]:
    if not any(_constraints(one).permitted for one in certificates):
        yield (
            "it has no name constraints: whoever gets its key can sign for any host in the eyes of "
            f"those who trust it; {_MAKE_ONE} with them"
        )
    for kind, words in _IDENTIFIERS.items():
        if any(_extension(one, kind) is None for one in certificates):
            yield f"it has no {words}: Python 3.13 and later refuse what it signs"
    if any((basic := _basic(one)) is not None and not basic.critical for one in certificates):
        yield "its basic constraints are not critical: Python 3.13 and later refuse what it signs"


def _basic(one: x509.Certificate) -> x509.Extension[x509.BasicConstraints] | None:
    return _extension(one, x509.BasicConstraints)


def _extension(one: x509.Certificate, kind: type[E]) -> x509.Extension[E] | None:
    try:
        return one.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


# --- the names ------------------------------------------------------------------------------------


class _Constraints(msgspec.Struct, frozen=True):
    """What a certificate says of names of hosts; without ``permitted`` all are."""

    permitted: tuple[str, ...]
    excluded: tuple[str, ...]


def _constraints(one: x509.Certificate) -> _Constraints:
    found = _extension(one, x509.NameConstraints)
    if found is None:
        return _Constraints((), ())
    return _Constraints(
        _names(found.value.permitted_subtrees), _names(found.value.excluded_subtrees)
    )


def _names(subtrees: Sequence[x509.GeneralName] | None) -> tuple[str, ...]:
    return tuple(one.value.lower() for one in subtrees or () if isinstance(one, x509.DNSName))


def _permits(limit: _Constraints, pattern: str) -> bool:
    """Return whether all that ``pattern`` stands for is permitted."""
    if limit.permitted and not any(_covers(one, pattern) for one in limit.permitted):
        return False
    return not any(_covers(one, pattern) or _is_part(one, pattern) for one in limit.excluded)


def _covers(subtree: str, pattern: str) -> bool:
    """Return whether all that ``pattern`` stands for is in ``subtree``.

    A subtree is a name and all below it; with a dot before it, as OpenSSL and others have it, only
    what is below.
    """
    name = pattern.removeprefix("*.")
    if subtree.startswith("."):
        return name.endswith(subtree) or (name != pattern and subtree == f".{name}")
    return not subtree or name == subtree or name.endswith(f".{subtree}")


def _is_part(subtree: str, pattern: str) -> bool:
    """Return whether ``subtree`` is a part of what ``pattern`` stands for."""
    return pattern.startswith("*.") and subtree.endswith(pattern[1:])
