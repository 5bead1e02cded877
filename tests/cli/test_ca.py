"""``llmproxy ca new``: what it writes where, what it says, and what it leaves alone."""

from __future__ import annotations

import ipaddress
import json
import os
import shlex
import shutil
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from llmproxy.cli import ca
from llmproxy.cli.main import main
from llmproxy.config import parse
from tests.support.configs import toml

Printed = pytest.CaptureFixture[str]
E = TypeVar("E", bound=x509.ExtensionType)
_PURPOSES = ExtensionOID.EXTENDED_KEY_USAGE
NOW = 1_800_000_000.75


def made(folder: Path, *options: str, hosts: Sequence[str] = ("inference.local",)) -> int:
    """Run the command; return its exit code."""
    words = [word for host in hosts for word in ("--host", host)]
    return main(["ca", "new", str(folder), *words, *options])


def certificate(path: Path) -> x509.Certificate:
    """Return the certificate of a file that has one."""
    (found,) = x509.load_pem_x509_certificates(path.read_bytes())
    return found


def value(one: x509.Certificate, kind: type[E]) -> E:
    """Return an extension of a certificate."""
    return one.extensions.get_extension_for_class(kind).value


# --- what is written ------------------------------------------------------------------------------


def test_the_files_and_who_may_read_them(tmp_path: Path) -> None:
    """What clients get is open, the key is not, and the root's key is written nowhere."""
    assert made(tmp_path / "a" / "ca") == 0
    modes = {one.name: one.stat().st_mode & 0o777 for one in (tmp_path / "a" / "ca").iterdir()}
    assert modes == {"root.pem": 0o644, "bundle.pem": 0o644, "ca.pem": 0o644, "ca-key": 0o600}


@pytest.mark.parametrize("name", ["root.pem", "ca.pem"])
def test_both_certificates_are_as_strict_clients_want_them(tmp_path: Path, name: str) -> None:
    """Elliptic, constrained, and with every extension that Python 3.13 asks for."""
    assert made(tmp_path, hosts=["inference.local", "*.corp.example"]) == 0
    root, one = certificate(tmp_path / "root.pem"), certificate(tmp_path / name)
    one.verify_directly_issued_by(root)
    key: Any = one.public_key()
    assert isinstance(key.curve, ec.SECP256R1)
    critical = {type(found.value) for found in one.extensions if found.critical}
    assert critical == {x509.BasicConstraints, x509.KeyUsage, x509.NameConstraints}
    basic, usage = value(one, x509.BasicConstraints), value(one, x509.KeyUsage)
    assert (basic.ca, basic.path_length) == (True, 1 if name == "root.pem" else 0)
    assert usage == x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    purposes = [found.value for found in one.extensions if found.oid == _PURPOSES]
    servers = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    assert purposes == ([] if name == "root.pem" else [servers])
    names = value(one, x509.NameConstraints)
    assert [found.value for found in names.permitted_subtrees or ()] == [
        "inference.local",
        "corp.example",
    ]
    assert [found.value for found in names.excluded_subtrees or ()] == [
        ipaddress.ip_network("0.0.0.0/0"),
        ipaddress.ip_network("::/0"),
    ]
    authority = value(one, x509.AuthorityKeyIdentifier)
    assert authority.key_identifier == value(root, x509.SubjectKeyIdentifier).digest
    assert value(one, x509.SubjectKeyIdentifier).digest
    assert (one.subject == root.subject) is (name == "root.pem")


def test_two_authorities_share_no_name(tmp_path: Path) -> None:
    """Clients trust both for a while when one replaces the other."""
    subjects = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert made(folder) == 0
        subjects |= {certificate(folder / name).subject for name in ("root.pem", "ca.pem")}
    assert len(subjects) == 4


@pytest.mark.parametrize(("option", "days"), [([], 365), (["--days", "1"], 1)])
def test_how_long_it_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], days: int
) -> None:
    """Both certificates end together, and began a day ago for clocks that are behind."""
    monkeypatch.setattr("time.time", lambda: NOW)
    assert made(tmp_path, *option) == 0
    for name in ("root.pem", "ca.pem"):
        one = certificate(tmp_path / name)
        assert one.not_valid_before_utc.timestamp() == 1_800_000_000 - 86400
        assert one.not_valid_after_utc.timestamp() == 1_800_000_000 + days * 86400


def test_the_roots_key_is_kept_if_it_is_wanted(tmp_path: Path, capsys: Printed) -> None:
    """It is the root's, nobody else may read it, and the command says what that means."""
    assert made(tmp_path, "--keep-root-key") == 0
    path = tmp_path / "root-key"
    assert path.stat().st_mode & 0o777 == 0o600
    key = load_pem_private_key(path.read_bytes(), None)
    assert key.public_key() == certificate(tmp_path / "root.pem").public_key()
    said = capsys.readouterr().out
    assert f"{path}. The proxy does not need it: delete it" in said
    assert "thrown away" not in said


def test_by_default_the_roots_key_is_thrown_away(tmp_path: Path, capsys: Printed) -> None:
    """No file has it, and the command says so."""
    assert made(tmp_path) == 0
    assert "The root's key was thrown away." in capsys.readouterr().out
    root = certificate(tmp_path / "root.pem").public_key()
    assert load_pem_private_key((tmp_path / "ca-key").read_bytes(), None).public_key() != root
    assert b"".join(one.read_bytes() for one in tmp_path.iterdir()).count(b"PRIVATE KEY") == 2


# --- the bundle -----------------------------------------------------------------------------------


def test_the_bundle_is_what_the_system_trusts_and_the_root(tmp_path: Path, capsys: Printed) -> None:
    """A program that reads it in place of the system's reaches what it reached before."""
    system = tmp_path / "system.pem"
    assert made(tmp_path / "other") == 0
    system.write_bytes((tmp_path / "other" / "root.pem").read_bytes().rstrip(b"\n"))
    assert made(tmp_path / "ca", "--system-certificates", str(system)) == 0
    bundle = x509.load_pem_x509_certificates((tmp_path / "ca" / "bundle.pem").read_bytes())
    assert bundle == [certificate(system), certificate(tmp_path / "ca" / "root.pem")]
    assert f"the 1 certificate of {system}, and the root" in capsys.readouterr().out
    context = ssl.create_default_context(cafile=str(tmp_path / "ca" / "bundle.pem"))
    assert len(context.get_ca_certs()) == 2


def test_the_systems_own_certificates_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the places where systems have them; what the caller's shell says is not read."""
    assert made(tmp_path / "other") == 0
    system, mine = tmp_path / "other" / "root.pem", tmp_path / "mine.pem"
    mine.write_text("not this one")
    monkeypatch.setenv("SSL_CERT_FILE", str(mine))
    monkeypatch.setattr(ca, "_BUNDLES", (str(tmp_path / "none"), str(system), str(mine)))
    assert made(tmp_path / "ca") == 0
    bundle = x509.load_pem_x509_certificates((tmp_path / "ca" / "bundle.pem").read_bytes())
    assert bundle[0] == certificate(system)


def test_a_system_without_certificates_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    """The bundle has the root alone, and its programs would trust nobody else."""
    monkeypatch.setattr(ca, "_BUNDLES", ())
    nothing = ssl.get_default_verify_paths()._replace(openssl_cafile=str(tmp_path / "none"))
    monkeypatch.setattr("ssl.get_default_verify_paths", lambda: nothing)
    assert made(tmp_path / "ca") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: the system's own certificates were not found")
    assert "bundle.pem: the root\n" in captured.out
    assert certificate(tmp_path / "ca" / "bundle.pem") == certificate(tmp_path / "ca" / "root.pem")


@pytest.mark.parametrize("content", [None, b"", b"no certificates\n"])
def test_a_file_without_certificates_is_refused(
    tmp_path: Path, capsys: Printed, content: bytes | None
) -> None:
    """A bundle of it would break every program that reads it."""
    system = tmp_path / "system.pem"
    if content is not None:
        system.write_bytes(content)
    assert made(tmp_path / "ca", "--system-certificates", str(system)) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.startswith(f"{system}: ")) == ("", True)
    assert not (tmp_path / "ca").exists()


# --- what is there already ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["root.pem", "bundle.pem", "ca.pem", "ca-key", "root-key"])
@pytest.mark.parametrize("kind", ["file", "link to nothing", "folder"])
def test_nothing_is_overwritten(tmp_path: Path, capsys: Printed, name: str, kind: str) -> None:
    """Whichever of the files is there, it stays, and no other is written beside it."""
    path = tmp_path / name
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    assert made(tmp_path, "--keep-root-key") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{path}: File exists\nnothing is overwritten")
    assert [one.name for one in tmp_path.iterdir()] == [name]
    assert kind != "file" or path.read_bytes() == b"mine"


def test_a_root_key_that_nobody_asked_for_is_in_nobodys_way(tmp_path: Path) -> None:
    """Only what would be written can be in the way."""
    (tmp_path / "root-key").write_bytes(b"mine")
    assert made(tmp_path) == 0
    assert (tmp_path / "root-key").read_bytes() == b"mine"


def test_a_place_that_is_no_folder(tmp_path: Path, capsys: Printed) -> None:
    """It is named, and so is the reason."""
    (tmp_path / "a").write_bytes(b"")
    assert made(tmp_path / "a" / "b") == 1
    assert str(tmp_path / "a") in capsys.readouterr().err


def test_half_of_the_files_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk is full in the middle, what was written is taken back."""
    really_open = open
    opened: list[object] = []

    def full(file: object, mode: str = "r", **more: Any) -> Any:
        opened.append(file)
        if len(opened) == 3:
            os.close(file)  # type: ignore[arg-type]  # a descriptor
            raise OSError(28, "No space left on device")
        return really_open(file, mode, **more)  # type: ignore[call-overload]  # as it came

    monkeypatch.setattr(ca, "_trusted", lambda asked: ("", b""))
    monkeypatch.setattr("builtins.open", full)
    assert made(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("10.0.0.1", "an address cannot stand here"),
        ("[::1]", "an address cannot stand here"),
        ("::1", "a host's name"),
        ("*", "no pattern stands for all hosts"),
        ("https://a.example", "a host's name"),
        ("a.example:443", "without a port"),
        ("", "a host's name"),
    ],
)
def test_what_is_no_host_is_a_wrong_command_line(
    tmp_path: Path, capsys: Printed, word: str, words: str
) -> None:
    """Clients send no name in the handshake if they call an address."""
    with pytest.raises(SystemExit) as caught:
        made(tmp_path / "ca", hosts=[word])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "ca").exists()


@pytest.mark.parametrize("word", ["0", "-1", "3651", "1.5", "x", "٣"])
def test_what_is_no_number_of_days(tmp_path: Path, capsys: Printed, word: str) -> None:
    """Ten years are the most."""
    with pytest.raises(SystemExit) as caught:
        made(tmp_path / "ca", f"--days={word}")
    assert caught.value.code == 2
    assert "expected a whole number from 1 to 3650" in capsys.readouterr().err


def test_without_a_host_there_is_nothing_to_make(tmp_path: Path, capsys: Printed) -> None:
    """An authority without constraints is not to be had here."""
    with pytest.raises(SystemExit) as caught:
        made(tmp_path / "ca", hosts=[])
    assert caught.value.code == 2
    assert "--host" in capsys.readouterr().err


def test_the_command_alone_is_half_a_command_line(capsys: Printed) -> None:
    """What there is below it is said."""
    with pytest.raises(SystemExit) as caught:
        main(["ca"])
    assert caught.value.code == 2
    assert "usage: llmproxy ca [-h] COMMAND" in capsys.readouterr().err


def test_names_are_written_as_they_are_compared(tmp_path: Path, capsys: Printed) -> None:
    """Lower case, A-labels, each once."""
    hosts = ["Inference.LOCAL", "*.bücher.example", "inference.local"]
    assert made(tmp_path, "--json", hosts=hosts) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["hosts"] == ["inference.local", "*.xn--bcher-kva.example"]


def test_a_program_reads_all_of_it(
    tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are absolute; keys stand in no output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.time", lambda: NOW)
    assert made(Path("ca"), "--json") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    folder = tmp_path / "ca"
    assert report["not_after"] == "2028-01-15T08:00:00Z"
    assert [report[key] for key in ("root", "bundle", "ca_certificate", "ca_key")] == [
        str(folder / name) for name in ("root.pem", "bundle.pem", "ca.pem", "ca-key")
    ]
    assert report["root_key"] is None
    bundle = str(folder / "bundle.pem")
    assert report["environment"] == {
        "SSL_CERT_FILE": bundle,
        "REQUESTS_CA_BUNDLE": bundle,
        "GIT_SSL_CAINFO": bundle,
        "NODE_EXTRA_CA_CERTS": str(folder / "root.pem"),
        "NODE_USE_ENV_PROXY": "1",
        "NO_PROXY": "localhost,127.0.0.1",
    }
    assert captured.err == ""
    assert "PRIVATE" not in captured.out


def test_its_lines_of_the_configuration_can_be_used(tmp_path: Path, capsys: Printed) -> None:
    """With the key in the credentials directory, as the command says."""
    assert made(tmp_path, "--json", hosts=["inference.local", "*.corp.example"]) == 0
    report = json.loads(capsys.readouterr().out)
    credentials = tmp_path / "credentials"
    credentials.mkdir(mode=0o700)
    os.rename(report["ca_key"], credentials / "ca-key")
    file = toml({"credentials.directory": json.dumps(str(credentials))})
    config = parse(f"{file}\n{report['configuration']}", environ={}, now=time.time())
    assert config.intercept is not None
    assert config.intercept.authority.weaknesses == ()


def test_its_lines_for_a_shell_can_be_used(tmp_path: Path, capsys: Printed) -> None:
    """Also from a folder with a space in its name."""
    folder = tmp_path / "my ca"
    assert made(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    exports = "\n".join(line for line in lines if line.startswith("export "))
    command = f'{exports}\nprintf "%s\\n" "$SSL_CERT_FILE" "$NODE_EXTRA_CA_CERTS" "$NO_PROXY"'
    said = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == [
        str(folder / "bundle.pem"),
        str(folder / "root.pem"),
        "localhost,127.0.0.1",
    ]
    (java,) = [line for line in lines if line.startswith("keytool ")]
    assert shlex.split(java)[-1] == str(folder / "root.pem")


@pytest.mark.skipif(shutil.which("keytool") is None, reason="keytool is not installed")
def test_its_line_for_java_can_be_used(tmp_path: Path, capsys: Printed) -> None:
    """The root stands in the store, beside that of another authority."""
    store = tmp_path / "store"
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert made(folder, "--json") == 0
        words = shlex.split(json.loads(capsys.readouterr().out)["java"])
        at = words.index("-cacerts")
        words[at : at + 1] = ["-keystore", str(store)]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    words = ["keytool", "-list", "-keystore", str(store), "-storepass", "changeit"]
    listed = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert listed.stdout.count("trustedCertEntry") == 2
