"""The embedded demo provider: a provider to put behind the proxy where none is at hand.

A real HTTP server, on loopback and on a port of its own, that the proxy reaches as it reaches any
provider.  It speaks OpenAI, Anthropic, Ollama and Gemini, echoes what it is told at the pace that
the model's name says, and fails on demand.  Here are its resource and site, the configuration of a
proxy in front of it, and the commands with which a person tries both.

It needs no key and records nothing; the prompt cache that it may be given keeps digests.  It may
not know anything of the proxy but the configuration's key names: what it sends must not come from
the code that is to be shown or tested with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast
from urllib.parse import unquote

from twisted.internet.interfaces import IReactorTime
from twisted.web import resource, server

from llmproxy.cli.demo import flow
from llmproxy.cli.demo import response as answering
from llmproxy.cli.demo.anthropic import ANTHROPIC, CountTokens, Messages
from llmproxy.cli.demo.chat import ChatCompletions
from llmproxy.cli.demo.completions import Completions
from llmproxy.cli.demo.dialect import (
    REQUESTS_PER_MINUTE,
    Dialect,
    Document,
    Endpoint,
    Event,
    Fields,
    Streamed,
    json_bytes,
    new_id,
)
from llmproxy.cli.demo.embeddings import Embeddings
from llmproxy.cli.demo.flow import Ending, Flow, Reply, Time
from llmproxy.cli.demo.gemini import GEMINI, GenerateArray
from llmproxy.cli.demo.gemini import CountTokens as CountContents
from llmproxy.cli.demo.gemini import Generate as GenerateContent
from llmproxy.cli.demo.ollama import OLLAMA, Chat, Embed, Generate, OldEmbeddings
from llmproxy.cli.demo.openai import OPENAI
from llmproxy.cli.demo.openai_responses import Responses
from llmproxy.cli.demo.prompt_cache import PromptCache
from llmproxy.cli.demo.reading import model_named
from llmproxy.cli.demo.replay import REPLAYED, Capsule, Replay
from llmproxy.cli.demo.response import Asked, BadAsk, Response

_ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        "/v1/chat/completions": ChatCompletions(),
        "/v1/completions": Completions(),
        "/v1/responses": Responses(),
        "/v1/embeddings": Embeddings(),
        "/v1/messages": Messages(),
        "/v1/messages/count_tokens": CountTokens(),
        "/api/chat": Chat(),
        "/api/generate": Generate(),
        "/api/embed": Embed(),
        "/api/embeddings": OldEmbeddings(),
    }
)
_CONTENT = re.compile(r"/v1(?:beta)?/models/([^/:]+):([A-Za-z]+)")
_VERBS: Mapping[str, Endpoint] = MappingProxyType(
    {
        "generateContent": GenerateContent(),
        "streamGenerateContent": GenerateArray(),
        "streamGenerateContent?alt=sse": GenerateContent(),
        "countTokens": CountContents(),
    }
)
"""Gemini's endpoints, whose paths name the model; two ways to stream are told by the query."""

_KEY_FIELDS = (b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key")
_REDIRECTED = "/redirected"
_REFUSALS: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "demo-429": (429, "Rate limit reached for demo-429. Please try again in 1s."),
        "demo-500": (500, "The demo provider had an error, as this model always does."),
        "demo-503": (503, "The demo provider is overloaded, as this model always is."),
    }
)
_ENDINGS: Mapping[str, Ending] = MappingProxyType(
    {
        "demo-break": flow.end_broken,
        "demo-stall": flow.end_silent,
        "demo-malformed": flow.end_malformed,
        "demo-unfinished": flow.end_properly,
    }
)
_WITHOUT_LENGTH = frozenset({"demo-malformed", "demo-unfinished"})


class _Refused(Exception):
    """The request ends here, with an error of this status."""

    def __init__(self, status: int, bad: BadAsk, fields: Fields = ()) -> None:
        super().__init__(bad.message)
        self.status = status
        self.bad = bad
        self.fields = fields


class DemoProvider(resource.Resource):
    """Four providers in one resource; the path says which one is meant.

    ``POST`` answers at ``/v1/chat/completions``, ``/v1/completions``, ``/v1/responses``,
    ``/v1/embeddings``, ``/v1/messages``, ``/v1/messages/count_tokens``, ``/api/chat``,
    ``/api/generate``, ``/api/embed`` and ``/api/embeddings``, and below ``/v1beta/models`` (or
    ``/v1/models``) at ``NAME:generateContent``, ``NAME:streamGenerateContent`` and
    ``NAME:countTokens``; ``GET /v1/models``, ``/v1/models/NAME``, ``/api/tags``, ``/api/version``,
    ``/v1beta/models`` and ``/v1beta/models/NAME`` tell what there is.  A request with
    ``anthropic-version`` gets Anthropic's lists.  Everything else is a 404 in the dialect of the
    path.

    ``demo-fast`` answers without a pause, ``demo-slow`` with 2 tokens a second, ``demo-Ntps`` with
    N; a whole response takes as long as its stream would.  ``demo-429``, ``demo-500`` and
    ``demo-503`` refuse, ``demo-redirect`` sends a 307; after three chunks (half of a whole
    response) ``demo-break`` resets the connection, ``demo-stall`` falls silent for ever,
    ``demo-malformed`` sends a chunk whose size is no number, and ``demo-unfinished`` ends the
    response as if it were whole.  ``demo-fail`` says three tokens and then the dialect's own error
    event; asked for no stream, it refuses with a 500.  ``demo-replay`` plays a capsule, where the
    provider was given one.

    Ollama's ``POST /api/show`` and ``GET /api/ps`` tell the same of every model, also of those that
    fail: clients look at models before they use one.

    Args:
        reactor: gives the time.
        pace: tokens per second for every model, whatever its name says; None: as the names say.
        cache: remembers prompts; None: counts of cached tokens depend on the request alone.
        capsule: what ``demo-replay`` plays; None: there is no such model.
    """

    isLeaf = True

    def __init__(
        self,
        reactor: IReactorTime,
        *,
        pace: float | None = None,
        cache: PromptCache | None = None,
        capsule: Capsule | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]  # Twisted's has no types
        if pace is not None and pace <= 0:
            raise ValueError(f"pace: tokens per second, above 0, not {pace!r}")
        # Without zope's plugin mypy reads the interface's methods as if they had a self.
        self._time = cast(Time, reactor)
        self._pace = pace
        self._cache = cache
        self._replay = None if capsule is None else Replay(capsule, self._time)

    def render(self, request: server.Request) -> bytes | int:
        """Answer; ``NOT_DONE_YET`` where the response takes its time."""
        reply = cast(Reply, request)
        path = unquote(reply.path.decode("latin-1"))
        dialect = _dialect_of(path, reply)
        try:
            endpoint, given = _endpoint_at(path, reply)
            if reply.method == b"POST" and endpoint is not None:
                return self._serve(reply, endpoint, given)
            if reply.method in (b"GET", b"HEAD"):
                return self._say(reply, dialect, 200, self._listed(path, dialect))
            if reply.method == b"POST" and path == "/api/show":
                return self._say(reply, dialect, 200, self._shown(reply))
            raise _unknown_path(reply.method, path)
        except _Refused as refused:
            return self._refuse(reply, dialect, refused)

    def _serve(self, reply: Reply, endpoint: Endpoint, given: Document) -> bytes | int:
        """One request for a response, in order: read it, refuse it or answer it."""
        ask = self._read_ask(reply, endpoint, given)
        if ask.model == REPLAYED and self._replay is not None:
            head = partial(self._set_head, reply, endpoint.dialect)
            self._replay.begin(reply, endpoint, ask, head)
            return server.NOT_DONE_YET
        if ask.model == "demo-redirect":
            self._set_head(reply, endpoint.dialect, 307)
            reply.setHeader(b"location", _REDIRECTED.encode() + reply.path)
            return b""
        pace = self._pace or answering.tokens_per_second(ask.model)
        response = answering.response(ask, pace, self._cached(reply, ask))
        if response.failure is not None and not ask.stream:
            raise _Refused(500, BadAsk(response.failure))
        self._set_head(reply, endpoint.dialect, 200)
        if ask.stream and isinstance(endpoint, Streamed):
            reply.setHeader(b"content-type", endpoint.stream_type)
            reply.setHeader(b"cache-control", b"no-cache")
            events = endpoint.events(response, ask, self._time.seconds)
            events = flow.cut_short(events) if ask.model in _ENDINGS else events
        else:
            events = self._whole(reply, endpoint, response, ask)
        ending = _ENDINGS.get(ask.model, flow.end_properly)
        Flow(reply, self._time, events, pace, ending).start()
        return server.NOT_DONE_YET

    def _cached(self, reply: Reply, ask: Asked) -> tuple[int, int] | None:
        """How many words of the prompt came out of the cache, and how many went into it."""
        if self._cache is None:
            return None
        return self._cache.use(_account(reply), ask.model, ask.prompt, ask.caches)

    def _whole(
        self, reply: Reply, endpoint: Endpoint, response: Response, ask: Asked
    ) -> Iterator[Event]:
        """A response in one piece, or half of it where the model fails."""
        body = json_bytes(endpoint.document(response, ask, self._time.seconds))
        if ask.model not in _WITHOUT_LENGTH:
            reply.setHeader(b"content-length", b"%d" % len(body))
        sent = body[: len(body) // 2] if ask.model in _ENDINGS else body
        return iter((Event(sent, endpoint.work(response, ask)),))

    def _read_ask(self, reply: Reply, endpoint: Endpoint, given: Document) -> Asked:
        """What a request asks of an endpoint; ``given`` is what its path says.

        Raises:
            _Refused: it cannot be read, or names a model that does not exist or always refuses.
        """
        try:
            ask = endpoint.ask({**_read_object(reply), **given})
        except BadAsk as bad:
            raise _Refused(400, bad) from bad
        if not self._exists(ask.model):
            raise _Refused(404, endpoint.dialect.unknown_model(ask.model))
        if ask.model in _REFUSALS:
            status, message = _REFUSALS[ask.model]
            retry = ((b"retry-after", b"1"),) if status == 429 else ()
            raise _Refused(status, BadAsk(message), retry)
        return ask

    def _listed(self, path: str, dialect: Dialect) -> Document:
        """What a GET shows.

        Raises:
            _Refused: there is nothing at that path.
        """
        if path in ("/v1/models", "/api/tags", "/v1beta/models"):
            return dialect.models()
        if path == "/api/ps":
            return OLLAMA.running()
        if path == "/api/version":
            return {"version": "0.0.0-demo"}
        if path.startswith(("/v1/models/", "/v1beta/models/")):
            name = path.partition("/models/")[2]
            if not self._exists(name):
                raise _Refused(404, dialect.unknown_model(name))
            return dialect.model(name)
        raise _unknown_path(b"GET", path)

    def _shown(self, reply: Reply) -> Document:
        """What Ollama says of the model that the body names.

        Raises:
            _Refused: the body names none, or one that does not exist.
        """
        try:
            name = model_named(_read_object(reply))
        except BadAsk as bad:
            raise _Refused(400, bad) from bad
        if not self._exists(name):
            raise _Refused(404, OLLAMA.unknown_model(name))
        return OLLAMA.shown()

    def _exists(self, model: str) -> bool:
        if model == REPLAYED:
            return self._replay is not None
        return answering.model_exists(model)

    def _say(self, reply: Reply, dialect: Dialect, status: int, document: Document) -> bytes:
        self._set_head(reply, dialect, status)
        return json_bytes(document)

    def _refuse(self, reply: Reply, dialect: Dialect, refused: _Refused) -> bytes:
        request_id = self._set_head(reply, dialect, refused.status)
        for name, value in refused.fields:
            reply.setHeader(name, value)
        return json_bytes(dialect.error(refused.status, refused.bad, request_id))

    def _set_head(self, reply: Reply, dialect: Dialect, status: int) -> str:
        """Status and the fields of every response; returns the id that they carry."""
        request_id = new_id("req_")
        remaining = 0 if status == 429 else REQUESTS_PER_MINUTE - 1
        reply.setResponseCode(status)
        reply.setHeader(b"server", b"llmproxy-demo")
        reply.setHeader(b"content-type", b"application/json")
        for name, value in dialect.fields(request_id, remaining, self._time.seconds):
            reply.setHeader(name, value)
        return request_id


class _SilentSite(server.Site):
    """A site that keeps no access log."""

    noisy = False

    def log(self, request: object) -> None:
        """Nothing: the demo provider records nothing."""


def demo_site(
    reactor: IReactorTime,
    *,
    pace: float | None = None,
    cache: PromptCache | None = None,
    capsule: Capsule | None = None,
) -> server.Site:
    """The demo provider, ready to be given to ``listenTCP`` or to an endpoint.

    Args:
        reactor: gives the time; listening is the caller's.
        pace: tokens per second for every model, whatever its name says; None: as the names say.
        cache: remembers prompts; None: counts of cached tokens depend on the request alone.
        capsule: what the model ``demo-replay`` plays; None: there is no such model.

    Raises:
        ValueError: the pace is not above 0.
    """
    provider = DemoProvider(reactor, pace=pace, cache=cache, capsule=capsule)
    return _SilentSite(provider, reactor=reactor)  # type: ignore[no-untyped-call, unused-ignore]  # Twisted's has no types


def _account(reply: Reply) -> str:
    """The key that a request shows, as each dialect says it; any will do, and so will none."""
    shown = (reply.getHeader(name) for name in _KEY_FIELDS)
    return b"\n".join(value or b"" for value in shown).decode("latin-1")


def _endpoint_at(path: str, reply: Reply) -> tuple[Endpoint | None, Document]:
    """The endpoint at a path, and what the path says in place of the body."""
    called = _CONTENT.fullmatch(path)
    if called is None:
        return _ENDPOINTS.get(path), {}
    name, verb = called.groups()
    is_sse = b"alt=sse" in reply.uri.partition(b"?")[2].split(b"&")
    endpoint = _VERBS.get(f"{verb}?alt=sse" if is_sse else verb, _VERBS.get(verb))
    return endpoint, {"model": name, "stream": verb == "streamGenerateContent"}


def _dialect_of(path: str, reply: Reply) -> Dialect:
    path = path.removeprefix(_REDIRECTED)
    if path in _ENDPOINTS:
        return _ENDPOINTS[path].dialect
    if path.startswith("/v1beta/") or _CONTENT.fullmatch(path):
        return GEMINI
    if path == "/api" or path.startswith("/api/"):
        return OLLAMA
    if path.startswith("/v1/messages/") or reply.getHeader(b"anthropic-version") is not None:
        return ANTHROPIC
    return OPENAI


def _unknown_path(method: bytes, path: str) -> _Refused:
    return _Refused(404, BadAsk(f"Unknown request URL: {method.decode('latin-1')} {path}"))


def _read_object(reply: Reply) -> dict[str, Any]:
    """The body of a request.

    Raises:
        BadAsk: it is not a JSON object.
    """
    try:
        body = json.loads(reply.content.read())
    except (ValueError, RecursionError) as broken:
        raise BadAsk("The request body is not valid JSON.") from broken
    if not isinstance(body, dict):
        raise BadAsk("The request body must be a JSON object.")
    return body
