"""What routing needs to know of a request: the model it names, and whether it asks for a stream.

Here live pure functions over the bytes of a body (or a path), between the front and `routes.py`.
Nothing here does I/O, knows a client, a route or a provider, or decodes and encodes a body anew.

Theory of operation: the one danger is that the provider reads another model than we did. So what
two readers could read differently is a `BodyError`; what is accepted has one reading. No Python
code runs per byte, token or bracket: C code checks JSON (`members.py`). Nesting is bounded, and
every pass is linear. Usual bodies take a short way, which leaves to the long one whatever is not
plain.
"""

from __future__ import annotations

import codecs
import re
from itertools import accumulate, pairwise
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec

from llmproxy.dialects.json_spans import BodyError, Span, member_spans
from llmproxy.http1.headers import media_type

DEPTH: Final = 512  # arrays and objects in each other; CPython's own json gives up near 1000
MODEL_BYTES: Final = 1024  # a model's name, as UTF-8

_SLICE: Final = 65_536  # bytes decoded at once to check UTF-8: text can take four times its memory
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: in is 1, out is -1
_NOT_MARKS: Final = bytes(set(range(256)) - set(b'[]{}"'))
_SHORT: Final = 262_144  # bytes of a body that may take the short way; fewer than hold MEMBERS
_MODEL_NAME = re.compile(rb'"model"\s*+:\s*+')
_FLAGS: Final = {b"true": True, b"false": False, b"null": None}
_MODEL_VERB = re.compile(rb"([^:]+):[A-Za-z]+")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_JSON = re.compile(rb"application/(?:.+\+)?json")


class JsonFacts(NamedTuple):
    """What the top-level members of a JSON body say; null counts as absent, but has a span."""

    model: str | None = None
    model_span: Span | None = None
    stream: bool | None = None


class _Asked(msgspec.Struct):
    """The two members, as they stand in a body."""

    model: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()


_decode_asked = msgspec.json.Decoder(_Asked).decode
_decode_name = msgspec.json.Decoder(str | None).decode


def inspect_json(body: bytes) -> JsonFacts:
    """Say what a whole JSON body (RFC 8259) asks for, having checked all of it.

    Names are compared after unescaping. An empty body, and a top that is no object, name nothing.
    Half a surrogate pair as an escape (grammatical, section 8.2) is refused in `model` only.

    Raises:
        BodyError: not JSON; not UTF-8, or a byte order mark before it (section 8.1); more than
            `DEPTH` levels or `MEMBERS` top-level members; two of these named `model` or `stream`,
            in any case (Go's encoding/json takes them for one); a `model` not string or null, or
            longer than `MODEL_BYTES`; a `stream` not boolean or null.
    """
    if not body:
        return JsonFacts()
    facts = _plain_facts(body)
    return _all_facts(body) if facts is None else facts


def _plain_facts(body: bytes) -> JsonFacts | None:
    """Return the facts of a body in which nothing can stand twice, or None for the long way.

    In ASCII without escapes of letters a name is spelt in one way; one that stands there once at
    most, in any case and at any depth, is not at the top twice.
    """
    if len(body) > _SHORT or not body.isascii() or b"\\u0" in body:
        return None
    folded = body.lower()
    if folded.count(b'"model"') > 1 or folded.count(b'"stream"') > 1:
        return None
    if _openings(body) > DEPTH:
        return None
    try:
        asked = _decode_asked(body)
        raw = bytes(asked.model)
        name = _decode_name(raw) if raw else None
    except (msgspec.DecodeError, RecursionError):
        return None
    flag = bytes(asked.stream)
    if flag and flag not in _FLAGS:
        return None
    span = None
    if raw:
        match = _MODEL_NAME.search(body)
        if match is None:
            return None
        span = Span(match.end(), match.end() + len(raw))
    known = None if name is None else model_text(name.encode())
    return JsonFacts(known, span, _FLAGS[flag] if flag else None)


def _all_facts(body: bytes) -> JsonFacts:
    _check_text(body)
    spans = member_spans(body, ("model", "stream"))
    if _openings(body) > DEPTH and _depth(body) > DEPTH:
        raise BodyError(f"The body has more than {DEPTH} arrays and objects in each other.")
    model, stream = spans.get("model"), spans.get("stream")
    flag = body[slice(*stream)] if stream else b"null"
    if flag not in _FLAGS:
        raise BodyError('"stream" must be true or false.')
    try:
        name = msgspec.json.decode(body[slice(*model)], type=str | None) if model else None
    except msgspec.DecodeError:
        raise BodyError('"model" must be a string, and of whole characters.') from None
    known = None if name is None else model_text(name.encode())
    return JsonFacts(known, model, _FLAGS[flag])


def replace_model(body: bytes, span: Span, model: str) -> bytes:
    """Return the body with `model` as a JSON string at `span`, which is its `model_span`.

    Nothing inserts one: an override changes the bytes of that value alone, and so none without it.
    """
    view = memoryview(body)
    return b"".join((view[: span.start], msgspec.json.encode(model), view[span.end :]))


def is_json(content_type: bytes | None) -> bool:
    """Whether a Content-Type is `application/json` or `application/*+json` (RFC 6839, 3.1)."""
    return bool(_JSON.fullmatch(media_type(content_type)))


def path_model(path: bytes) -> str | None:
    """Return the model that a raw path (no query) names: `/deployments/M` or `/models/M:verb`.

    The first such pair counts; None without one. Segments are compared after percent-decoding, the
    fixed ones in any case. A verb is letters after the only colon: `/models/M` is a mere resource.

    Raises:
        BodyError: a name that is not percent-encoded UTF-8, or longer than `MODEL_BYTES`.
    """
    for before, segment in pairwise(path.split(b"/")):
        kind, name = unquote_to_bytes(before).lower(), unquote_to_bytes(segment)
        call = _MODEL_VERB.fullmatch(name) if kind == b"models" else None
        if call or (name and kind == b"deployments"):
            if _BAD_ESCAPE.search(segment):
                raise BodyError("The path has a malformed percent escape in the model's name.")
            return model_text(call[1] if call else name)
    return None


def _check_text(body: bytes) -> None:
    """Raise BodyError unless this is UTF-8 without a byte order mark."""
    if body.startswith(codecs.BOM_UTF8):
        raise BodyError("The body begins with a byte order mark; JSON has none.")
    view, at = memoryview(b"" if body.isascii() else body), 0
    try:
        while at < len(view):
            piece = view[at : at + _SLICE]
            at += codecs.utf_8_decode(piece, "strict", len(piece) < _SLICE)[1]
    except UnicodeDecodeError:
        raise BodyError("The body is not UTF-8.") from None


def _openings(body: bytes) -> int:
    """Count the brackets that open; `bytes.count` looks at each byte, this at each bracket."""
    return 2 * len(body) - len(body.replace(b"[", b"")) - len(body.replace(b"{", b""))


def _depth(body: bytes) -> int:
    """Return how deep arrays and objects nest in valid JSON."""
    # Without escapes each quote is a string's edge, and edges in pairs say nothing about the rest.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = unescaped.translate(None, _NOT_MARKS).replace(b'""', b"")
    outside = b"".join(marks.split(b'"')[::2])
    return max(accumulate(memoryview(outside.translate(_STEPS)).cast("b")), default=0)


def model_text(name: bytes) -> str:
    """Return a model's name as text.

    Raises:
        BodyError: it is longer than `MODEL_BYTES`, or not UTF-8.
    """
    if len(name) > MODEL_BYTES:
        raise BodyError(f'"model" is longer than {MODEL_BYTES} bytes.')
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise BodyError('"model" is not UTF-8.') from None
