"""The certificates of intercepted hosts: made, kept, and renewed before they expire (ADR-0030).

Each host has a leaf of its own, for exactly its name.  Leaves of the hosts that the configuration
names are made with it; those of hosts below a wildcard when the first client asks, on a thread, one
after the other.  A leaf is a context of OpenSSL's with the rules of ``tls.py``, and a connection
keeps the one that it began with.  What is served, and to whom, is not known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from llmproxy.config import Authority, Intercept
from llmproxy.config.host_pattern import HostPatterns
from llmproxy.config.url import host as host_value
from llmproxy.config.values import Wrong, show, show_instant
from llmproxy.server.tls import ServerTls, server_context

LIFETIME_S = 7 * 86400.0
"""Seconds for which a leaf is valid; half of them before it is renewed, half as a reserve."""

BACKDATED_S = 86400.0
"""Seconds by which a client's clock may be behind ours."""

LOOK_S = 3600.0
"""Seconds between two looks at what is to be renewed."""

MOST_BELOW = 2000
"""Leaves that are kept for hosts below wildcards: some 25 KiB each."""

_SILENCE_S = 60.0
"""Seconds between two log lines about leaves that could not be made."""

_LONGEST_CN = 64
"""Characters that a common name has room for (RFC 5280, appendix A.1)."""

_log = Logger()


class NoCertificate(ValueError):
    """There is no certificate for a host; the message says why."""


class Leaf(ServerTls):
    """The TLS of one host.

    Args:
        context: shows the leaf.
        begin, end: from when until when it is valid, in seconds since the epoch.
        renew_at: when the next one is made; never, where that could not last longer.

    Attributes:
        is_asked_for: somebody has asked for it since it was made.
    """

    def __init__(self, context: SSL.Context, begin: float, end: float, renew_at: float) -> None:
        super().__init__(context, end)
        self._begin = begin
        self.renew_at = renew_at
        self.is_asked_for = False

    def is_valid(self, now: float) -> bool:
        """Return whether clients accept it at a time."""
        return self._begin <= now < self.not_after


class _Signer:
    """Signs leaves with one authority, on any thread."""

    def __init__(self, authority: Authority) -> None:
        self.not_after = authority.not_after
        self._chain = x509.load_pem_x509_certificates(authority.chain.pem)
        self._key: Any = load_pem_private_key(authority.key.reveal().encode("ascii"), None)
        hashes_itself = isinstance(self._key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
        self._hash = None if hashes_itself else hashes.SHA256()
        self._issuer = _key_identifier(self._chain[0])

    def sign(self, host: str, now: float) -> Leaf:
        """Make the leaf of a host.

        Raises:
            NoCertificate: the authority has expired, or OpenSSL does not accept what was made.
        """
        begin, end = now - BACKDATED_S, min(now + LIFETIME_S, self.not_after)
        if end <= now:
            raise NoCertificate(
                f"the certificate of `ca_certificate` has expired, at {show_instant(end)}"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(host, key.public_key(), begin, end)
        try:
            context = server_context(certificate, self._chain, key)
        except SSL.Error as error:
            raise NoCertificate(f"OpenSSL refuses it: {error}") from error
        # Nobody resumes a session on a second tunnel: none is kept, here or in a ticket.  On the
        # context the option makes tickets of another kind; within the handshake it sends none.
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_tlsext_servername_callback(_without_ticket)
        is_last = end == self.not_after
        return Leaf(context, begin, end, float("inf") if is_last else now + (end - now) / 2)

    def _certificate(
        self, host: str, public: ec.EllipticCurvePublicKey, begin: float, end: float
    ) -> x509.Certificate:
        # A subject is optional, but where there is none the alternative name must be critical.
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, host)] if _fits(host) else []
        builder = (
            x509.CertificateBuilder(
                issuer_name=self._chain[0].subject,
                subject_name=x509.Name(subject),
                public_key=public,
                serial_number=x509.random_serial_number(),
                not_valid_before=datetime.fromtimestamp(int(begin), UTC),
                not_valid_after=datetime.fromtimestamp(int(end), UTC),
            )
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=not subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_HANDSHAKES, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(self._issuer, critical=False)
        )
        return builder.sign(self._key, self._hash)


def _without_ticket(connection: SSL.Connection) -> None:
    """Send no ticket behind the handshake: two records that no client uses."""
    connection.set_options(SSL.OP_NO_TICKET)


_HANDSHAKES = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


def _fits(host: str) -> bool:
    return len(host) <= _LONGEST_CN


def _key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        found = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]  # a key that signs
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found.value)


class PreparedLeaves:
    """The leaves of one configuration, and what signs further ones.

    Args:
        intercept: what the configuration says.
        signer: signs, with the authority of ``intercept``.
        exact: the leaves of the hosts that it names.
    """

    def __init__(self, intercept: Intercept, signer: _Signer, exact: dict[str, Leaf]) -> None:
        self.intercept = intercept
        self.signer = signer
        self.patterns = HostPatterns(intercept.hosts)
        self.exact = exact
        self.below: OrderedDict[str, Leaf] = OrderedDict()  # the one used last is the last
        self.waiting: dict[str, list[Deferred[Leaf]]] = {}
        self.to_renew: dict[str, None] = {}
        self.making: str | None = None

    def find(self, host: str) -> Leaf | None:
        """Return the leaf of a host that somebody asks for, if there is one."""
        if (leaf := self.exact.get(host)) is None:
            leaf = self.below.get(host)
            if leaf is not None:
                self.below.move_to_end(host)
        if leaf is not None:
            leaf.is_asked_for = True
        return leaf

    def keep(self, host: str, leaf: Leaf) -> None:
        """Keep a new leaf; beyond the bound, the one goes that was used longest ago."""
        self.to_renew.pop(host, None)
        if host in self.exact:
            self.exact[host] = leaf
            return
        self.below[host] = leaf
        if len(self.below) > MOST_BELOW:
            self.below.popitem(last=False)

    def next(self) -> str | None:
        """Return the host whose leaf is made next: first those that somebody waits for."""
        return next(chain(self.waiting, self.to_renew), None)

    def all(self) -> Iterator[Leaf]:
        """Yield all leaves."""
        return chain(self.exact.values(), self.below.values())


class Leaves:
    """The TLS of the hosts that the configuration intercepts.

    Args:
        reactor: keeps time.
        wall: seconds since the epoch.
        aside: calls what takes long on a thread of its own; fires with what came of it.
    """

    def __init__(
        self,
        reactor: Any,
        wall: Callable[[], float],
        *,
        aside: Callable[[Callable[[], Leaf]], Deferred[Leaf]],
    ) -> None:
        self._reactor = reactor
        self._wall = wall
        self._aside = aside
        self._used: PreparedLeaves | None = None
        self._look: Any = None
        self._silent_until = float("-inf")
        self._unreported = 0

    def tls_for(self, host: str) -> Deferred[Leaf]:
        """Return the TLS of a host.

        Args:
            host: a name, as :func:`~llmproxy.config.host_pattern.as_compared` returns it.

        Returns:
            fires with what makes our side of a connection; it may have fired already.  It fails
            with :class:`NoCertificate` where none can be made.  Cancelling it leaves the making to
            others who wait for the same.
        """
        used, now = self._used, self._wall()
        leaf = None if used is None else used.find(host)
        if used is None or not (leaf or (_is_name(host) and used.patterns.match(host))):
            return fail(NoCertificate(f"{show(host)} is no host of [intercept]"))
        if leaf is not None and leaf.is_valid(now):
            if now >= leaf.renew_at:
                used.to_renew[host] = None
                self._make(used)
            return succeed(leaf)
        waits: Deferred[Leaf] = Deferred(partial(_forget, used, host))
        used.waiting.setdefault(host, []).append(waits)
        self._make(used)
        return waits

    def expiries(self) -> dict[str, float]:
        """Return when the authority expires, and the first leaf, in seconds since the epoch."""
        used = self._used
        if used is None:
            return {}
        found = {"intercept_ca": used.signer.not_after}
        ends = [leaf.not_after for leaf in used.all()]
        return {**found, "intercept_leaf": min(ends)} if ends else found

    # -- from one configuration to the next -------------------------------------------------------

    def prepare(self, intercept: Intercept | None) -> PreparedLeaves | None:
        """Make the leaves of the hosts that a configuration names, on any thread.

        Those of the same authority that are not to be renewed yet are taken over.  Nothing that is
        in use notices.

        Raises:
            NoCertificate: the authority has expired, or OpenSSL does not accept it.
        """
        if intercept is None:
            return None
        before, now = self._used, self._wall()
        is_same = before is not None and before.intercept.authority == intercept.authority
        signer = before.signer if before and is_same else _Signer(intercept.authority)
        exact = {}
        for host in intercept.hosts:
            if not host.startswith("*."):
                leaf = before.exact.get(host) if before and is_same else None
                if leaf is None or not leaf.is_valid(now) or now >= leaf.renew_at:
                    leaf = signer.sign(host, now)
                exact[host] = leaf
        return PreparedLeaves(intercept, signer, exact)

    def follow(self, prepared: PreparedLeaves | None) -> None:
        """Use what was prepared; connections keep what they began with."""
        before, self._used = self._used, prepared
        if before is not None and prepared is not None and before.signer is prepared.signer:
            for host, leaf in before.below.items():
                if prepared.patterns.match(host) and host not in prepared.exact:
                    prepared.below[host] = leaf
        if before is not None:
            before.to_renew.clear()
        self._stop_looking()
        if prepared is not None:
            self._look = self._reactor.callLater(LOOK_S, self._look_around)

    def stop(self) -> None:
        """Renew no more."""
        self._stop_looking()

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _look_around(self) -> None:
        """Renew what is due; what nobody has asked for below a wildcard is dropped."""
        self._look = self._reactor.callLater(LOOK_S, self._look_around)
        used, now = self._used, self._wall()
        if used is None:
            return
        due = [host for host, leaf in used.below.items() if _is_due(leaf, now)]
        for host in due:
            if not used.below[host].is_asked_for:
                del used.below[host]
        hosts = [host for host, leaf in used.exact.items() if _is_due(leaf, now)]
        used.to_renew.update(dict.fromkeys([*hosts, *(one for one in due if one in used.below)]))
        self._make(used)

    # -- making, one after the other --------------------------------------------------------------

    def _make(self, used: PreparedLeaves) -> None:
        """Make the next leaf, if none is being made."""
        if used.making is not None or (host := used.next()) is None:
            return
        used.making = host
        done = maybeDeferred(self._aside, partial(used.signer.sign, host, self._wall()))
        done.addCallbacks(partial(self._made, used, host), partial(self._failed, used, host))
        done.addErrback(lambda failure: _log.failure("a leaf", failure))

    def _made(self, used: PreparedLeaves, host: str, leaf: Leaf) -> None:
        used.keep(host, leaf)
        self._done(used, host, lambda waits: waits.callback(leaf))

    def _failed(self, used: PreparedLeaves, host: str, failure: Failure) -> None:
        used.to_renew.pop(host, None)  # until the next look, or until somebody asks
        why = failure.value
        error = why if isinstance(why, NoCertificate) else NoCertificate(type(why).__name__)
        self._report(host, error)
        self._done(used, host, lambda waits: waits.errback(error))

    def _done(
        self, used: PreparedLeaves, host: str, fire: Callable[[Deferred[Leaf]], None]
    ) -> None:
        waiting = used.waiting.pop(host, [])
        used.making = None
        self._make(used)
        for waits in waiting:
            fire(waits)

    def _report(self, host: str, error: NoCertificate) -> None:
        now = self._reactor.seconds()
        if now < self._silent_until:
            self._unreported += 1
            return
        _log.warn(
            "no certificate could be made for {host}{others}: {why}",
            host=host,
            others=f", nor {self._unreported} times before" if self._unreported else "",
            why=str(error),
        )
        self._silent_until, self._unreported = now + _SILENCE_S, 0


def _is_due(leaf: Leaf, now: float) -> bool:
    return now >= leaf.renew_at or not leaf.is_valid(now)


def _is_name(host: str) -> bool:
    """Return whether a leaf may be for ``host``: a wildcard is none."""
    try:
        return host_value(host) == host
    except Wrong:
        return False


def _forget(used: PreparedLeaves, host: str, cancelled: Deferred[Leaf]) -> None:
    waiting = used.waiting.get(host, [])
    waiting[:] = [one for one in waiting if one is not cancelled]
    if not waiting and used.making != host:
        used.waiting.pop(host, None)
