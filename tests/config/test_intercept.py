"""``[intercept]``: which authorities can be used, for which hosts, and what a mistake says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from llmproxy.config import ConfigError, parse
from llmproxy.config.authority import Chain, check_time, outside
from llmproxy.config.values import Wrong, show_instant
from tests.support.authorities import DAY_S, OpenAuthority, Signed, as_read, limits, signed
from tests.support.configs import accepted, problems_of, toml

KEYS = ("hosts", "ca_certificate", "ca_key")
ROOT = signed(name="root", path_length=3)


@pytest.fixture
def made(tmp_path: Path) -> OpenAuthority:
    """An authority for one host and one domain."""
    return OpenAuthority(tmp_path, "inference.local", "*.corp.example")


def changes(made: OpenAuthority, **intercept: str | None) -> dict[str, str | None]:
    """Return the section over the smallest file, with changes."""
    keys: dict[str, str | None] = {
        "hosts": json.dumps(made.hosts),
        "ca_certificate": json.dumps(str(made.chain)),
        "ca_key": '"ca-key"',
    }
    changed = {f"intercept.{name}": value for name, value in {**keys, **intercept}.items()}
    return {"credentials.directory": json.dumps(str(made.directory)), **changed}


def problem(changed: Mapping[str, str | None], key: str) -> str:
    """Return the one problem of a refused file, which is ``key``'s."""
    (found,) = problems_of(changed)
    assert found.startswith(f"intercept.{key}: "), found
    return found


# --- what is accepted -----------------------------------------------------------------------------


def test_what_the_command_makes_is_accepted(made: OpenAuthority) -> None:
    """Hosts, chain, key and expiry arrive as they stand in the files; nothing is weak."""
    intercept = accepted(changes(made)).intercept
    assert intercept is not None
    assert intercept.hosts == made.hosts
    assert intercept.authority.chain == Chain(str(made.chain), made.made.chain)
    assert intercept.authority.key.reveal().encode() == made.made.key
    assert intercept.authority.not_after == made.made.not_after
    assert intercept.authority.weaknesses == ()


def test_without_the_section_nothing_is_intercepted() -> None:
    """That is so by default."""
    assert accepted({}).intercept is None


@pytest.mark.parametrize("missing", [*([one] for one in KEYS), KEYS[:2], KEYS[1:]])
def test_all_three_keys_come_together(made: OpenAuthority, missing: list[str]) -> None:
    """Each that is missing is reported."""
    assert problems_of(changes(made, **dict.fromkeys(missing))) == tuple(
        f"intercept.{name}: expected this key, but it is missing" for name in missing
    )


def test_an_empty_section_lacks_all_three(made: OpenAuthority) -> None:
    """It would intercept nothing, and so it is no configuration of that."""
    with pytest.raises(ConfigError) as caught:
        parse(toml({}) + "\n[intercept]\n", environ={})
    assert [one.partition(":")[0] for one in caught.value.problems] == [
        f"intercept.{name}" for name in KEYS
    ]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("10.0.0.1", "an address cannot stand here"),
        ("[::1]", "an address cannot stand here"),
        ("inference.local:443", "without a port"),
        ("*", "no pattern stands for all hosts"),
        ("a.*.corp.example", "only at the beginning"),
        ("https://inference.local", "a host's name"),
    ],
)
def test_what_is_no_host(made: OpenAuthority, host: str, words: str) -> None:
    """Clients name no address in the handshake, and a wildcard stands for whole names."""
    assert words in problem(changes(made, hosts=json.dumps([host])), "hosts[0]")


# --- hosts and name constraints -------------------------------------------------------------------

HOSTS = [
    # permitted, excluded, host, whether all of it may be signed for
    (["a.b"], [], "a.b", True),
    (["a.b"], [], "x.a.b", True),
    (["A.B"], [], "x.a.b", True),
    (["a.b"], [], "*.a.b", True),
    (["a.b"], [], "*.x.a.b", True),
    (["a.b", "c"], [], "c", True),
    (["a.b"], [], "b", False),
    (["a.b"], [], "xa.b", False),
    (["a.b"], [], "*.b", False),
    ([".a.b"], [], "x.a.b", True),
    ([".a.b"], [], "*.a.b", True),
    ([".a.b"], [], "a.b", False),
    ([""], [], "anything", True),
    ([], [], "anything", True),
    ([], ["a.b"], "a.b", False),
    ([], ["a.b"], "x.a.b", False),
    ([], ["a.b"], "*.a.b", False),
    ([], ["x.a.b"], "*.a.b", False),
    ([], ["x.y.a.b"], "*.a.b", False),
    ([], [".x.a.b"], "*.a.b", False),
    ([], ["xa.b"], "*.a.b", True),
    ([], ["a.b"], "xa.b", True),
    ([], ["a.b"], "b", True),
    ([], [".a.b"], "a.b", True),
    ([], [""], "a.b", False),
    (["b"], ["a.b"], "x.a.b", False),
    (["b"], ["a.b"], "c.b", True),
]


@pytest.mark.parametrize(("permitted", "excluded", "host", "inside"), HOSTS)
def test_which_hosts_are_inside(
    permitted: list[str], excluded: list[str], host: str, inside: bool
) -> None:
    """A wildcard is inside if all of it is; each certificate of the chain may constrain."""
    bound = signed(ROOT, limits=limits(permitted, excluded) if permitted or excluded else None)
    free = signed(bound)
    for chain in (bound.pem, free.pem + bound.pem):
        assert outside(Chain("", chain), [host]) == ([] if inside else [host])


def test_constraints_of_other_kinds_of_names_do_not_count() -> None:
    """One that permits addresses of mail alone says nothing of hosts (RFC 5280, 4.2.1.10)."""
    mail = x509.NameConstraints([x509.RFC822Name("a.b")], None)
    assert outside(Chain("", signed(ROOT, limits=mail).pem), ["host"]) == []


def test_a_host_outside_wants_a_new_authority(made: OpenAuthority) -> None:
    """Each such host is a problem of its own, and says what helps."""
    hosts = json.dumps(["inference.local", "api.example", "*.example", "x.corp.example"])
    found = problems_of(changes(made, hosts=hosts))
    assert len(found) == 2
    for one, host in zip(found, ("api.example", "*.example"), strict=True):
        assert one.startswith("intercept.hosts: expected hosts inside the name constraints")
        assert f'"{host}" wants a new authority' in one
        assert one.endswith("`llmproxy ca new`")


# --- certificates that cannot sign ----------------------------------------------------------------

INTERMEDIATE = signed(ROOT, name="intermediate")
SERVER = ExtendedKeyUsageOID.SERVER_AUTH

WRONG: dict[str, tuple[Callable[[], tuple[bytes, Signed]], str]] = {
    "the root": (lambda: (ROOT.pem, ROOT), "without the root"),
    "the root behind it": (
        lambda: (INTERMEDIATE.pem + ROOT.pem, INTERMEDIATE),
        "without the root",
    ),
    "no authority": (lambda: _alone(signed(ROOT, ca=False)), "whose key may sign others"),
    "no constraints at all": (lambda: _alone(signed(ROOT, ca=None)), "whose key may sign others"),
    "no usage": (lambda: _alone(signed(ROOT, signs=None)), "whose key may sign others"),
    "another usage": (lambda: _alone(signed(ROOT, signs=False)), "whose key may sign others"),
    "for mail": (
        lambda: _alone(signed(ROOT, purposes=[ExtendedKeyUsageOID.EMAIL_PROTECTION])),
        "an authority for servers",
    ),
    "another's chain": (
        lambda: (INTERMEDIATE.pem + signed(ROOT).pem, INTERMEDIATE),
        "each certificate behind the one that it has issued",
    ),
    "the wrong way round": (
        lambda: (INTERMEDIATE.pem + signed(INTERMEDIATE).pem, INTERMEDIATE),
        "each certificate behind the one that it has issued",
    ),
    "too long": (lambda: _below(signed(ROOT, path_length=0)), "no longer than its certificates"),
    "empty": (lambda: (b"", INTERMEDIATE), "a PEM file of a certificate"),
    "cut": (lambda: (INTERMEDIATE.pem[:-40], INTERMEDIATE), "a PEM file of a certificate"),
    "with its key": (
        lambda: (INTERMEDIATE.pem + INTERMEDIATE.key_pem, INTERMEDIATE),
        "a PEM file of a certificate and its chain, and nothing else",
    ),
    "DER": (
        lambda: (INTERMEDIATE.certificate.public_bytes(Encoding.DER), INTERMEDIATE),
        "a PEM file of a certificate",
    ),
    "an extension that is none": (
        lambda: _alone(signed(ROOT, broken=True)),
        "whose extensions can be read",
    ),
    "too large": (lambda: (b"#" * 1024 * 1024 + INTERMEDIATE.pem, INTERMEDIATE), "at most 1MiB"),
}


def _alone(one: Signed) -> tuple[bytes, Signed]:
    return one.pem, one


def _below(one: Signed) -> tuple[bytes, Signed]:
    last = signed(one)
    return last.pem + one.pem, last


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_cannot_sign(
    made: OpenAuthority, case: tuple[Callable[[], tuple[bytes, Signed]], str]
) -> None:
    """The check finds it, and no client has to; nothing of the file is shown."""
    make, words = case
    chain, of = make()
    made.put(chain, of.key_pem)
    found = problem(changes(made, hosts='["h"]'), "ca_certificate")
    assert words in found
    assert "BEGIN" not in found


RIGHT: dict[str, Callable[[], tuple[bytes, Signed]]] = {
    "alone": lambda: _alone(signed(ROOT)),
    "two": lambda: _below(signed(ROOT, path_length=1)),
    "for servers": lambda: _alone(signed(ROOT, purposes=[SERVER])),
    "RSA": lambda: _alone(signed(ROOT, key=rsa.generate_private_key(65537, 2048))),
    "P-384": lambda: _alone(signed(ROOT, key=ec.generate_private_key(ec.SECP384R1()))),
    "Ed25519": lambda: _alone(signed(ROOT, key=ed25519.Ed25519PrivateKey.generate())),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_what_can_sign(made: OpenAuthority, make: Callable[[], tuple[bytes, Signed]]) -> None:
    """An authority may be a company's own, with any kind of key."""
    chain, of = make()
    made.put(chain, of.key_pem)
    assert accepted(changes(made, hosts='["h"]')).intercept


def test_the_key_is_that_of_the_first_certificate(made: OpenAuthority) -> None:
    """It is not another's, nor that of a certificate further on, nor a weak one."""
    chain, _ = _below(signed(ROOT, name="upper", path_length=1))
    words = "expected the key of the first certificate of `ca_certificate`"
    for key in (INTERMEDIATE.key_pem, ROOT.key_pem):
        made.put(chain, key)
        assert problem(changes(made, hosts='["h"]'), "ca_key").endswith(words)
    made.put(chain, b"no key")
    assert "a private key without a passphrase" in problem(changes(made), "ca_key")
    weak = signed(ROOT, key=rsa.generate_private_key(65537, 1024))  # noqa: S505 - weak on purpose
    made.put(weak.pem, weak.key_pem)
    assert "2048 bits" in problem(changes(made, hosts='["h"]'), "ca_key")


@pytest.mark.parametrize(
    ("begins", "ends", "at", "words"),
    [
        (-1, 5, 6, "has not expired"),
        (-1, 5, 4.9, None),
        (2, 5, 1, "is valid already"),
        (2, 5, 2.1, None),
    ],
)
def test_an_authority_that_is_not_valid_now(
    made: OpenAuthority, begins: float, ends: float, at: float, words: str | None
) -> None:
    """Where the time is known, as it is at a start, at a reload and in a check; it is shown."""
    upper = signed(ROOT, begins=begins, ends=ends, path_length=1)
    for chain, of in (_alone(upper), _below(upper)):
        made.put(chain, of.key_pem)
        file = toml(changes(made, hosts='["h"]'))
        now = time.time() + at * DAY_S
        if words is None:
            assert parse(file, environ={}, now=now).intercept
            continue
        with pytest.raises(ConfigError) as caught:
            parse(file, environ={}, now=now)
        (found,) = caught.value.problems
        assert found.startswith("intercept.ca_certificate: expected a certificate that ")
        assert words in found
        edge = upper.certificate.not_valid_after_utc
        if "expired" in words:
            assert show_instant(edge.timestamp()) in found
        assert parse(file, environ={}).intercept


def test_the_edges_of_its_time() -> None:
    """It is valid from its first second on, and no more in its last (as OpenSSL says)."""
    one = signed(ROOT)
    chain = Chain("", one.pem)
    begin = one.certificate.not_valid_before_utc.timestamp()
    end = one.certificate.not_valid_after_utc.timestamp()
    check_time(chain, begin)
    check_time(chain, end - 1)
    for now in (begin - 1, end):
        with pytest.raises(Wrong):
            check_time(chain, now)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("ca.pem", "an absolute path"),
        ("/nowhere/ca.pem", "that can be read (No such file or directory); `llmproxy ca new`"),
        ("/dev", "a regular file"),
        ("/dev/zero", "a regular file"),
    ],
)
def test_a_file_that_cannot_be_one(made: OpenAuthority, path: str, words: str) -> None:
    """The path is shown; what is no file is not read."""
    assert words in problem(changes(made, ca_certificate=json.dumps(path)), "ca_certificate")


# --- what some clients refuse ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weak", "words"),
    [
        (signed(ROOT), ["no name constraints"]),
        (signed(ROOT, limits=limits(["h"])), []),
        (signed(ROOT, limits=limits(excluded=["h"])), ["no name constraints"]),
        (signed(ROOT, limits=limits(["h"]), identified=False), ["no subject key identifier"]),
        (signed(ROOT, limits=limits(["h"]), names_issuer=False), ["no authority key identifier"]),
        (signed(ROOT, limits=limits(["h"]), critical=False), ["constraints are not critical"]),
    ],
)
def test_weaknesses_are_kept_for_the_check(weak: Signed, words: list[str]) -> None:
    """They are no mistakes: some clients are content, and an operator may know which."""
    found = as_read(weak.pem, weak.key_pem).weaknesses
    assert len(found) == len(words)
    assert all(one in said for one, said in zip(words, found, strict=True))


# --- nothing secret is shown ----------------------------------------------------------------------


def test_nothing_of_the_key_is_shown(made: OpenAuthority) -> None:
    """Neither repr nor the redacted form holds it; where the certificate is may be known."""
    config = accepted(changes(made))
    body = made.made.key.decode().splitlines()[1]
    redacted = config.redacted()
    for shown in (repr(config), json.dumps(redacted)):
        assert body not in shown
    assert redacted["intercept"] == {
        "hosts": list(made.hosts),
        "ca_certificate": str(made.chain),
        "ca_key": True,
        "plain_http": False,
        "handshakes": 1000,
    }
    assert accepted({}).redacted()["intercept"] is None
    with pytest.raises(TypeError, match="Secret"):
        msgspec.json.encode(config)


@pytest.mark.parametrize("which", ["ca_certificate", "ca_key"])
def test_a_key_written_into_the_file_is_not_shown(made: OpenAuthority, which: str) -> None:
    """A key that was pasted where a path or a name belongs stands in no message."""
    pasted = made.made.key.decode()
    found = problem(changes(made, **{which: json.dumps(pasted)}), which)
    assert pasted.splitlines()[1] not in found
    assert "PRIVATE" not in found
