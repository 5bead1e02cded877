"""The keys of TLS listeners: what is accepted, and how a mistake in the files is reported.

A PEM file is a credential like others, but for its shape; nothing of it, nor its name, is shown.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID
from trustme import KeyType

from llmproxy.config import Keypair, Secret
from tests.support.configs import accepted, problems_of
from tests.support.keypairs import Issued, Vault

WHICH = ["certificate", "key"]
PEM_LINE = re.compile(r"[A-Za-z0-9+/=]{60,}")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    """A credentials directory with a certificate and its key in it."""
    vault = Vault(tmp_path)
    vault.put()
    return vault


def changes(vault: Vault, **proxy: str | None) -> dict[str, str | None]:
    """Return a listener's keys over the smallest file, with changes in ``[proxy]``."""
    keys: dict[str, str | None] = {
        "listen_tls": '["tcp:8443"]',
        "certificate": '"certificate"',
        "key": '"key"',
    }
    directory = json.dumps(str(vault.directory))
    changed = {f"proxy.{name}": value for name, value in {**keys, **proxy}.items()}
    return {"credentials.directory": directory, **changed}


def problem(changed: Mapping[str, str | None], key: str) -> str:
    """Return the one problem of a refused file, which is ``key``'s and shows nothing secret."""
    (found,) = problems_of(changed)
    assert found.startswith(f"{key}: "), found
    assert not PEM_LINE.search(found)
    assert "\n" not in found
    return found


# --- what is accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize("key_type", [KeyType.RSA, KeyType.ECDSA])
def test_a_whole_listener(vault: Vault, key_type: KeyType) -> None:
    """Chain, key and expiry arrive as they stand in the files."""
    issued = vault.put(vault.issue(key_type=key_type))
    proxy = accepted(changes(vault)).proxy
    assert proxy.listen == ("tcp:8080:interface=127.0.0.1",)
    assert proxy.listen_tls == ("tcp:8443",)
    assert proxy.keypair == Keypair(
        certificate=issued.chain, key=Secret(issued.key.decode()), not_after=issued.not_after
    )


def test_certificate_and_key_may_be_credentials_of_systemd(vault: Vault) -> None:
    """Without a directory of its own the file's keys name those of $CREDENTIALS_DIRECTORY."""
    changed = {**changes(vault), "credentials.directory": None}
    assert accepted(changed, CREDENTIALS_DIRECTORY=str(vault.directory)).proxy.keypair


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp:8443:interface=127.0.0.1",
        "tcp6:8443",
        "unix:/run/{instance}.sock",
        "systemd:domain=INET:name=tls",
        "haproxy:tcp:8443",
    ],
)
def test_endpoints_below_tls(vault: Vault, endpoint: str) -> None:
    """TLS is ended over whatever an endpoint accepts; {instance} stands for the daemon's name."""
    changed = changes(vault, listen_tls=json.dumps([endpoint]))
    assert accepted(changed).proxy.listen_tls == (endpoint.replace("{instance}", "0"),)


def test_tls_alone(vault: Vault) -> None:
    """A proxy may have no plain listener, if it has one with TLS."""
    assert accepted(changes(vault, listen="[]")).proxy.listen == ()


GOOD_FILES: dict[str, Callable[[Issued], tuple[bytes, bytes]]] = {
    "text around": lambda issued: (b"subject=a\n" + issued.chain, b"\n" + issued.key + b"\n"),
    "CRLF": lambda issued: (issued.chain.replace(b"\n", b"\r\n"), issued.key),
    "PKCS8": lambda issued: (issued.chain, issued.key_as(PrivateFormat.PKCS8)),
    "OpenSSL": lambda issued: (issued.chain, issued.key_as(PrivateFormat.TraditionalOpenSSL)),
    "both in one": lambda issued: (issued.chain, issued.chain + issued.key),
}


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES)
def test_files_as_tools_write_them(
    vault: Vault, content: Callable[[Issued], tuple[bytes, bytes]]
) -> None:
    """Text beside the blocks, both line ends and formats, and a key behind its certificate."""
    certificate, key = content(vault.issue())
    vault.write("certificate", certificate)
    vault.write("key", key)
    assert accepted(changes(vault)).proxy.keypair


# --- what belongs together ------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [["certificate"], ["key"], WHICH])
def test_a_tls_listener_needs_both(vault: Vault, missing: list[str]) -> None:
    """A missing certificate and a missing key are both reported."""
    assert problems_of(changes(vault, **dict.fromkeys(missing))) == tuple(
        f"proxy.{name}: expected this key, but it is missing" for name in missing
    )


@pytest.mark.parametrize("alone", WHICH)
def test_certificate_and_key_need_a_tls_listener(vault: Vault, alone: str) -> None:
    """A certificate that nobody would see is a mistake, not something that is ignored."""
    (other,) = {*WHICH} - {alone}
    words = problem(changes(vault, listen_tls=None, **{other: None}), f"proxy.{alone}")
    assert words.endswith("expected `listen_tls` beside it, which it is for")


AN_ITEM = "an array with at least one item, got an empty one"


@pytest.mark.parametrize(
    ("listen_tls", "at", "words"),
    [
        ("[]", "", AN_ITEM),
        ('["tcp:8443", "8443"]', "[1]", "an endpoint such as"),
        *(
            (f'["{kind}:8443:privateKey=/k.pem"]', "[0]", "an endpoint without TLS of its own")
            for kind in ("ssl", "tls", "haproxy:ssl", "haproxy:tls")
        ),
    ],
)
def test_endpoints_that_cannot_be_below_tls(
    vault: Vault, listen_tls: str, at: str, words: str
) -> None:
    """None at all, what is no endpoint, and one that ends TLS itself: it would be two layers."""
    assert words in problem(changes(vault, listen_tls=listen_tls), f"proxy.listen_tls{at}")


# --- what a file holds ----------------------------------------------------------------------------

NOT_A_CERTIFICATE: dict[str, Callable[[Issued], bytes]] = {
    "empty": lambda issued: b"",
    "text": lambda issued: b"certificate\n",
    "key": lambda issued: issued.key,
    "key behind it": lambda issued: issued.chain + issued.key,
    "der": lambda issued: issued.der,
    "cut": lambda issued: issued.leaf[:-40],
    "broken": lambda issued: issued.leaf.replace(b"MI", b"XX", 1),
    "broken chain": lambda issued: issued.leaf + issued.leaf.replace(b"MI", b"XX", 1),
    "chain cut": lambda issued: issued.chain[:-40],
    "too large": lambda issued: issued.leaf + b"#" * 64 * 1024 + b"\n" + issued.chain,
}


@pytest.mark.parametrize("content", NOT_A_CERTIFICATE.values(), ids=NOT_A_CERTIFICATE)
def test_what_is_no_certificate(vault: Vault, content: Callable[[Issued], bytes]) -> None:
    """What holds no chain, or one that is not whole, is refused before a client finds out."""
    vault.write("certificate", content(vault.put()))
    words = problem(changes(vault), "proxy.certificate")
    assert "PEM file" in words or "64KiB" in words
    assert "got" not in words


NOT_A_KEY: dict[str, Callable[[Issued], bytes]] = {
    "empty": lambda issued: b"",
    "text": lambda issued: b"key\n",
    "certificate": lambda issued: issued.chain,
    "cut": lambda issued: issued.key[:-40],
    "encrypted": lambda issued: issued.key_as(PrivateFormat.PKCS8, b"open sesame"),
    "encrypted, old": lambda issued: issued.key_as(PrivateFormat.TraditionalOpenSSL, b"sesame"),
    "not ASCII": lambda issued: "# Schlüssel\n".encode() + issued.key,
}


@pytest.mark.parametrize("content", NOT_A_KEY.values(), ids=NOT_A_KEY)
def test_what_is_no_key(vault: Vault, content: Callable[[Issued], bytes]) -> None:
    """A key must be readable without a passphrase, and nothing of the file is shown."""
    vault.write("key", content(vault.put()))
    words = problem(changes(vault), "proxy.key")
    assert words.endswith("expected a PEM file of a private key without a passphrase")


def test_a_key_of_another_certificate(vault: Vault) -> None:
    """The key is that of the first certificate, and not that of another one or of an authority."""
    issued = vault.put()
    vault.write("key", vault.issue().key)
    assert problem(changes(vault), "proxy.key").endswith("expected the key of `certificate`")
    vault.write("key", issued.key)
    vault.write("certificate", issued.chain.removeprefix(issued.leaf) + issued.leaf)
    assert problem(changes(vault), "proxy.key").endswith("expected the key of `certificate`")


def self_signed(key: rsa.RSAPrivateKey | dsa.DSAPrivateKey) -> tuple[bytes, bytes]:
    """Return a certificate that is its own authority, and its key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1)
    builder = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), pem


@pytest.mark.parametrize("kind", ["rsa", "dsa"])
def test_a_key_with_which_no_handshake_could_succeed(vault: Vault, kind: str) -> None:
    """The check reports a weak key: neither the start nor a client finds it first."""
    if kind == "rsa":
        certificate, key = self_signed(rsa.generate_private_key(65537, 1024))  # noqa: S505 - weak on purpose
    else:
        certificate, key = self_signed(dsa.generate_private_key(2048))
    vault.write("certificate", certificate)
    vault.write("key", key)
    (words,) = problems_of(changes(vault))
    assert words.startswith(("proxy.key: ", "proxy.certificate: "))
    assert not PEM_LINE.search(words)


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", 'a file "missing" in {} that can be read (No such file'),
        ("folder", 'a regular file "folder" in {}'),
        ("pipe", 'a regular file "pipe" in {}'),
        ("MIIEvQIBADANBgkqhkiG9w0", "the name of a credential file, and no key"),
        ("../certificate", "the bare name of a file"),
        ("/etc/passwd", "the bare name of a file"),
    ],
)
def test_a_file_that_cannot_be_one(vault: Vault, which: str, name: str, words: str) -> None:
    """The problem shows the name of a file only if it looks like one, and no secret."""
    (vault.directory / "folder").mkdir()
    os.mkfifo(vault.directory / "pipe")
    found = problem(changes(vault, **{which: json.dumps(name)}), f"proxy.{which}")
    assert words.format(vault.directory) in found
    assert name in words or name not in found


@pytest.mark.parametrize("which", WHICH)
def test_a_file_without_permission(
    vault: Vault, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem says that the process may not read the file (root may read all)."""
    really_open = open
    forbidden = str(vault.directory / which)

    def guarded(path: str, mode: str) -> object:
        if path == forbidden:
            raise PermissionError(13, "Permission denied")
        return really_open(path, mode)

    monkeypatch.setattr("builtins.open", guarded)
    assert "(Permission denied)" in problem(changes(vault), f"proxy.{which}")


# --- nothing secret is shown ----------------------------------------------------------------------


def test_nothing_of_the_key_is_shown(vault: Vault) -> None:
    """Neither repr nor the redacted form holds the key or the files' names; msgspec refuses it."""
    issued = vault.put()
    config = accepted(changes(vault))
    body = issued.key.decode().splitlines()[1]
    redacted = config.redacted()
    for shown in (repr(config), str(config.proxy.keypair), json.dumps(redacted)):
        assert body not in shown
    proxy = redacted["proxy"]
    assert isinstance(proxy, dict)
    assert (proxy["listen_tls"], proxy["certificate"], proxy["key"]) == (["tcp:8443"], True, True)
    with pytest.raises(TypeError, match="Secret"):
        msgspec.json.encode(config)


@pytest.mark.parametrize("which", WHICH)
def test_a_key_written_into_the_file_is_not_shown(vault: Vault, which: str) -> None:
    """A key that was pasted where the file's name belongs stands in no message."""
    pasted = vault.put().key.decode()
    words = problem(changes(vault, **{which: json.dumps(pasted)}), f"proxy.{which}")
    assert pasted.splitlines()[1] not in words
    assert "PRIVATE" not in words
