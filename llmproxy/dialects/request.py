"""What a request asks for: which model, and whether a stream.

Puts together what its body says (``dialects/json_body.py``, ``dialects/multipart.py``) and what its
path says. Only types whose content a provider might read as JSON are looked into; every other body
is opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.dialects.json_body import (
    JsonFacts,
    inspect_json,
    is_json,
    path_model,
)
from llmproxy.dialects.json_spans import Span
from llmproxy.dialects.multipart import multipart_model
from llmproxy.http1.headers import media_type

_FORM = b"multipart/form-data"
_PERHAPS_JSON = (b"", b"application/x-www-form-urlencoded", b"text/plain")
"""Types that curl and old SDKs put on JSON; Ollama, for one, reads it as JSON all the same."""

_NO_FACTS = JsonFacts()

# Callers use a few types and paths, again and again.
_is_json = lru_cache(maxsize=64)(is_json)
_path_model = lru_cache(maxsize=256)(path_model)


class RequestFacts(NamedTuple):
    """What a request asks for.

    Attributes:
        models: every model that it names, the one that routing goes by first.
        model_span: where the body's JSON names it, so that it can be overridden.
        json: the body is a JSON object.
    """

    models: tuple[str, ...]
    model_span: Span | None
    json: bool
    facts: JsonFacts

    @property
    def model(self) -> str | None:
        """The model that routing goes by, or None where the request names none."""
        return self.models[0] if self.models else None

    def wants_stream(self, dialect: Dialect, path: bytes) -> bool | None:
        """Tell whether a stream is asked for; None where the body cannot say."""
        if not self.json or self.facts.stream is not None:
            return self.facts.stream
        row = endpoint(dialect, path)
        return row is not None and row.streams_by_default


def read_request(content_type: bytes | None, body: bytes, path: bytes) -> RequestFacts:
    """Return what a request asks for.

    Args:
        content_type: the request's, or None.
        body: all of it, unencoded; empty where it cannot be looked into.
        path: the raw path, without the query.

    Raises:
        BodyError: the body is not what its type says, or says something twice.
    """
    facts, json, named = _NO_FACTS, False, None
    if body and (_is_json(content_type) or _may_be_json(content_type, body)):
        facts, json = inspect_json(body), True
        named = facts.model
    elif body and media_type(content_type) == _FORM:
        named = multipart_model(content_type or b"", body)
    by_path = _path_model(path)
    models = () if named is None else (named,)
    if by_path is not None and by_path != named:
        models = (*models, by_path)
    return RequestFacts(models, facts.model_span, json, facts)


def is_held(content_type: bytes | None, model_matters: Callable[[], bool]) -> bool:
    """Tell whether a body of this type is held, so that it can be looked into and sent again.

    JSON is, and what some providers take for JSON; a form where its model decides something.  Every
    other body streams upwards.
    """
    if _is_json(content_type):
        return True
    kind = media_type(content_type)
    return model_matters() if kind == _FORM else kind in _PERHAPS_JSON


def _may_be_json(content_type: bytes | None, body: bytes) -> bool:
    opens_object = body[:64].lstrip(b" \t\r\n").startswith(b"{")
    return opens_object and media_type(content_type) in _PERHAPS_JSON
