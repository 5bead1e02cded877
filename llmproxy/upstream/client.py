"""Sends one request to a provider through treq, and keeps treq from changing it.

treq is how requests are made; what a proxy must not do is switched off here, once, for everybody:
cookies are neither kept nor sent, redirects are forwarded, nothing is buffered, decoded or sent a
second time, and no URL is parsed per request (ADR-0002).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from http.cookiejar import Cookie
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

import msgspec
import treq.client
from hyperlink import EncodedURL
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import Deferred
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer

from llmproxy.config import Config, CredentialCommand, ParentProxy, Provider, Secret, Timeouts
from llmproxy.http1.grammar import Fields
from llmproxy.http1.headers import KEY_FIELDS
from llmproxy.upstream.pool import OutgoingRequest, ProviderPool
from llmproxy.upstream.request_body import HeldBody
from llmproxy.upstream.resolver import Resolver
from llmproxy.upstream.response import Response


class NoCookies(IndexableCookieJar):
    """A jar that neither takes nor gives: callers must not meet each other's cookies."""

    def __iter__(self) -> Iterator[Cookie]:
        """Yield nothing."""
        return iter(())

    def set_cookie(self, cookie: Cookie) -> None:
        """Drop it."""

    def add_cookie_header(self, request: Any) -> None:
        """Add nothing."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Take nothing."""


_NO_COOKIES = NoCookies()


def _lean_request() -> Any:
    """Return treq's ``request()`` with agent and response in the place of their wrappings.

    treq wraps every agent in one that keeps cookies and one that inflates bodies, and the response
    in one that has its cookies; none has anything to do here, and together they cost more than the
    rest of the call.  The code is treq's; only these names mean something else to this copy, and
    treq itself is left as it is.  ``tests/upstream/test_client.py`` fails when treq calls them
    otherwise (ADR-0011).
    """
    unwrapped = {
        "CookieAgent": lambda agent, jar: agent,
        "ContentDecoderAgent": lambda agent, decoders: agent,
        "_Response": lambda response, jar: response,
        "_merge_cookies": lambda jar, cookies: jar,
    }
    request = cast(FunctionType, HTTPClient.request)
    names = {**vars(treq.client), **unwrapped}
    lean = FunctionType(request.__code__, names, request.__name__, request.__defaults__)
    lean.__kwdefaults__ = request.__kwdefaults__
    return lean


class LeanClient(HTTPClient):
    """treq's client of one provider, without what keeps cookies and changes bodies.

    Args:
        pool: the provider's connections.
    """

    request = _lean_request()

    def __init__(self, pool: ProviderPool) -> None:
        super().__init__(cast("Any", pool), _NO_COOKIES)

    def _request_body(self, data: Any, files: Any, json: Any, stacklevel: int) -> tuple[Any, None]:
        """Return the body as it is; treq would find out what type it has."""
        return data, None


class PreparedUrl(EncodedURL):
    """A URL that was parsed and encoded once; treq asks for both on every request."""

    __slots__ = ("_text",)
    _text: str

    def to_uri(self) -> PreparedUrl:
        """Return itself: it is a URI already."""
        return self

    def to_text(self, with_password: bool = False) -> str:
        """Return the text that it was made from."""
        return self._text

    @classmethod
    def prepare(cls, text: str) -> PreparedUrl:
        """Parse ``text``, an absolute URL in ASCII."""
        url = cast("PreparedUrl", cls.from_text(text))
        url._text = text
        return url


_NO_HEADERS = Headers()
"""An outgoing request brings its own; treq would make an empty table for each."""


def _producer(body: bytes | IBodyProducer) -> IBodyProducer | None:
    if isinstance(body, bytes):
        return HeldBody(body) if body else None
    return body


class ConnectionKey(NamedTuple):
    """What the connections to a provider depend on; while all of it stays, so do they.

    Attributes:
        origin: where the provider is reached.
        authority: the certificates in the file that its ``ca`` names.
        credential: how the provider's credential is written, and the credential, or its command.
        pass_credential: the callers' own credentials cross instead.
        pool: idle connections that are kept at most.
        pool_idle: seconds that an idle connection is kept, or None for as long as it lives.
        max_head: most bytes of a response's head.
        direct: connections have the transports of ``net/``; else Twisted's own.
        parent: the proxy through which the provider is reached, with its credential, or None.
    """

    origin: str
    authority: bytes | None
    credential: tuple[str, str, Secret | tuple[str, ...] | None]
    pass_credential: bool
    pool: int
    pool_idle: float | None
    max_head: int
    direct: bool
    parent: ParentProxy | None


class _Reached(msgspec.Struct, frozen=True):
    """A provider as requests are sent to it.

    Attributes:
        key: while it stays the same, the pool stays.
        url: for treq, which wants one.
        pool: the connections.
        client: sends requests on them.
    """

    key: ConnectionKey
    url: PreparedUrl
    pool: ProviderPool
    client: LeanClient


class Upstream:
    """Every provider's connections, as one configuration has them.

    Making one may take long, where authorities are to be loaded, and can be done on any thread.

    Args:
        reactor: connects, resolves and keeps time.
        clock: monotonic seconds.
        config: the providers, and the limits of what they may send.
        timers: keeps the deadlines of requests; the reactor, where it is not given.
        before: what there was so far; a provider of which nothing has changed keeps its pool.

    Raises:
        OSError: an authority's file cannot be read.
    """

    def __init__(
        self,
        reactor: Any,
        clock: Callable[[], float],
        config: Config,
        *,
        timers: Any = None,
        before: Upstream | None = None,
    ) -> None:
        self._reactor = reactor
        self._resolver: Resolver = Resolver(reactor, clock) if before is None else before._resolver
        self._reached: dict[str, _Reached] = {}
        self._retired: WeakKeyDictionary[ProviderPool, str] = WeakKeyDictionary()
        for name, provider in config.providers.items():
            key = connection_key(provider, config)
            kept = None if before is None else before._reached.get(name)
            if kept is None or kept.key != key:
                pool = ProviderPool(
                    reactor,
                    clock,
                    provider,
                    resolver=self._resolver,
                    pool_idle=key.pool_idle,
                    max_head=key.max_head,
                    direct=key.direct,
                    parent=key.parent,
                    timers=timers,
                )
                url = PreparedUrl.prepare(key.origin)
                kept = _Reached(key, url, pool, LeanClient(pool))
            self._reached[name] = kept

    def take_over(self, before: Upstream) -> None:
        """Send the requests from now on; ``before`` ends those that it has begun.

        Its idle connections are closed where they are not ours, too.
        """
        kept = {one.pool for one in self._reached.values()}
        self._retired = before._retired  # counted for as long as a request holds them
        for name, one in before._reached.items():
            if one.pool not in kept:
                one.pool.retire()
                self._retired[one.pool] = name

    def send(
        self,
        provider: Provider,
        method: str,
        target: bytes,
        lines: list[bytes],
        body: bytes | IBodyProducer,
        *,
        credential: bytes,
        timeouts: Timeouts,
        began: Callable[[], None] = lambda: None,
        upgrades: bool = False,
    ) -> Deferred[Response]:
        """Send one request, exactly as it is given.

        Args:
            target: path and query, byte for byte.
            lines: header fields in order, without ``Host`` and framing; one piece may hold several
                lines, and has no line end behind the last one.
            body: the whole body, or what produces it.
            credential: keeps connections of different credentials apart.
            began: called when a byte of the request may leave: the provider may do the work.
            upgrades: the request asks for another protocol, and a 101 is a response to it.

        Returns:
            fires with the :class:`Response` once its whole head is in, its body paused.  Cancelling
            it closes the connection at once, in any phase.  It fails with ``ProxyError``.
        """
        reached = self._reached[provider.name]
        outgoing: Any = OutgoingRequest(
            target, lines, credential, timeouts, began, _producer(body), upgrades
        )
        response: Deferred[Any] = reached.client.request(  # which wraps none here
            method,
            reached.url,
            headers=_NO_HEADERS,
            data=outgoing,
            cookies=_NO_COOKIES,
            allow_redirects=False,
            unbuffered=True,
            reactor=self._reactor,
        )
        return response

    def drop(self, provider: str, credential: bytes) -> None:
        """Keep no connection on which a credential was sent that is sent no more."""
        if (reached := self._reached.get(provider)) is not None:
            reached.pool.drop(credential)

    def counts(self) -> dict[tuple[str, str], int]:
        """Return the connections by (provider, state), those of retired pools included."""
        counts: Counter[tuple[str, str]] = Counter()
        for name, pool in self._pools():
            counts.update({(name, state): count for state, count in pool.counts().items()})
        return dict(counts)

    @property
    def stale_lookups(self) -> int:
        """How often addresses of before were used, because a lookup failed."""
        return self._resolver.stale

    def close(self) -> None:
        """Close every connection."""
        for _, pool in self._pools():
            pool.close()

    def _pools(self) -> list[tuple[str, ProviderPool]]:
        return [
            *((name, one.pool) for name, one in self._reached.items()),
            *((name, pool) for pool, name in self._retired.items()),
        ]


def connection_key(provider: Provider, config: Config) -> ConnectionKey:
    """Return what the connections to ``provider`` depend on.

    Raises:
        OSError: its authority's file cannot be read.
    """
    url, secret = provider.url, provider.credential
    source = secret.command if isinstance(secret, CredentialCommand) else secret
    return ConnectionKey(
        origin=f"{url.scheme}://{url.netloc}/",
        authority=None if provider.ca is None else Path(provider.ca).read_bytes(),
        credential=(provider.header, provider.format, source),
        pass_credential=provider.pass_credential,
        pool=provider.pool,
        pool_idle=provider.timeouts.get("pool_idle", config.timeouts.pool_idle),
        max_head=config.limits.response_head,
        direct=config.proxy.tuned_loop,
        parent=config.parent_proxy_for(provider),
    )


class HasFields(Protocol):
    """A request, as far as it is asked for its own credentials."""

    fields: Fields


def pool_key(
    provider: Provider, credential: tuple[bytes, bytes] | None, request: HasFields
) -> bytes:
    """Return what connections are kept apart by: the credential that goes over them."""
    if provider.pass_credential:
        return b"\n".join(value for name, value in request.fields if name in KEY_FIELDS)
    return b"" if credential is None else credential[1]
