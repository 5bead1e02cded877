"""``llmproxy ca new``: the authority of the hosts whose TLS the proxy ends (ADR-0030).

A root that clients trust, and below it the certificate that signs and is sent along.  Both are
constrained to the hosts, because not every client applies what a trusted root says of itself.  The
root's key signs once, here, and by default is written nowhere.  Nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import shlex
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llmproxy.config.host_pattern import host_name_pattern
from llmproxy.config.values import Wrong, show_instant

_CODES = "exit codes: 0 {ok}; 1 {no}; 2 the command line is wrong"

_ABOUT = """Make a certificate authority for the hosts of [intercept]: a root that clients trust,
and below it the certificate with which the proxy signs. Both are constrained to the hosts and to
what is below them, so that clients refuse what the authority signs for any other host or address.
Hosts cannot be added later: that takes another authority. The root's key is thrown away, unless
--keep-root-key is given. Nothing that exists is overwritten. The command prints what the
configuration and what each kind of program needs."""

_BACKDATED = timedelta(days=1)
"""A client's clock may be that much behind, such as that of a restored virtual machine."""

_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Arch
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora, RHEL
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",
)
"""Where systems keep the certificates that they trust, in one file."""

_MARK = b"-----BEGIN CERTIFICATE-----"

_MOST_DAYS = 3650

_NO_ADDRESS = tuple(
    x509.IPAddress(ipaddress.ip_network(all_of)) for all_of in ("0.0.0.0/0", "::/0")
)


class NewAuthority(NamedTuple):
    """An authority in PEM.

    Attributes:
        root: the certificate that clients trust.
        root_key: its key.
        chain: the certificate that signs, which is sent along in handshakes.
        key: its key.
        tag: tells the names of this authority from those of others.
        not_after: when both expire, in seconds since the epoch.
    """

    root: bytes
    root_key: bytes
    chain: bytes
    key: bytes
    tag: str
    not_after: float


def new_authority(hosts: Sequence[str], *, now: float, days: int) -> NewAuthority:
    """Make an authority that may sign for ``hosts`` alone.

    Args:
        hosts: exact names and ``*.DOMAIN``, as :func:`host_name_pattern` returns them.
        now: seconds since the epoch.
        days: for how long it is valid.
    """
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    serial = x509.random_serial_number()
    tag = f"{serial & 0xFFFFFFFF:08x}"
    begin = datetime.fromtimestamp(int(now), UTC)
    end = begin + timedelta(days=days)
    # A name permits itself and all below it (RFC 5280, section 4.2.1.10): what is constrained to
    # names may still sign for addresses, unless these are excluded.
    names = dict.fromkeys(host.removeprefix("*.") for host in hosts)
    limits = x509.NameConstraints([x509.DNSName(name) for name in names], _NO_ADDRESS)

    def certificate(
        number: int, subject: x509.Name, public: ec.EllipticCurvePublicKey, length: int
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder(_name(tag, "root"), subject, public, number)
            .not_valid_before(begin - _BACKDATED)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=length), critical=True)
            .add_extension(_SIGNS, critical=True)
            .add_extension(limits, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()),
                critical=False,
            )
        )

    root = certificate(serial, _name(tag, "root"), root_key.public_key(), 1)
    signing = certificate(
        x509.random_serial_number(), _name(tag, "signing"), key.public_key(), 0
    ).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return NewAuthority(
        root=root.sign(root_key, hashes.SHA256()).public_bytes(Encoding.PEM),
        root_key=_pem(root_key),
        chain=signing.sign(root_key, hashes.SHA256()).public_bytes(Encoding.PEM),
        key=_pem(key),
        tag=tag,
        not_after=end.timestamp(),
    )


_SIGNS = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _name(tag: str, role: str) -> x509.Name:
    """Return a name that no other authority has: clients may trust two during a change."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"llmproxy {tag} {role}")])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# --- the command ----------------------------------------------------------------------------------


def add_ca(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``llmproxy``."""
    ca = commands.add_parser(
        "ca",
        help="make the certificate authority of intercepted hosts",
        description="Make the certificate authority of intercepted hosts.",
        epilog=_CODES.format(ok="done", no="it failed"),
    )
    command = ca.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "new",
        help="make a root, a signing certificate and a bundle",
        description=_ABOUT,
        epilog=_CODES.format(ok="it is made", no="a file is there already, or cannot be used"),
    )
    command.add_argument("folder", metavar="DIR", help="where the files are written")
    command.add_argument(
        "--host",
        action="append",
        required=True,
        type=_host,
        metavar="NAME",
        dest="hosts",
        help="a host that may be intercepted, or *.DOMAIN for all below a domain; any number of "
        "times. No addresses: clients name no host in the handshake then",
    )
    command.add_argument(
        "--days",
        default=365,
        type=_days,
        metavar="N",
        help="for how long the authority is valid (default: %(default)s)",
    )
    command.add_argument(
        "--system-certificates",
        metavar="FILE",
        help="what the bundle begins with (default: what this system trusts); to replace an "
        "authority, the old bundle",
    )
    command.add_argument(
        "--keep-root-key",
        action="store_true",
        help="write the root's key, too: whoever has it can sign for the hosts, and make further "
        "signing certificates",
    )
    command.add_argument(
        "--json", action="store_true", help="print one object to stdout, in place of the text"
    )
    command.set_defaults(run=ca_new)


def make_authority(folder: str, hosts: Sequence[str], *, days: int) -> Report:
    """Make an authority in a folder, and throw the root's key away; return what it is for.

    Raises:
        OSError: a file is there already, or cannot be written.
    """
    _, trusted = _trusted(None)
    made = new_authority(hosts, now=time.time(), days=days)
    _write(folder, _files(made, trusted, keep_root_key=False))
    return _report(folder, made, list(hosts), keep_root_key=False)


def ca_new(args: argparse.Namespace) -> int:
    """Make an authority, and print what it is for."""
    hosts = list(dict.fromkeys(args.hosts))
    folder = os.path.abspath(args.folder)
    try:
        source, trusted = _trusted(args.system_certificates)
        made = new_authority(hosts, now=time.time(), days=args.days)
        _write(folder, _files(made, trusted, keep_root_key=args.keep_root_key))
    except OSError as error:
        print(f"{error.filename or folder}: {error.strerror}", file=sys.stderr)
        if isinstance(error, FileExistsError):
            print(
                "nothing is overwritten, and nothing was written: name another folder",
                file=sys.stderr,
            )
        return 1
    if not trusted:
        print(
            "warning: the system's own certificates were not found, and so the bundle has the root "
            "alone: programs with it trust no other host (--system-certificates FILE)",
            file=sys.stderr,
        )
    report = _report(folder, made, hosts, keep_root_key=args.keep_root_key)
    if args.json:
        print(json.dumps(report._asdict()))
    else:
        print(_text(report, source, trusted.count(_MARK)))
    return 0


def _trusted(asked: str | None) -> tuple[str, bytes]:
    """Return which file has the system's certificates, and what stands in it; b"" is none."""
    own = ssl.get_default_verify_paths().openssl_cafile  # not what $SSL_CERT_FILE says
    known = [path for path in (*_BUNDLES, own) if os.path.isfile(path)]
    path = known[0] if asked is None and known else asked
    if path is None:
        return "", b""
    with open(path, "rb") as file:
        found = file.read()
    if _MARK not in found:
        raise OSError(0, "expected a PEM file of certificates", path)
    return path, found


def _files(made: NewAuthority, trusted: bytes, *, keep_root_key: bool) -> dict[str, bytes]:
    """Return the files by their names; those of keys end with ``key``."""
    bundle = trusted if not trusted or trusted.endswith(b"\n") else trusted + b"\n"
    files = {
        "root.pem": made.root,
        "bundle.pem": bundle + made.root,
        "ca.pem": made.chain,
        "ca-key": made.key,
    }
    if keep_root_key:
        files["root-key"] = made.root_key
    return files


def _write(folder: str, files: Mapping[str, bytes]) -> None:
    """Write all files, or none.

    Raises:
        OSError: one is there already, or cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    written = []
    try:
        for name, content in files.items():
            path = os.path.join(folder, name)
            mode = 0o600 if name.endswith("key") else 0o644
            # With O_EXCL not even a link is followed.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with open(descriptor, "wb") as file:
                file.write(content)
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise


class Report(NamedTuple):
    """What was made and what is to be done with it, as ``--json`` prints it."""

    hosts: list[str]
    not_after: str
    root: str
    bundle: str
    ca_certificate: str
    ca_key: str
    root_key: str | None
    configuration: str
    environment: dict[str, str]
    java: str


def _report(folder: str, made: NewAuthority, hosts: list[str], *, keep_root_key: bool) -> Report:
    at = {name: os.path.join(folder, name) for name in ("root.pem", "bundle.pem", "ca.pem")}
    bundle, root, chain = at["bundle.pem"], at["root.pem"], at["ca.pem"]
    return Report(
        hosts=hosts,
        not_after=show_instant(made.not_after),
        root=root,
        bundle=bundle,
        ca_certificate=chain,
        ca_key=os.path.join(folder, "ca-key"),
        root_key=os.path.join(folder, "root-key") if keep_root_key else None,
        configuration=f"[intercept]\nhosts = {json.dumps(hosts)}\n"
        f'ca_certificate = {json.dumps(chain)}\nca_key = "ca-key"\n',
        environment={
            "SSL_CERT_FILE": bundle,
            "REQUESTS_CA_BUNDLE": bundle,
            "GIT_SSL_CAINFO": bundle,
            "NODE_EXTRA_CA_CERTS": root,
            "NODE_USE_ENV_PROXY": "1",
            "NO_PROXY": "localhost,127.0.0.1",
        },
        java="keytool -importcert -noprompt -cacerts -storepass changeit "
        f"-alias llmproxy-{made.tag} -file {shlex.quote(root)}",
    )


def _text(report: Report, source: str, trusted: int) -> str:
    plural = "" if trusted == 1 else "s"
    before = f"the {trusted} certificate{plural} of {source}, and " if trusted else ""
    exports = "\n".join(
        f"export {name}={shlex.quote(value)}" for name, value in report.environment.items()
    )
    if report.root_key is None:
        kept = """
The root's key was thrown away. Nobody can make another signing certificate that these clients
trust; for other hosts, and before this authority expires, make another authority."""
    else:
        kept = f"""
The root's key is {report.root_key}. The proxy does not need it: delete it, or keep it where
nothing is connected. Whoever has it can sign for these hosts."""
    return f"""\
For {", ".join(report.hosts)}, until {report.not_after}:
  {report.root}: what clients trust
  {report.bundle}: {before}the root
  {report.ca_certificate}: signs, and is sent along in handshakes
  {report.ca_key}: its key; move it into the credentials directory
{kept}

# The configuration of the proxy
{report.configuration}
# Programs that reach the proxy by HTTPS_PROXY: OpenSSL, Python, Go and curl; requests and pip; git;
# Node, and Node 24 again. A local server is reached directly.
{exports}

# Java, where these programs run
{report.java}"""


def _host(word: str) -> str:
    try:
        return host_name_pattern(word)
    except Wrong as wrong:
        raise argparse.ArgumentTypeError(f"expected {wrong.expected}; got {word!r}") from None


def _days(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 6 and 1 <= int(word) <= _MOST_DAYS):
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to {_MOST_DAYS}, got {word!r}"
        )
    return int(word)
