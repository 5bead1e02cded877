"""What a JSON body says to the proxy: the model that it names, and whether it asks for a stream.

These are pure functions over the bytes of a body.  ``request.py`` calls them before a route is
chosen.  Nothing here does I/O, or knows a client, a route or a provider; nothing decodes a body and
encodes it again.

Theory of operation: the one danger is that the provider reads another model than the proxy did.  So
a body that two readers could read differently is a :class:`BodyError`; a body that is accepted can
be read in one way only (ADR-0016).  A usual body takes one pass of C code, which is short as the
body is.  Every other body is read in bounded steps (``json_spans.py``), whatever its size or shape.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

import msgspec

from llmproxy.dialects.json_spans import (
    DEPTH,
    BodyError,
    Span,
    Steps,
    finish,
    member_spans,
)
from llmproxy.http1.headers import media_type

MODEL_BYTES: Final = 1024  # a model's name, as UTF-8
OTHER_MODELS: Final = (
    *("models", "fallbacks", "context_window_fallbacks", "content_policy_fallbacks"),
)
"""Members by which gateways take another model than ``model`` (OpenRouter, LiteLLM, Bifrost)."""

_SLICE: Final = 65_536  # bytes decoded at once to check UTF-8: text can take four times its memory
_SHORT: Final = 262_144  # bytes of a body that may take the short path: two milliseconds at most
_MODEL_JSON_BYTES: Final = 6 * MODEL_BYTES + 2  # quotes, and each byte as an escape
_NAMES = re.compile(
    rb'"(?:[Mm](?i:odels?)|[Ss](?i:tream)|[Ff](?i:allbacks)'
    rb'|[Cc](?i:on(?:text_window|tent_policy)_fallbacks))"'
)
"""``model``, ``stream`` and :data:`OTHER_MODELS`, in any case; first letters make it quick."""

_USUAL_NAMES: Final = frozenset(
    ((), (b'"model"',), (b'"stream"',), (b'"model"', b'"stream"'), (b'"stream"', b'"model"'))
)
_MODEL_NAME = re.compile(rb'"model"\s*+:\s*+')
_FLAGS: Final = {b"true": True, b"false": False, b"null": None}
_FOLDING = re.compile(rb"\xc5\xbf|\xef\xac")  # the long s, and ligatures that fold to an s
_JSON = re.compile(rb"application/(?:[!#$%&'*+\-.^_`|~0-9a-z]+\+)?json")


class JsonFacts(msgspec.Struct, frozen=True):
    """What the top-level members of a JSON body say.  Null counts as absent, but has a span.

    ``is_misspelt``: ``model`` stands there in another case alone, which some readers take for it.
    """

    model: str | None = None
    model_span: Span | None = None
    stream: bool | None = None
    is_misspelt: bool = False


class _Asked(msgspec.Struct):
    """The two members as they stand in a body."""

    model: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()


_decode_asked = msgspec.json.Decoder(_Asked).decode
_decode_name = msgspec.json.Decoder(str | None).decode


def inspect_json(body: bytes) -> JsonFacts:
    """Check a whole JSON body (RFC 8259), and return what it asks for.

    Names are compared after unescaping.  An empty body and a top that is no object name nothing.
    Half a surrogate pair as an escape, which the grammar allows (section 8.2), is refused in
    ``model`` only.

    Raises:
        BodyError: it is not JSON; it is not UTF-8, or begins with a byte order mark (section 8.1);
            it has more than ``DEPTH`` levels, or nests in too many places (``ROUNDS``); two of its
            top-level members are named ``model`` or ``stream``, in any case (Go's encoding/json
            takes them for one);
            ``model`` is neither a string nor null, or is longer than ``MODEL_BYTES``; ``stream`` is
            neither a boolean nor null.
    """
    if not body:
        return JsonFacts()
    facts = plain_facts(body)
    return finish(all_facts(body)) if facts is None else facts


def plain_facts(body: bytes) -> JsonFacts | None:
    """Return the facts of a usual body in one pass of C code; None where it must be read in steps.

    Without escapes of letters, and without the characters beyond ASCII that fold to a letter in
    it, a name has one spelling.  If that stands in the body at most once, in any case and at any
    depth, it does not stand at the top twice.  A body with one of ``OTHER_MODELS`` is not usual.
    """
    if len(body) > _SHORT or body.find(b"\\u0") >= 0:  # `in` would raise and drop a TypeError
        return None
    is_ascii = body.isascii()
    if not is_ascii and _FOLDING.search(body):
        return None
    if tuple(_NAMES.findall(body)) not in _USUAL_NAMES or _openings(body) > DEPTH:
        return None
    try:
        if not is_ascii:
            body.decode()
        asked = _decode_asked(body)
        raw = bytes(asked.model)
        name = _decode_name(raw) if raw else None
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None
    flag = bytes(asked.stream)
    if flag and flag not in _FLAGS:
        return None
    span = None
    if raw:
        match = _MODEL_NAME.search(body)
        if match is None:
            return None
        start = match.end()
        span = tuple.__new__(Span, (start, start + len(raw)))  # half of what Span() takes
    known = name
    if name is not None and not (name.isascii() and len(name) <= MODEL_BYTES):
        known = model_text(name.encode())
    return JsonFacts(known, span, _FLAGS[flag] if flag else None)


def all_facts(body: bytes, *, strict: bool = False) -> Steps[JsonFacts]:
    """Do as :func:`inspect_json`, in steps, for a body of any size and shape that is not empty.

    Args:
        strict: the body may name no models in ``OTHER_MODELS``.
    """
    yield from _check_text(body)
    spans = yield from member_spans(body, ("model", "stream", *(OTHER_MODELS if strict else ())))
    for member, span in spans.items():
        if member.casefold() in OTHER_MODELS and body[slice(*span)] not in (b"null", b"[]"):
            raise BodyError(
                'Beside "model", the body names further models, which is not taken here.'
            )
    model, stream = spans.get("model"), spans.get("stream")
    flag = body[slice(*stream)] if stream else b"null"
    if flag not in _FLAGS:
        raise BodyError('"stream" must be true or false.')
    if model and model.end - model.start > _MODEL_JSON_BYTES:
        raise _too_long()
    try:
        name = msgspec.json.decode(body[slice(*model)], type=str | None) if model else None
    except msgspec.DecodeError:
        raise BodyError('"model" must be a string, and of whole characters.') from None
    known = None if name is None else model_text(name.encode())
    other = not model and any(spelling.casefold() == "model" for spelling in spans)
    return JsonFacts(known, model, _FLAGS[flag], other)


def is_json(content_type: bytes | None) -> bool:
    """Return whether a type is ``application/json`` or ``application/*+json`` (RFC 6839, 3.1)."""
    return bool(_JSON.fullmatch(media_type(content_type)))


def _check_text(body: bytes) -> Steps[None]:
    """Raise BodyError unless this is UTF-8 without a byte order mark."""
    if body.startswith(codecs.BOM_UTF8):
        raise BodyError("The body begins with a byte order mark; JSON has none.")
    view, at = memoryview(b"" if body.isascii() else body), 0
    try:
        while at < len(view):
            piece = view[at : at + _SLICE]
            at += codecs.utf_8_decode(piece, "strict", len(piece) < _SLICE)[1]
            yield
    except UnicodeDecodeError:
        raise BodyError("The body is not UTF-8.") from None


def _openings(body: bytes) -> int:
    """Count the opening brackets; ``replace`` finds them faster than ``bytes.count`` does."""
    return 2 * len(body) - len(body.replace(b"[", b"")) - len(body.replace(b"{", b""))


def _too_long() -> BodyError:
    return BodyError(f'"model" is longer than {MODEL_BYTES} bytes.')


def model_text(name: bytes) -> str:
    """Return a model's name as text.

    Raises:
        BodyError: the name is longer than ``MODEL_BYTES``, or not UTF-8.
    """
    if len(name) > MODEL_BYTES:
        raise _too_long()
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise BodyError('"model" is not UTF-8.') from None
