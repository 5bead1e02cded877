"""What this process shares with others now, as the configuration says.

The engine's client is imported only where an engine is configured.  A reload with another engine
leaves the first one, and tells the second what the process holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from OpenSSL import SSL
from twisted.internet.defer import Deferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.ssl import (
    Certificate,
    optionsForClientTLS,
    platformTrust,
    trustRootFromCertificates,
)

from llmproxy.config import Shared
from llmproxy.config.engine_url import EngineUrl
from llmproxy.shared.client_limits import SharedLimits
from llmproxy.shared.places import SharedPlaces
from llmproxy.shared.standing import SharedStanding

_MARK = b"-----BEGIN CERTIFICATE-----"


class State(msgspec.Struct, frozen=True):
    """How it stands with the engine.

    Attributes:
        is_up: it answers.
        processes: how many share it, as it said last.
        calls: how many calls it has answered.
        given_up: how many it has not, in time.
    """

    is_up: bool
    processes: int
    calls: int
    given_up: int


class Sharing:
    """What this process shares with others.

    Args:
        reactor: keeps time, and connects.
        limits: what clients may use.
        standing: what is known of providers.
        places: the places at them.
        name: of this process among those of a machine.
    """

    def __init__(
        self,
        reactor: Any,
        limits: SharedLimits,
        standing: SharedStanding,
        places: SharedPlaces,
        name: str,
    ) -> None:
        self._reactor = reactor
        self._limits = limits
        self._standing = standing
        self._places = places
        self._name = name
        self._settings = Shared()
        self._engine: Any = None

    @property
    def state(self) -> State | None:
        """How it stands, or None where nothing is shared."""
        engine = self._engine
        if engine is None:
            return None
        return State(engine.is_up, engine.processes, engine.calls, engine.given_up)

    def prepare(self, settings: Shared) -> None:
        """See that it can be followed, on any thread.

        Raises:
            OSError: an authority's file cannot be read.
            ValueError: it holds no certificate.
        """
        if settings.url is not None:
            import llmproxy.shared.engine  # noqa: F401 - its first import takes a while

            if settings.url.tls:
                _tls(settings)

    def follow(self, settings: Shared) -> None:
        """Share what ``settings`` say from now on."""
        if settings == self._settings:
            return
        born = "" if self._engine is None else self._engine.born
        self.stop()
        self._settings = settings
        self._limits.is_strict = settings.strict
        if (url := settings.url) is None:
            return
        from llmproxy.shared.engine import Engine

        tls = _tls(settings) if url.tls else None
        self._engine = self._limits.engine = Engine(
            self._reactor,
            lambda: _endpoint(self._reactor, url, tls),
            user=settings.user,
            password=None if settings.credential is None else settings.credential.reveal(),
            database=url.database,
            prefix=settings.prefix,
            name=self._name,
            timeout=settings.timeout,
            tellers=(self._limits, self._standing, self._places),
            born=born,
        )
        self._standing.use(self._engine)
        self._places.use(self._engine, settings.timeout)
        self._engine.start()

    def stop(self) -> Deferred[None]:
        """Share nothing any more; fires when the engine knows, or cannot be told."""
        engine, self._engine, self._limits.engine = self._engine, None, None
        self._standing.use(None)
        self._places.use(None)
        self._settings = Shared()
        return succeed(None) if engine is None else engine.stop()


def _endpoint(reactor: Any, url: EngineUrl, tls: Any) -> Any:
    if url.path:
        return UNIXClientEndpoint(reactor, url.path)
    endpoint = HostnameEndpoint(reactor, url.host, url.port)
    return endpoint if tls is None else wrapClientTLS(tls, endpoint)


def _tls(settings: Shared) -> Any:
    """Return what verifies the engine's certificate.

    txredisapi's own ``ssl_context_factory=True`` takes any.
    """
    trust = platformTrust()
    if settings.ca is not None:
        parts = Path(settings.ca).read_bytes().split(_MARK)[1:]
        trust = trustRootFromCertificates([Certificate.loadPEM(_MARK + part) for part in parts])
    assert settings.url is not None  # noqa: S101 - who calls has looked
    try:
        return optionsForClientTLS(settings.url.host, trustRoot=trust)
    except SSL.Error as error:
        raise ValueError(f"shared.ca: {error}") from error
