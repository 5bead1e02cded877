"""The embedded demo provider: a provider to put behind the proxy where none is at hand.

A real HTTP server, on loopback and on a port of its own, that the proxy reaches as it reaches any
provider.  It speaks OpenAI, Anthropic and Ollama, echoes what it is told at the pace that the
model's name says, and fails on demand.  Here are its resource and site, the configuration of a
proxy in front of it, and the commands with which a person tries both.

It needs no key and records nothing.  It may not know anything of the proxy but the configuration's
key names: what it sends must not come from the code that is to be shown or tested with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast
from urllib.parse import unquote

from twisted.internet.interfaces import IReactorTime
from twisted.web import resource, server

from llmproxy.cli.demo import answer as answers
from llmproxy.cli.demo import flow
from llmproxy.cli.demo.answer import Ask, BadAsk
from llmproxy.cli.demo.anthropic import Anthropic
from llmproxy.cli.demo.dialect import (
    REQUESTS_PER_MINUTE,
    Dialect,
    Document,
    Event,
    Fields,
    json_bytes,
    new_id,
)
from llmproxy.cli.demo.flow import Ending, Flow, Reply, Time
from llmproxy.cli.demo.ollama import Ollama
from llmproxy.cli.demo.openai import OpenAI

_OPENAI, _ANTHROPIC, _OLLAMA = OpenAI(), Anthropic(), Ollama()
_CHATS: Mapping[str, Dialect] = MappingProxyType(
    {"/v1/chat/completions": _OPENAI, "/v1/messages": _ANTHROPIC, "/api/chat": _OLLAMA}
)
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
    }
)


class _Refused(Exception):
    """The request ends here, with an error of this status."""

    def __init__(self, status: int, bad: BadAsk, fields: Fields = ()) -> None:
        super().__init__(bad.message)
        self.status = status
        self.bad = bad
        self.fields = fields


class DemoProvider(resource.Resource):
    """Three providers in one resource; the path says which one is meant.

    ``POST /v1/chat/completions``, ``POST /v1/messages`` and ``POST /api/chat`` chat; ``GET
    /v1/models``, ``/v1/models/NAME``, ``/api/tags`` and ``/api/version`` tell what there is.  A
    request with ``anthropic-version`` gets Anthropic's lists.  Everything else is a 404 in the
    dialect of the path.

    ``demo-fast`` answers without a pause, ``demo-slow`` with 2 tokens a second, ``demo-Ntps`` with
    N; a whole answer takes as long as its stream would.  ``demo-429``, ``demo-500`` and
    ``demo-503`` refuse, ``demo-redirect`` sends a 307; after three chunks (half of a whole answer)
    ``demo-break`` resets the connection, ``demo-stall`` falls silent for ever, and
    ``demo-malformed`` sends a chunk whose size is no number.

    Args:
        reactor: gives the time.
        pace: tokens per second for every model, whatever its name says; None: as the names say.
    """

    isLeaf = True

    def __init__(self, reactor: IReactorTime, *, pace: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]  # Twisted's has no types
        if pace is not None and pace <= 0:
            raise ValueError(f"pace: tokens per second, above 0, not {pace!r}")
        # Without zope's plugin mypy reads the interface's methods as if they had a self.
        self._time = cast(Time, reactor)
        self._pace = pace

    def render(self, request: server.Request) -> bytes | int:
        """Answer; ``NOT_DONE_YET`` where the answer takes its time."""
        reply = cast(Reply, request)
        path = unquote(reply.path.decode("latin-1"))
        dialect = _dialect_of(path, reply)
        try:
            if reply.method == b"POST" and path in _CHATS:
                return self._chat(reply, dialect)
            if reply.method in (b"GET", b"HEAD"):
                return self._say(reply, dialect, 200, _listed(path, dialect))
            raise _unknown_path(reply.method, path)
        except _Refused as refused:
            return self._refuse(reply, dialect, refused)

    def _chat(self, reply: Reply, dialect: Dialect) -> bytes | int:
        """One chat request, in order: read it, refuse it or answer it."""
        try:
            ask = dialect.ask(_read_object(reply))
        except BadAsk as bad:
            raise _Refused(400, bad) from bad
        if not answers.model_exists(ask.model):
            raise _Refused(404, dialect.unknown_model(ask.model))
        if ask.model in _REFUSALS:
            status, message = _REFUSALS[ask.model]
            retry = ((b"retry-after", b"1"),) if status == 429 else ()
            raise _Refused(status, BadAsk(message), retry)
        if ask.model == "demo-redirect":
            self._set_head(reply, dialect, 307)
            reply.setHeader(b"location", _REDIRECTED.encode() + reply.path)
            return b""
        self._pour(reply, dialect, ask)
        return server.NOT_DONE_YET

    def _pour(self, reply: Reply, dialect: Dialect, ask: Ask) -> None:
        """Begin a response that is written event by event; a whole answer is one event."""
        pace = self._pace or answers.tokens_per_second(ask.model)
        answer = answers.answer(ask, pace)
        ending = _ENDINGS.get(ask.model, flow.end_properly)
        fails = ask.model in _ENDINGS
        self._set_head(reply, dialect, 200)
        if ask.stream:
            reply.setHeader(b"content-type", dialect.stream_type)
            reply.setHeader(b"cache-control", b"no-cache")
            events = dialect.events(answer, ask, self._time.seconds)
            events = flow.cut_short(events) if fails else events
        else:
            body = json_bytes(dialect.document(answer, self._time.seconds))
            if ending is not flow.end_malformed:  # that one needs chunks
                reply.setHeader(b"content-length", b"%d" % len(body))
            sent = body[: len(body) // 2] if fails else body
            events = iter((Event(sent, len(answer.tokens)),))
        Flow(reply, self._time, events, pace, ending).start()

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


def demo_site(reactor: IReactorTime, *, pace: float | None = None) -> server.Site:
    """The demo provider, ready to be given to ``listenTCP`` or to an endpoint.

    Args:
        reactor: gives the time; listening is the caller's.
        pace: tokens per second for every model, whatever its name says; None: as the names say.

    Raises:
        ValueError: the pace is not above 0.
    """
    provider = DemoProvider(reactor, pace=pace)
    return _SilentSite(provider, reactor=reactor)  # type: ignore[no-untyped-call, unused-ignore]  # Twisted's has no types


def _dialect_of(path: str, reply: Reply) -> Dialect:
    path = path.removeprefix(_REDIRECTED)
    if path in _CHATS:
        return _CHATS[path]
    if path == "/api" or path.startswith("/api/"):
        return _OLLAMA
    if path.startswith("/v1/messages/") or reply.getHeader(b"anthropic-version") is not None:
        return _ANTHROPIC
    return _OPENAI


def _listed(path: str, dialect: Dialect) -> Document:
    """What a GET shows.

    Raises:
        _Refused: there is nothing at that path.
    """
    if path in ("/v1/models", "/api/tags"):
        return dialect.models()
    if path == "/api/version":
        return {"version": "0.0.0-demo"}
    if path.startswith("/v1/models/"):
        name = path.removeprefix("/v1/models/")
        if not answers.model_exists(name):
            raise _Refused(404, dialect.unknown_model(name))
        return dialect.model(name)
    raise _unknown_path(b"GET", path)


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
