"""Request facts: which models a request names, and whether it asks for a stream.

The facts come from the body (``json_body.py``, ``multipart.py``) and from the target
(``path_model.py``).  The gateway asks for them before a route is chosen.  A body is read only if
its type is a form, JSON, or one that a provider might read as JSON; every other body is opaque.
Where the model decides something, an opaque body is refused (ADR-0016).  Nothing here knows a
client or a route.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from llmproxy.dialects.endpoint import Endpoint
from llmproxy.dialects.json_body import JsonFacts, all_facts, is_json, plain_facts
from llmproxy.dialects.json_spans import BodyError, Span, Steps
from llmproxy.dialects.multipart import multipart_model
from llmproxy.dialects.path_model import path_models, query_models
from llmproxy.http1.headers import is_utf8, media_type
from llmproxy.http1.known import known

_FORM = b"multipart/form-data"
_PERHAPS_JSON = (b"", b"application/x-www-form-urlencoded", b"text/plain")
"""Types that curl and old SDKs give to JSON; Ollama, for example, reads it as JSON nevertheless."""

_NO_FACTS = JsonFacts()
_LISTS = (b"/models", b"/api/tags")
_opens_object = re.compile(rb"[ \t\r\n]*+\{").match
_MOST_BLANK = 65_536

# Callers use a few types, again and again.
_is_json = known(64)(is_json)

Source = Literal["body", "form", "path", "query"]
"""Where a request names the model that routing uses."""


class _Body(msgspec.Struct, frozen=True):
    """What a body says: its model, where that stands, and the facts of JSON."""

    model: str | None = None
    source: Source | None = None
    model_span: Span | None = None
    facts: JsonFacts | None = None


_NOTHING = _Body()


class UnknownBody(BodyError):
    """The type of a body does not surely say how a provider reads it."""


class RequestFacts(msgspec.Struct, frozen=True):
    """What a request asks for.

    Attributes:
        models: every model that the request names; routing uses the first one.
        source: where that one stands, or None if the request names none.
        model_span: where the body names its model, so that it can be replaced.
        json: whether the body was read as JSON.
        facts: what the JSON body says.
        in_query: the query names a model.
    """

    models: tuple[str, ...]
    source: Source | None
    model_span: Span | None
    json: bool
    facts: JsonFacts
    in_query: bool = False

    @property
    def model(self) -> str | None:
        """The model that routing uses, or None if the request names none."""
        return self.models[0] if self.models else None

    def wants_stream(self, row: Endpoint | None) -> bool | None:
        """Return whether the request asks for a stream; None if nothing says so.

        The path says it for some endpoints, for others a body of JSON.

        Args:
            row: the endpoint, or None where it is not known.
        """
        if row is not None and row.streams is not None:
            return row.streams
        if not self.json or self.facts.stream is not None:
            return self.facts.stream
        return row is not None and row.streams_by_default


def usual_request(
    content_type: bytes | None, body: bytes, target: bytes, method: bytes = b"POST"
) -> RequestFacts | None:
    """Return what a usual request asks for, at once: its body is plain JSON, or it has none.

    It does as :func:`read_request`, and returns None for a request that needs that.
    """
    if not body:
        return _facts(_NOTHING, target, method, strict=True)
    if not is_usual_type(content_type):
        return None
    facts = plain_facts(body)
    if facts is None:
        return None
    return _facts(_Body(facts.model, "body", facts.model_span, facts), target, method, strict=True)


def is_usual_type(content_type: bytes | None) -> bool:
    """Return whether a body of this type is read at once where it is plain."""
    return _is_json(content_type) and is_utf8(content_type)


def read_request(
    content_type: bytes | None,
    body: bytes,
    target: bytes,
    method: bytes = b"POST",
    *,
    strict: bool,
) -> Steps[RequestFacts]:
    """Return what a request asks for, in short steps.

    Args:
        content_type: the request's, or None.
        body: all of it, without a Content-Encoding; empty if it cannot be read.
        target: raw path and query.
        method: the request's.
        strict: the model decides something, so that nothing may be left unread.  Otherwise a body
            is left unread that is not what its type says, unless that is JSON; and so is a path.

    Raises:
        UnknownBody: with ``strict``, the type is none that is read, or names a character set.
        BodyError: the body is not what its type says, or could be read in two ways.
    """
    if body and strict and not (is_readable(content_type) and is_utf8(content_type)):
        raise UnknownBody("The type of the body must be JSON or a form here, in UTF-8.")
    try:
        said = yield from _read_body(content_type, body, strict=strict)
    except BodyError:
        if not strict and not _is_json(content_type):
            said = _NOTHING
        elif media_type(content_type) in _PERHAPS_JSON and not _may_be_json(body):
            raise UnknownBody("The body must be JSON or a form here, and say so.") from None
        else:
            raise
    return _facts(said, target, method, strict=strict)


def _read_body(content_type: bytes | None, body: bytes, *, strict: bool) -> Steps[_Body]:
    """Return what a body says, or nothing, if it is none that is read."""
    kind = media_type(content_type)
    if body and kind == _FORM:
        form = yield from multipart_model(content_type or b"", body)
        return _Body(form.model, "form", form.span)
    is_read = _is_json(content_type) or (kind in _PERHAPS_JSON and (strict or _may_be_json(body)))
    if not body or not is_read:
        return _NOTHING
    facts = plain_facts(body) or (yield from all_facts(body, strict=strict))
    if strict and facts.is_misspelt:
        raise BodyError('"model" must be written in lower case.')
    return _Body(facts.model, "body", facts.model_span, facts)


def is_readable(content_type: bytes | None) -> bool:
    """Return whether a body of this type is read for its model."""
    kind = media_type(content_type)
    return _is_json(content_type) or kind == _FORM or kind in _PERHAPS_JSON


def is_held(content_type: bytes | None, model_matters: Callable[[], bool]) -> bool:
    """Return whether a body of this type is held, so that it can be read and sent again.

    Yes, if it is JSON, or if a provider might read it as JSON.  A form is held if its model decides
    something.  Every other body is streamed to the provider.
    """
    if _is_json(content_type):
        return True
    kind = media_type(content_type)
    return model_matters() if kind == _FORM else kind in _PERHAPS_JSON


def is_call(method: bytes) -> bool:
    """Return whether a request may call a model, and does not only read a resource."""
    return method not in (b"GET", b"HEAD")


def reads_list(method: bytes, path: bytes) -> bool:
    """Return whether a request without a body reads a list of models."""
    return not is_call(method) and path.removesuffix(b"/").endswith(_LISTS)


def names_model(target: bytes, method: bytes) -> bool:
    """Return whether a target names a model, or perhaps does.

    Args:
        target: raw path and query.
    """
    try:
        return bool(_facts(_NOTHING, target, method, strict=True).models)
    except BodyError:
        return True


def _may_be_json(body: bytes) -> bool:
    return _opens_object(body, 0, _MOST_BLANK) is not None


def _facts(said: _Body, target: bytes, method: bytes, *, strict: bool) -> RequestFacts:
    """Add what the target names to what the body says."""
    path, _, query = target.partition(b"?")
    named, source, facts = said.model, said.source, said.facts
    try:
        in_path = path_models(path, is_call=is_call(method)).names
        in_query = query_models(query) if query else ()
    except BodyError:
        if strict:
            raise
        in_path = in_query = ()
    models = () if named is None else (named,)
    if named is None:
        source = "path" if in_path else "query" if in_query else None
    if in_path or in_query:
        models = tuple(dict.fromkeys((*models, *in_path, *in_query)))
    is_json = facts is not None
    in_json = facts or _NO_FACTS
    return RequestFacts(models, source, said.model_span, is_json, in_json, bool(in_query))
