"""Sends one request to a provider through treq, and keeps treq from changing it.

treq is how requests are made; what a proxy must not do is switched off here, once, for everybody:
cookies are neither kept nor sent, redirects are handed on, nothing is buffered, decoded or sent a
second time, and no URL is parsed per request (ADR-0002).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.cookiejar import Cookie
from types import FunctionType
from typing import Any, cast

import treq.client
from hyperlink import EncodedURL
from treq.client import HTTPClient
from treq.cookies import IndexableCookieJar
from twisted.internet.defer import Deferred
from twisted.web.http_headers import Headers
from twisted.web.iweb import IBodyProducer

from llmproxy.config import Config, Provider, Timeouts
from llmproxy.headers import KEY_FIELDS
from llmproxy.upstream.agent import Order, ProviderAgent
from llmproxy.upstream.answer import Answer
from llmproxy.upstream.body import HeldBody
from llmproxy.upstream.names import Names
from llmproxy.wire.grammar import Fields


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
    """Return treq's ``request()`` with the agent that it is given in the place of two wrappings.

    treq wraps every agent in one that keeps cookies and one that inflates bodies; neither has
    anything to do here, and together they cost more than the rest of the call.  The code is treq's;
    only the two names mean something else to this copy, and treq itself is left as it is.
    ``tests/upstream/test_client.py`` fails when treq calls them otherwise (ADR-0011).
    """
    unwrapped = {
        "CookieAgent": lambda agent, jar: agent,
        "ContentDecoderAgent": lambda agent, decoders: agent,
    }
    request = cast(FunctionType, HTTPClient.request)
    names = {**vars(treq.client), **unwrapped}
    lean = FunctionType(request.__code__, names, request.__name__, request.__defaults__)
    lean.__kwdefaults__ = request.__kwdefaults__
    return lean


class LeanClient(HTTPClient):
    """treq's client, without the agents that keep cookies and change bodies."""

    request = _lean_request()


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
"""An order brings its own; treq would make an empty table for each."""


def _as_it_is(body: Any) -> Any:
    return body


def _producer(body: bytes | IBodyProducer) -> IBodyProducer | None:
    if isinstance(body, bytes):
        return HeldBody(body) if body else None
    return body


class Upstream:
    """Every provider's connections.

    Args:
        reactor: connects, resolves and keeps time.
        clock: monotonic seconds.
        config: the providers, and the limits of what they may send.
        timers: keeps the deadlines of requests; the reactor, where it is not given.
    """

    def __init__(
        self, reactor: Any, clock: Callable[[], float], config: Config, *, timers: Any = None
    ) -> None:
        self._reactor = reactor
        names = Names(reactor, clock)
        self._agents: dict[str, ProviderAgent] = {}
        self._urls: dict[str, PreparedUrl] = {}
        for provider in config.providers.values():
            self._agents[provider.name] = ProviderAgent(
                reactor,
                clock,
                provider,
                names=names,
                pool_idle=provider.timeouts.get("pool_idle", config.timeouts.pool_idle),
                max_head=config.limits.response_head,
                direct=config.proxy.tuned_loop,
                timers=timers,
            )
            url = provider.url
            self._urls[provider.name] = PreparedUrl.prepare(f"{url.scheme}://{url.netloc}/")

    def send(
        self,
        provider: Provider,
        method: str,
        target: bytes,
        fields: Fields,
        body: bytes | IBodyProducer,
        *,
        credential: bytes,
        timeouts: Timeouts,
    ) -> Deferred[Answer]:
        """Send one request, exactly as it is given.

        Args:
            target: path and query, byte for byte.
            fields: header fields in order, without ``Host`` and framing.
            body: the whole body, or what produces it.
            credential: keeps connections of different credentials apart.

        Returns:
            fires with the :class:`Answer` once its whole head is in, its body paused.  Cancelling
            it closes the connection at once, in any phase.  It fails with ``ProxyError``.
        """
        order = Order(self._agents[provider.name], target, fields, credential, timeouts)
        client = LeanClient(order, _NO_COOKIES, _as_it_is)
        answer: Deferred[Any] = client.request(
            method,
            self._urls[provider.name],
            headers=_NO_HEADERS,
            data=_producer(body),
            cookies=_NO_COOKIES,
            allow_redirects=False,
            unbuffered=True,
            reactor=self._reactor,
        )
        return answer.addCallback(lambda response: response.original)

    def counts(self) -> dict[tuple[str, str], int]:
        """Return the connections by (provider, state)."""
        return {
            (name, state): count
            for name, agent in self._agents.items()
            for state, count in agent.counts().items()
        }

    def close(self) -> None:
        """Close every connection."""
        for agent in self._agents.values():
            agent.close()


def credential_field(provider: Provider) -> tuple[bytes, bytes] | None:
    """Return the field that carries the provider's credential."""
    if provider.credential is None:
        return None
    value = provider.format.replace("{}", provider.credential.reveal())
    return provider.header.encode("ascii"), value.encode("latin-1")


def pool_key(provider: Provider, credential: tuple[bytes, bytes] | None, fields: Fields) -> bytes:
    """Return what connections are kept apart by: the credential that goes over them."""
    if provider.pass_credential:
        return b"\n".join(value for name, value in fields if name in KEY_FIELDS)
    return b"" if credential is None else credential[1]
