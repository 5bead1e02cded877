"""The credential that goes to a provider: a file's, or what a command printed last (ADR-0029).

A request asks its candidate's :class:`Credential` for the field to send.  That of a file is settled
when the configuration is read.  A :class:`CommandCredential` runs its command at the start, before
what was printed expires, and after the provider refused it; meanwhile requests go with the last
good output.  :class:`Credentials` has those of all providers, and lasts as long as the process, so
that a reload keeps what was printed.  No output stands in a log, an error or ``repr``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from llmproxy.config import Config, CredentialCommand, Provider, Secret
from llmproxy.errors import ProxyError
from llmproxy.upstream.command import DEADLINE_S, CommandFailed, Run

Field = tuple[bytes, bytes]
"""Name and value of a header field."""

Aside = Callable[[Callable[[], Secret]], Deferred[Secret]]
"""Calls what blocks on a thread of its own; fires with what came of it."""

NO_CREDENTIAL = "credential_unavailable"
"""The reason of the error where a command has printed no credential yet."""

_RENEWED_AT = 0.8
"""The part of its time after which a credential is renewed."""

_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0
"""Seconds until a command that failed runs again; each failure doubles them."""

_LEAST_GAP_S, _MOST_GAP_S = 5.0, 300.0
"""Seconds before a run that a provider's refusals ask for; each such run doubles them, because a
provider may refuse a request for another reason, again and again."""

_log = Logger()


class Credential(Protocol):
    """What a candidate sends as its provider's credential."""

    @property
    def field(self) -> Field:
        """The field to send.

        Raises:
            ProxyError: 503, there is none yet.
        """

    def renew_soon(self, used: Field) -> None:
        """The provider refused ``used``: see whether there is another one."""


class FixedCredential:
    """The credential of a file."""

    __slots__ = ("field",)

    def __init__(self, field: Field) -> None:
        self.field = field

    def renew_soon(self, used: Field) -> None:
        """Do nothing: a file is read at a reload."""


class CommandCredential:
    """The credential that one provider's command prints, as one configuration has it.

    Args:
        provider: has the credential.
        command: prints it.
        credentials: what it belongs to.

    Attributes:
        got_at: when the last good output came, by the monotonic clock.
    """

    def __init__(
        self, provider: Provider, command: CredentialCommand, credentials: Credentials
    ) -> None:
        self.words = command.command
        self.got_at = 0.0
        self._name, self._ttl = provider.name, command.ttl
        self._write = partial(field_of, provider)
        self._all = credentials
        self._secret: Secret | None = None
        self._field: Field | None = None
        self._began_at = 0.0
        self._gap_s = _LEAST_GAP_S
        self._failures = 0
        self._why: CommandFailed | None = None
        self._timer: Any = None
        self._is_running = self._is_over = False

    @property
    def field(self) -> Field:
        """The field to send.

        Raises:
            ProxyError: 503, the command has printed none yet.
        """
        if self._field is None:
            raise ProxyError(
                503,
                NO_CREDENTIAL,
                "The proxy has no credential for the provider at this moment.",
                fields=((b"retry-after", b"1"),),
                detail=f"the command of providers.{self._name}.credential printed none yet",
            )
        return self._field

    @property
    def is_there(self) -> bool:
        """Whether the command has printed one."""
        return self._field is not None

    def renew_soon(self, used: Field) -> None:
        """The provider refused ``used``: run the command, if it did not just run."""
        if used is not self._field or self._is_running or self._is_over:
            return  # another one is there already, or will be soon
        since_s = self._all.clock() - self._began_at
        if since_s > 2 * _MOST_GAP_S:
            self._gap_s = _LEAST_GAP_S
        due_s = max(0.0, self._gap_s - since_s)
        if self._timer is None or self._timer.getTime() > self._all.reactor.seconds() + due_s:
            _log.warn("providers.{name}: the provider refused its credential", name=self._name)
            self._gap_s = min(2 * self._gap_s, _MOST_GAP_S)
            self._run_in(due_s)

    # -- its life, on the reactor's thread --------------------------------------------------------

    def fetch(self) -> None:
        """Run the command before anybody uses what it prints, on any thread."""
        self._began_at = self._all.clock()
        try:
            self._take(self._all.run(self.words), self._all.clock())
        except CommandFailed as error:
            self._why = error

    def begin(self, before: CommandCredential | None) -> None:
        """Renew the credential from now on.

        Args:
            before: what it takes the place of; the output of the same command is taken over.
        """
        kept = None if before is None or before.words != self.words else before._secret
        if self._secret is None and before is not None and kept is not None:
            self._take(kept, before.got_at)
            self._began_at, self._gap_s = before._began_at, before._gap_s
        if self._secret is None and self._why is not None:
            self._failed(self._why)
        else:
            self._run_in(self.got_at + _RENEWED_AT * self._ttl - self._all.clock())

    def end(self) -> None:
        """Run the command no more; requests that are under way go on with what is there."""
        self._is_over = True
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run_in(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self._all.reactor.callLater(max(0.0, seconds), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._run()

    def _run(self) -> None:
        self._stop_timer()
        self._is_running, self._began_at = True, self._all.clock()
        done = self._all.aside(partial(self._all.run, self.words))
        done.addCallbacks(self._succeeded, lambda failure: self._failed(failure.value))
        done.addErrback(lambda failure: _log.failure("a credential's command", failure))

    def _succeeded(self, secret: Secret) -> None:
        self._is_running = False
        if self._is_over:
            return
        if self._failures:
            _log.info("providers.{name}: the credential's command works again", name=self._name)
            self._failures = 0
        before = self._field
        self._take(secret, self._all.clock())
        if before is not None and before != self._field:
            self._all.replaced(self._name, before[1])
        self._run_in(_RENEWED_AT * self._ttl)

    def _failed(self, error: BaseException) -> None:
        self._is_running = False
        if self._is_over:
            return
        self._failures += 1
        self._all.failures[self._name] += 1
        retry_s = min(_FIRST_RETRY_S * 2 ** min(self._failures - 1, 10), _LAST_RETRY_S)
        _log.warn(
            "providers.{name}: the credential's command failed: {why}; {rest}; next try in "
            "{retry_s:.0f} s",
            name=self._name,
            why=str(error) if isinstance(error, CommandFailed) else type(error).__name__,
            rest="its last output stays in use"
            if self.is_there
            else "requests for this provider get a 503",
            retry_s=retry_s,
        )
        self._run_in(retry_s)

    def _take(self, secret: Secret, at: float) -> None:
        """Use what the command printed; the same value stays the same field."""
        self.got_at = at
        if secret != self._secret:
            self._secret, self._field = secret, self._write(secret)


class Credentials:
    """The credentials that commands print, of all providers.

    Args:
        reactor: keeps time.
        clock: monotonic seconds.
        aside: calls what blocks on a thread of its own.
        environ: the environment of commands.
        deadline_s: seconds that a command may take.

    Attributes:
        failures: how often commands failed, by provider.
        replaced: called with a provider's name and the value of a field that is sent no more.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        *,
        aside: Aside,
        environ: Mapping[str, str],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.reactor = reactor
        self.clock = clock
        self.aside = aside
        self.failures: Counter[str] = Counter()
        self.replaced: Callable[[str, bytes], None] = lambda name, value: None
        self._environ = environ
        self._deadline_s = deadline_s
        self._used: Mapping[str, CommandCredential] = {}
        self._runs: set[Run] = set()

    def prepare(self, config: Config) -> dict[str, CommandCredential]:
        """Make those that ``config`` asks for, on any thread.

        Each command that has printed nothing yet runs here, all at once: no request is taken before
        they have ended, well or not.
        """
        made = {
            name: CommandCredential(provider, command, self)
            for name, provider in config.providers.items()
            if isinstance(command := provider.credential, CredentialCommand)
        }
        new = [one for name, one in made.items() if self._is_new(name, one)]
        threads = [threading.Thread(target=one.fetch, daemon=True) for one in new]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return made

    def use(self, made: Mapping[str, CommandCredential]) -> None:
        """Let ``made`` take the place of those that were used."""
        before, self._used = self._used, made
        for one in before.values():
            one.end()
        for name, one in made.items():
            one.begin(before.get(name))

    def stop(self) -> None:
        """Kill the commands that run, and run no more."""
        for one in self._used.values():
            one.end()
        for run in list(self._runs):
            run.kill()

    def ages(self) -> dict[str, float]:
        """Return how many seconds old the credentials are that are there, by provider."""
        now = self.clock()
        return {name: now - one.got_at for name, one in self._used.items() if one.is_there}

    # -- for its credentials ----------------------------------------------------------------------

    def run(self, words: tuple[str, ...]) -> Secret:
        """Run a command on this thread, and return what it printed.

        Raises:
            CommandFailed: it printed no credential.
        """
        run = Run(words, self.clock, self._environ)
        self._runs.add(run)
        try:
            return run(self._deadline_s)
        finally:
            self._runs.discard(run)

    def _is_new(self, name: str, one: CommandCredential) -> bool:
        before = self._used.get(name)
        return before is None or before.words != one.words or not before.is_there


def credential_of(
    provider: Provider, made: Mapping[str, CommandCredential] | None
) -> Credential | None:
    """Return the credential of ``provider``, or None where it gets none of ours.

    Args:
        made: those that commands print; None where no request will be sent.
    """
    secret = provider.credential
    if isinstance(secret, CredentialCommand):
        return None if made is None else made[provider.name]
    return None if secret is None else FixedCredential(field_of(provider, secret))


def field_of(provider: Provider, secret: Secret) -> Field:
    """Return the field that carries a credential of ``provider``."""
    value = provider.format.replace("{}", secret.reveal())
    return provider.header.encode("ascii"), value.encode("latin-1")
