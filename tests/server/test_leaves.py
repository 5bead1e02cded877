"""The certificates of intercepted hosts: what they say, which are kept, how they are renewed."""

from __future__ import annotations

import socket
import ssl
import string
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from pytest_twisted import ensureDeferred
from twisted.internet import reactor as real_reactor
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from twisted.python.failure import Failure

from llmproxy.config import Intercept
from llmproxy.config.host_pattern import host_name_pattern
from llmproxy.ops.reload import aside
from llmproxy.server import leaves as leaves_module
from llmproxy.server.leaves import BACKDATED_S, LIFETIME_S, LOOK_S, Leaf, Leaves, NoCertificate
from tests.support.authorities import DAY_S, OpenAuthority, as_read, limits, signed
from tests.support.keypairs import shown_to
from tests.support.served import Served, ask
from tests.support.sockets import WAIT, Wire, connect

HOST, DOMAIN = "inference.local", "corp.example"
BOTH = (HOST, f"*.{DOMAIN}")


class Aside:
    """Calls what was to be called on a thread, when the test says so.

    Attributes:
        calls: what waits to be called.
        at_once: call it without waiting.
        done: how much was called.
    """

    def __init__(self, *, at_once: bool = True) -> None:
        self.calls: list[tuple[Callable[[], Leaf], Deferred[Leaf]]] = []
        self.at_once = at_once
        self.done = 0

    def __call__(self, call: Callable[[], Leaf]) -> Deferred[Leaf]:
        done: Deferred[Leaf] = Deferred()
        self.calls.append((call, done))
        if self.at_once:
            self.run()
        return done

    def run(self) -> None:
        """Call what waited longest."""
        call, done = self.calls.pop(0)
        self.done += 1
        maybeDeferred(call).chainDeferred(done)


class Kept:
    """Leaves whose clock the test turns.

    Attributes:
        made: the authority.
        now: the time of the wall, in seconds since the epoch.
    """

    def __init__(self, folder: Path, *hosts: str, days: int = 365) -> None:
        self.begin = float(int(time.time()))
        self.jumped = 0.0
        self.clock, self.aside = Clock(), Aside()
        self.made = OpenAuthority(folder, *(hosts or BOTH), now=self.begin, days=days)
        self.leaves = Leaves(self.clock, lambda: self.now, aside=self.aside)
        self.follow(self.made.intercept())

    @property
    def now(self) -> float:
        return self.begin + self.jumped + self.clock.seconds()

    def follow(self, intercept: Intercept | None) -> None:
        """Follow a configuration."""
        self.leaves.follow(self.leaves.prepare(intercept))

    def pass_time(self, seconds: float) -> None:
        """Turn the clock; at each step whatever is due happens."""
        end = self.clock.seconds() + seconds
        while (left := end - self.clock.seconds()) > 0:
            self.clock.advance(min(left, LOOK_S))

    def get(self, host: str) -> Leaf:
        """Return the leaf of a host, which must be there by now."""
        return fired(self.leaves.tls_for(host))

    def refusal(self, host: str) -> str:
        """Return why there is no leaf for a host."""
        return failed(self.leaves.tls_for(host))


def below(kept: Kept) -> list[str]:
    """Return the hosts below wildcards whose leaves are kept, the one used longest ago first."""
    used = kept.leaves._used
    assert used is not None
    return list(used.below)


def fired(deferred: Deferred[Leaf]) -> Leaf:
    """Return what a Deferred has fired with."""
    found: list[Any] = []
    deferred.addBoth(found.append)
    (leaf,) = found
    assert isinstance(leaf, Leaf), leaf
    return leaf


def failed(deferred: Deferred[Leaf]) -> str:
    """Return the message of the NoCertificate that a Deferred has failed with."""
    found: list[Any] = []
    deferred.addBoth(found.append)
    (failure,) = found
    assert isinstance(failure, Failure), failure
    error = failure.check(NoCertificate)
    assert error is NoCertificate, failure
    return failure.getErrorMessage()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """Leaves of one exact host and one domain; nothing is left in the clock behind the test."""
    kept = Kept(tmp_path)
    yield kept
    kept.leaves.stop()
    assert kept.clock.getDelayedCalls() == []


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The lines that were logged meanwhile, each with its level."""
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        lines.append(f"{event['log_level'].name}: {formatEvent(event)}")

    observer = cast(ILogObserver, observe)
    globalLogPublisher.addObserver(observer)
    yield lines
    globalLogPublisher.removeObserver(observer)


def shake(leaf: Leaf) -> list[x509.Certificate]:
    """Shake hands in memory; return the certificates that a client gets."""
    client = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    client.set_connect_state()
    server = leaf.serverConnectionForTLS(None)
    server.set_accept_state()
    for _ in range(3):
        for one, other in ((client, server), (server, client)):
            with suppress(SSL.WantReadError):
                one.do_handshake()
            with suppress(SSL.WantReadError):
                other.bio_write(one.bio_read(65536))
    found = client.get_peer_cert_chain(as_cryptography=True)
    assert found
    return found


def strict(root: bytes) -> ssl.SSLContext:
    """Return a client's context as Python 3.13 makes it."""
    context = ssl.create_default_context(cadata=root.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def verify(leaf: Leaf, root: bytes, host: str) -> None:
    """Shake hands in memory with a strict client.

    Raises:
        ssl.SSLCertVerificationError: the client refuses the certificate.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = strict(root).wrap_bio(to_client, to_server, server_hostname=host)
    server = leaf.serverConnectionForTLS(None)
    server.set_accept_state()
    for _ in range(3):
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            server.bio_write(to_server.read())
            with suppress(SSL.WantReadError):
                server.do_handshake()
            to_client.write(server.bio_read(65536))
        else:
            return
    raise AssertionError("the handshake does not end")


# --- what a leaf says -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", [HOST, f"a.{DOMAIN}", f"a.b.c.{DOMAIN}"])
def test_a_leaf_is_as_strict_clients_want_it(kept: Kept, host: str) -> None:
    """It is for exactly its host, for servers, and for a week; the intermediate is sent along."""
    leaf, *sent = shake(kept.get(host))
    (signing,) = sent
    assert signing == x509.load_pem_x509_certificate(kept.made.made.chain)
    leaf.verify_directly_issued_by(signing)
    found = {type(one.value): one for one in leaf.extensions}
    assert list(found[x509.SubjectAlternativeName].value) == [x509.DNSName(host)]
    assert {kind for kind, one in found.items() if one.critical} == {
        x509.BasicConstraints,
        x509.KeyUsage,
    }
    assert found[x509.BasicConstraints].value == x509.BasicConstraints(False, None)
    assert found[x509.KeyUsage].value == x509.KeyUsage(True, *[False] * 8)
    assert list(found[x509.ExtendedKeyUsage].value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    issuer = signing.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert found[x509.AuthorityKeyIdentifier].value.key_identifier == issuer.digest
    own = x509.SubjectKeyIdentifier.from_public_key(leaf.public_key())
    assert found[x509.SubjectKeyIdentifier].value == own
    assert leaf.not_valid_before_utc.timestamp() == kept.begin - BACKDATED_S
    assert leaf.not_valid_after_utc.timestamp() == kept.begin + LIFETIME_S
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc < timedelta(days=10)
    verify(kept.get(host), kept.made.made.root, host)


def test_no_two_leaves_share_a_number_or_a_key(kept: Kept) -> None:
    """Serial numbers are random: clients refuse two certificates with one number."""
    hosts = [HOST, *(f"{n}.{DOMAIN}" for n in range(50))]
    found = [shake(kept.get(host))[0] for host in hosts]
    assert len({one.serial_number for one in found}) == len(hosts)
    assert len({one.public_key().public_numbers() for one in found}) == len(hosts)  # type: ignore[union-attr]  # it is elliptic
    assert min(one.serial_number.bit_length() for one in found) > 100


def test_a_name_that_is_too_long_for_a_common_name(kept: Kept) -> None:
    """A common name has room for 64 characters; without one the alternative name is critical."""
    for length, has_name in ((64, True), (65, False), (253, False)):
        host = ".".join(["a" * 50] * 5)[: length - len(DOMAIN) - 2] + f"b.{DOMAIN}"
        assert len(host) == length
        leaf = shake(kept.get(host))[0]
        named = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        assert [one.value for one in named] == ([host] if has_name else [])
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.critical is not has_name
        verify(kept.get(host), kept.made.made.root, host)


KEYS: dict[str, Callable[[], Any]] = {
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
def test_authorities_with_other_keys(kept: Kept, make: Callable[[], Any]) -> None:
    """A company's own authority may have any; its chain is sent in its order."""
    root = signed(name="root")
    upper = signed(root, name="upper")
    lower = signed(upper, key=make(), name="lower", limits=limits([HOST]))
    authority = as_read(lower.pem + upper.pem, lower.key_pem)
    kept.follow(Intercept(hosts=(HOST,), authority=authority))
    _, *sent = shake(kept.get(HOST))
    assert sent == [lower.certificate, upper.certificate]
    verify(kept.get(HOST), root.pem, HOST)


def test_an_authority_without_a_key_identifier(kept: Kept) -> None:
    """Its leaves name the key all the same: clients that are not strict are content."""
    root = signed(name="root")
    odd = signed(root, name="odd", identified=False)
    kept.follow(Intercept(hosts=(HOST,), authority=as_read(odd.pem, odd.key_pem)))
    leaf = shake(kept.get(HOST))[0]
    own = x509.AuthorityKeyIdentifier.from_issuer_public_key(odd.key.public_key())
    assert leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value == own
    with pytest.raises(ssl.SSLCertVerificationError, match="Missing Subject Key Identifier"):
        verify(kept.get(HOST), root.pem, HOST)


def test_a_leaf_outside_the_constraints_is_refused(kept: Kept, tmp_path: Path) -> None:
    """Whoever has the signing key cannot make clients believe another host."""
    other = OpenAuthority(tmp_path, "elsewhere.example", now=kept.begin)
    kept.follow(other.intercept(HOST))  # the configuration would have refused it
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        verify(kept.get(HOST), other.made.root, HOST)


LABEL = st.text(string.ascii_lowercase + string.digits + "_-", min_size=1, max_size=63)
NAME = st.lists(LABEL, min_size=1, max_size=20).map(".".join)


def readable(name: str) -> bool:
    """Return whether the configuration takes a name."""
    try:
        return host_name_pattern(name) == name
    except Exception:
        return False


@given(NAME.filter(readable), st.one_of(st.just(""), NAME.filter(readable)))
def test_whatever_host_the_configuration_takes_has_a_leaf_that_clients_accept(
    tmp_path_factory: pytest.TempPathFactory, name: str, below: str
) -> None:
    """Exact or below a wildcard, of any length, with any characters that names have."""
    host = f"{below}.{name}" if below else name
    if len(host) > 253:
        return
    kept = Kept(tmp_path_factory.mktemp("any"), f"*.{name}" if below else name)
    verify(kept.get(host), kept.made.made.root, host)
    kept.leaves.stop()


# --- which are made, and when ---------------------------------------------------------------------


def test_the_leaf_of_an_exact_host_is_there_before_it_is_asked_for(kept: Kept) -> None:
    """It is made with the configuration, and every client gets the same."""
    assert kept.get(HOST) is kept.get(HOST)
    assert kept.aside.done == 0


def test_one_leaf_is_made_for_all_that_ask_at_once(kept: Kept) -> None:
    """It is made beside the reactor; other hosts wait for their turn."""
    kept.aside.at_once = False
    asked = [kept.leaves.tls_for(f"{name}.{DOMAIN}") for name in "ababab"]
    assert len(kept.aside.calls) == 1
    assert not any(one.called for one in asked)
    kept.aside.run()
    assert [one.called for one in asked] == [True, False] * 3
    kept.aside.run()
    first, second = ({id(fired(one)) for one in asked[at::2]} for at in (0, 1))
    assert len(first) == len(second) == 1
    assert kept.aside.calls == []
    assert id(kept.get(f"a.{DOMAIN}")) in first


def test_who_asks_for_many_new_names_keeps_nobody_waiting(kept: Kept) -> None:
    """A leaf that is there is shown at once, however many are to be made; others take turns."""
    exact, old = kept.get(HOST), kept.get(f"old.{DOMAIN}")
    kept.aside.at_once = False
    flood = [kept.leaves.tls_for(f"{number}.{DOMAIN}") for number in range(100)]
    assert (kept.get(HOST), kept.get(f"old.{DOMAIN}")) == (exact, old)
    late = kept.leaves.tls_for(f"late.{DOMAIN}")
    flood += [kept.leaves.tls_for(f"{number}.{DOMAIN}") for number in range(100, 110)]
    while not late.called:
        kept.aside.run()
    assert [one.called for one in flood] == [True] * 100 + [False] * 10
    assert (kept.get(HOST), kept.get(f"old.{DOMAIN}")) == (exact, old)


def test_whoever_waits_may_give_up(kept: Kept) -> None:
    """The others get their leaf; if nobody is left, it is not made."""
    kept.aside.at_once = False
    a, b, c = (kept.leaves.tls_for(f"{name}.{DOMAIN}") for name in "abb")
    lost: list[Failure] = []
    for one in (a, b):
        one.addErrback(lost.append)
        one.cancel()
    assert [bool(one.check(CancelledError)) for one in lost] == [True, True]
    kept.aside.run()
    kept.aside.run()
    assert fired(c).not_after
    d = kept.leaves.tls_for(f"d.{DOMAIN}")
    e = kept.leaves.tls_for(f"e.{DOMAIN}")
    e.addErrback(lost.append)
    e.cancel()
    kept.aside.run()
    assert fired(d).not_after
    assert kept.aside.calls == []


@pytest.mark.parametrize(
    "host",
    [
        "other.example",
        DOMAIN,
        f"*.{DOMAIN}",
        f"a.*.{DOMAIN}",
        f"A.{DOMAIN}",
        f"a..{DOMAIN}",
        f".{DOMAIN}",
        f"a b.{DOMAIN}",
        f"a\n.{DOMAIN}",
        f"ä.{DOMAIN}",
        f"{'a' * 64}.{DOMAIN}",
        f"{'a.' * 200}{DOMAIN}",
        f"-.{DOMAIN}",
        f"a.{DOMAIN}.",
        f"x.{HOST}",
        "",
        "10.0.0.1",
    ],
)
def test_no_leaf_is_made_for_anything_else(kept: Kept, host: str) -> None:
    """Names outside the list, no names at all, and wildcards; a line of a log stays one line."""
    words = kept.refusal(host)
    assert words.endswith("is no host of [intercept]")
    assert "\n" not in words
    assert kept.aside.done == 0


def test_without_a_configuration_there_is_none(kept: Kept) -> None:
    """Nothing is intercepted, and nothing is looked at from time to time."""
    kept.follow(None)
    assert "is no host of [intercept]" in kept.refusal(HOST)
    assert kept.clock.getDelayedCalls() == []
    assert kept.leaves.expiries() == {}


def test_many_more_names_below_a_wildcard_than_are_kept(kept: Kept) -> None:
    """As many are kept as may be; the one that was used longest ago goes first."""
    exact = kept.get(HOST)
    favourite = kept.get(f"favourite.{DOMAIN}")
    count = 5000
    for number in range(count):
        kept.get(f"{number}.{DOMAIN}")
        if number % 1000 == 0:
            assert kept.get(f"favourite.{DOMAIN}") is favourite
    assert kept.aside.done == count + 1
    assert len(below(kept)) == leaves_module.MOST_BELOW == 2000
    assert kept.get(HOST) is exact
    assert kept.get(f"favourite.{DOMAIN}") is favourite
    kept.get(f"{count - 1}.{DOMAIN}")
    kept.get(f"{count - 1999}.{DOMAIN}")
    assert kept.aside.done == count + 1
    kept.get(f"0.{DOMAIN}")
    assert kept.aside.done == count + 2


# --- renewal --------------------------------------------------------------------------------------


def test_there_is_no_gap_in_a_month(kept: Kept) -> None:
    """At every hour each leaf is valid for days to come, and few are made."""
    below = f"a.{DOMAIN}"
    for _ in range(31 * 24):
        for host in (HOST, below):
            leaf = kept.get(host)
            assert leaf.is_valid(kept.now)
            assert leaf.not_after - kept.now >= 3 * DAY_S
        kept.pass_time(LOOK_S)
    assert 2 * 8 <= kept.aside.done <= 2 * 10


def test_an_exact_host_is_renewed_although_nobody_asks(kept: Kept) -> None:
    """So that no client ever waits for its leaf."""
    first = kept.get(HOST)
    kept.pass_time(30 * DAY_S)
    made = kept.aside.done
    second = kept.get(HOST)
    assert second is not first
    assert second.is_valid(kept.now)
    assert kept.aside.done == made == 8


def test_the_old_leaf_is_shown_until_the_new_one_is_there(kept: Kept) -> None:
    """Nobody waits for a renewal, and it happens once."""
    below = f"a.{DOMAIN}"
    for host in (HOST, below):
        old = kept.get(host)
        done = kept.aside.done
        kept.aside.at_once = False
        kept.jumped += LIFETIME_S / 2
        for _ in range(3):
            assert kept.get(host) is old
        assert len(kept.aside.calls) == 1
        kept.aside.run()
        assert kept.aside.done == done + 1
        assert kept.get(host) is not old
        assert kept.aside.calls == []
        kept.aside.at_once = True


def test_what_nobody_asks_for_below_a_wildcard_is_dropped(kept: Kept) -> None:
    """A leaf that was used since it was made is renewed once more."""
    for _ in range(2):
        kept.get(f"a.{DOMAIN}")
    kept.get(f"once.{DOMAIN}")
    kept.pass_time(LIFETIME_S / 2)
    assert below(kept) == [f"a.{DOMAIN}"]
    done = kept.aside.done
    kept.pass_time(LIFETIME_S)
    assert below(kept) == []
    assert kept.aside.done <= done + 3  # those of the exact host
    kept.get(f"a.{DOMAIN}")


@pytest.mark.parametrize("seconds", [LIFETIME_S, 100 * DAY_S, -2 * DAY_S])
def test_the_clock_may_jump(kept: Kept, seconds: float) -> None:
    """A machine that slept, or whose clock was wrong, makes a new leaf before it shows one."""
    kept.aside.at_once = False
    old = kept.get(HOST)
    kept.jumped = seconds
    waits = kept.leaves.tls_for(HOST)
    assert not waits.called
    kept.aside.run()
    leaf = fired(waits)
    assert leaf is not old
    assert leaf.is_valid(kept.now)


def test_waiting_clients_come_before_renewals(kept: Kept) -> None:
    """A host that somebody waits for is made next, however many are due."""
    for number in range(20):
        kept.get(f"{number}.{DOMAIN}")
        kept.get(f"{number}.{DOMAIN}")
    kept.aside.at_once = False
    kept.pass_time(LIFETIME_S / 2)
    waits = kept.leaves.tls_for(f"new.{DOMAIN}")
    assert len(kept.aside.calls) == 1
    kept.aside.run()
    assert not waits.called
    kept.aside.run()
    assert fired(waits).not_after
    while kept.aside.calls:
        kept.aside.run()
    assert kept.aside.done == 20 + 22


# --- an authority that expires, and other failures ------------------------------------------------


def test_no_leaf_outlives_its_authority(tmp_path: Path) -> None:
    """The last leaf ends with it, and is not renewed again and again."""
    kept = Kept(tmp_path, *BOTH, days=10)
    while kept.now + LOOK_S < kept.made.made.not_after:
        kept.pass_time(LOOK_S)
        leaf = kept.get(HOST)
        assert kept.now < leaf.not_after <= kept.made.made.not_after
    assert shake(kept.get(HOST))[0].not_valid_after_utc.timestamp() == kept.made.made.not_after
    assert kept.aside.done == 1
    kept.leaves.stop()


def test_an_authority_that_has_expired_is_told_to_whoever_asks(
    tmp_path: Path, warned: list[str]
) -> None:
    """Once a minute it is in the log, with how often it was in between."""
    kept = Kept(tmp_path, *BOTH, days=10)
    kept.jumped = 10 * DAY_S
    words = "the certificate of `ca_certificate` has expired, at "
    for host in (HOST, f"a.{DOMAIN}", f"b.{DOMAIN}"):
        assert kept.refusal(host).startswith(words)
    (line,) = warned
    assert line.startswith(f"warn: no certificate could be made for {HOST}: {words}")
    kept.clock.advance(59)
    kept.refusal(HOST)
    assert len(warned) == 1
    kept.clock.advance(1)
    kept.refusal(f"c.{DOMAIN}")
    assert len(warned) == 2
    assert f"for c.{DOMAIN}, nor 3 times before: " in warned[1]
    kept.clock.advance(60)
    kept.refusal(HOST)
    assert f"for {HOST}: " in warned[2]
    kept.leaves.stop()


def test_an_expired_authority_cannot_be_prepared(kept: Kept, tmp_path: Path) -> None:
    """The start and a reload fail (``ValueError``), and what is in use stays."""
    old = OpenAuthority(tmp_path, HOST, now=kept.begin - 20 * DAY_S, days=10)
    leaf = kept.get(HOST)
    with pytest.raises(ValueError, match="has expired"):
        kept.leaves.prepare(old.intercept())
    assert kept.get(HOST) is leaf


def test_if_there_is_no_thread_the_old_leaf_stays(kept: Kept, warned: list[str]) -> None:
    """Whoever needs a new one is told; the next who asks makes it."""

    def refuse(call: object) -> Deferred[Leaf]:
        raise RuntimeError("can't start new thread")

    old = kept.get(HOST)
    kept.leaves._aside = refuse
    assert kept.refusal(f"a.{DOMAIN}") == "RuntimeError"
    kept.jumped += LIFETIME_S / 2
    assert kept.get(HOST) is old
    assert warned == [f"warn: no certificate could be made for a.{DOMAIN}: RuntimeError"]
    kept.leaves._aside = kept.aside
    assert kept.get(f"a.{DOMAIN}").not_after
    assert kept.get(HOST) is old
    assert kept.get(HOST) is not old


def test_after_a_failure_the_next_look_tries_again(kept: Kept, tmp_path: Path) -> None:
    """A renewal that failed is not forgotten, although nobody asks."""
    tries: list[int] = []

    def refuse(call: object) -> Deferred[Leaf]:
        tries.append(1)
        raise RuntimeError("can't start new thread")

    old = kept.get(HOST)
    kept.leaves._aside = refuse
    kept.pass_time(LIFETIME_S / 2 + 2 * LOOK_S)
    assert len(tries) == 3
    kept.leaves._aside = kept.aside
    kept.pass_time(LOOK_S)
    assert kept.get(HOST) is not old
    assert kept.aside.done == 1


# --- from one configuration to the next -----------------------------------------------------------


def test_the_same_authority_keeps_its_leaves(kept: Kept) -> None:
    """A reload that changes something else costs nothing."""
    exact, below = kept.get(HOST), kept.get(f"a.{DOMAIN}")
    kept.follow(kept.made.intercept())
    assert (kept.get(HOST), kept.get(f"a.{DOMAIN}")) == (exact, below)
    assert kept.aside.done == 1


def test_what_is_due_is_made_anew_by_a_reload(kept: Kept) -> None:
    """The leaf of an exact host is not taken over at the moment of its renewal."""
    leaf = kept.get(HOST)
    kept.jumped = LIFETIME_S / 2 - 1
    kept.follow(kept.made.intercept())
    assert kept.get(HOST) is leaf
    kept.jumped += 1
    kept.follow(kept.made.intercept())
    assert kept.get(HOST) is not leaf
    assert kept.aside.done == 0


def test_renewals_of_before_are_not_made(kept: Kept, tmp_path: Path) -> None:
    """If the authority changes, its leaves are of use to nobody who comes."""
    for number in range(5):
        kept.get(f"{number}.{DOMAIN}")
        kept.get(f"{number}.{DOMAIN}")
    kept.aside.at_once = False
    kept.jumped = LIFETIME_S / 2
    for number in range(5):
        kept.get(f"{number}.{DOMAIN}")
    kept.follow(OpenAuthority(tmp_path, *BOTH, now=kept.now).intercept())
    assert len(kept.aside.calls) == 1
    kept.aside.run()
    assert kept.aside.calls == []


def test_another_authority_makes_new_leaves(kept: Kept, tmp_path: Path) -> None:
    """Those of before are not shown to anybody who comes later."""
    before = [kept.get(HOST), kept.get(f"a.{DOMAIN}")]
    other = OpenAuthority(tmp_path, *BOTH, now=kept.begin)
    prepared = kept.leaves.prepare(other.intercept())
    assert [kept.get(HOST), kept.get(f"a.{DOMAIN}")] == before
    kept.leaves.follow(prepared)
    for host in (HOST, f"a.{DOMAIN}"):
        assert kept.get(host) not in before
        verify(kept.get(host), other.made.root, host)


def test_what_was_prepared_and_is_not_used_leaves_no_trace(kept: Kept) -> None:
    """A reload may fail behind it: all is as it was."""
    leaf = kept.get(HOST)
    kept.leaves.prepare(None)
    kept.leaves.prepare(kept.made.intercept("elsewhere.example"))
    assert kept.get(HOST) is leaf
    assert "is no host" in kept.refusal("elsewhere.example")
    assert len(kept.clock.getDelayedCalls()) == 1


def test_a_host_that_is_gone_has_none(kept: Kept) -> None:
    """Nor has a domain; what is left keeps its leaves."""
    leaf = kept.get(f"a.{DOMAIN}")
    kept.get(f"b.x.{DOMAIN}")
    kept.follow(kept.made.intercept(f"*.{DOMAIN}"))
    assert "is no host" in kept.refusal(HOST)
    assert kept.get(f"a.{DOMAIN}") is leaf
    assert below(kept) == [f"b.x.{DOMAIN}", f"a.{DOMAIN}"]
    kept.follow(kept.made.intercept(f"*.{DOMAIN}", f"a.{DOMAIN}"))
    assert below(kept) == [f"b.x.{DOMAIN}"]
    kept.get(f"a.x.{DOMAIN}")
    kept.get(f"c.{DOMAIN}")
    kept.follow(kept.made.intercept(f"*.x.{DOMAIN}", HOST))
    assert below(kept) == [f"b.x.{DOMAIN}", f"a.x.{DOMAIN}"]
    assert "is no host" in kept.refusal(f"a.{DOMAIN}")
    assert kept.get(HOST).not_after


def test_a_leaf_that_is_being_made_goes_to_whoever_asked_for_it(kept: Kept, tmp_path: Path) -> None:
    """If the authority changes meanwhile, it goes to nobody else."""
    kept.aside.at_once = False
    host = f"a.{DOMAIN}"
    early = kept.leaves.tls_for(host)
    other = OpenAuthority(tmp_path, *BOTH, now=kept.begin)
    kept.follow(other.intercept())
    late = kept.leaves.tls_for(host)
    assert len(kept.aside.calls) == 2
    kept.aside.run()
    kept.aside.run()
    verify(fired(early), kept.made.made.root, host)
    verify(fired(late), other.made.root, host)


def test_expiries_are_those_of_the_authority_and_the_first_leaf(kept: Kept) -> None:
    """They follow what is shown."""
    ends = {"intercept_ca": kept.made.made.not_after, "intercept_leaf": kept.begin + LIFETIME_S}
    assert kept.leaves.expiries() == ends
    kept.clock.advance(100)
    kept.get(f"a.{DOMAIN}")
    assert kept.leaves.expiries() == ends
    kept.pass_time(LIFETIME_S / 2)
    kept.pass_time(LOOK_S)
    assert kept.leaves.expiries()["intercept_leaf"] > ends["intercept_leaf"]
    kept.follow(kept.made.intercept(f"*.{DOMAIN}"))
    kept.leaves._used.below.clear()  # type: ignore[union-attr]  # there is one
    assert kept.leaves.expiries() == {"intercept_ca": kept.made.made.not_after}


# --- handshakes -----------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["on the socket", "Twisted's layer"])
def direct(request: Any) -> bool:
    """Each kind of transport."""
    return bool(request.param)


@ensureDeferred
async def test_a_client_is_served_on_both_kinds_of_transport(tmp_path: Path, direct: bool) -> None:
    """A leaf takes the place of a listener's certificate; it is made on a real thread."""
    made = OpenAuthority(tmp_path, "*.localhost")
    leaves = Leaves(Clock(), time.time, aside=lambda call: aside(real_reactor, call))
    leaves.follow(leaves.prepare(made.intercept()))
    leaf = await leaves.tls_for("a.localhost")
    leaves.stop()

    def client(protocols: list[str], version: ssl.TLSVersion) -> tuple[str | None, bytes, bytes]:
        context = strict(made.made.root)
        context.minimum_version = context.maximum_version = version
        if protocols:
            context.set_alpn_protocols(protocols)
        plain = connect(served.port)
        secure = context.wrap_socket(plain.sock, server_hostname="a.localhost")
        with Wire(secure) as wire:
            return secure.selected_alpn_protocol(), ask(wire), shown_to(wire) or b""

    async with Served(tls=leaf, direct=direct) as served:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for offered, chosen in (
                ([], None),
                (["http/1.1"], "http/1.1"),
                (["h2", "http/1.1"], "http/1.1"),
            ):
                alpn, response, der = await served.run(client, offered, version)
                assert (alpn, response) == (chosen, b"127.0.0.1")
                assert x509.load_der_x509_certificate(der) == shake(leaf)[0]
            with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
                await served.run(client, ["h2"], version)


@ensureDeferred
async def test_no_session_is_resumed(tmp_path: Path, direct: bool) -> None:
    """Nobody does that on a second tunnel; so nothing is kept of a session, in no version."""
    made = OpenAuthority(tmp_path, "localhost")
    leaves = Leaves(Clock(), time.time, aside=Aside())
    leaves.follow(leaves.prepare(made.intercept()))
    leaf = fired(leaves.tls_for("localhost"))
    leaves.stop()
    assert leaf._context.get_session_cache_mode() == SSL.SESS_CACHE_OFF

    def visit(context: ssl.SSLContext, session: ssl.SSLSession | None) -> Any:
        with socket.create_connection(("127.0.0.1", served.port), WAIT) as sock:
            secure = context.wrap_socket(sock, server_hostname="localhost", session=session)
            with secure:
                secure.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert secure.recv(65536).startswith(b"HTTP/1.1 200 OK")
                return secure.session, secure.session_reused

    async with Served(tls=leaf, direct=direct) as served:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = strict(made.made.root)
            context.minimum_version = context.maximum_version = version
            session, reused = await served.run(visit, context, None)
            assert not reused
            _, reused = await served.run(visit, context, session)
            assert not reused


@ensureDeferred
async def test_a_running_connection_keeps_its_leaf(tmp_path: Path) -> None:
    """A renewal, and another authority, are for those who come later."""
    kept = Kept(tmp_path, "localhost")
    first = kept.get("localhost")

    async with Served(tls=first) as served:
        context = strict(kept.made.made.root)
        with await served.run(connect, served.port, tls=context) as wire:
            other = OpenAuthority(tmp_path, "localhost")
            kept.follow(other.intercept())
            assert kept.get("localhost") is not first
            assert await served.run(ask, wire) == b"127.0.0.1"
    kept.leaves.stop()
