"""The models that a request's target names: in its path, and in its query.

Azure, Bedrock, Gemini and others put the model into the path (``/deployments/M/chat/completions``,
``/model/M/invoke``, ``/models/M:verb``), and a name may have slashes.  Servers read one path in
different ways: some decode ``%2F`` before they look for slashes, merge ``//``, drop what stands
behind a ``;``, or decode twice.  So a path is read as the strictest and as the laxest of them
would, and every name that either finds counts (ADR-0016).  Nothing here knows a client, a route or
a provider.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_plus, unquote_to_bytes

import msgspec

from llmproxy.dialects.json_body import model_text
from llmproxy.dialects.json_spans import BodyError, Span
from llmproxy.http1.known import known

_WHOLE: Final = (b"deployments", b"engines")  # the next segment is a model, whatever follows
_CALLED: Final = (b"models", b"tunedmodels")  # it is one where the model is called
_INVOKED: Final = (b"model",)  # so it is here, and a colon belongs to the name (Bedrock)
_KINDS: Final = frozenset(_WHOLE + _CALLED + _INVOKED)
_OPERATIONS: Final = frozenset(
    (
        *(b"chat/completions", b"completions", b"embeddings", b"responses", b"messages", b"rerank"),
        *(b"extensions/chat/completions", b"moderations", b"search", b"edits", b"images/edits"),
        *(b"images/generations", b"images/variations", b"audio/speech", b"audio/transcriptions"),
        *(b"audio/translations", b"invoke", b"invoke-with-response-stream", b"async-invoke"),
        *(b"invoke-with-bidirectional-stream", b"converse", b"converse-stream", b"count-tokens"),
        *(b"predictions", b"infer", b"infer_stream", b"generate", b"generate_stream", b"predict"),
    )
)
"""What may follow a name and its slash, at the end of a path: one to three segments."""

_VERSION = re.compile(rb"v[0-9]+")
_CALL = re.compile(rb"([^:]+):[A-Za-z][^:]*")
_BEFORE_VERB = re.compile(rb"[^:]+(?=:[A-Za-z])")
_VERB = re.compile(rb"(?s).+:[A-Za-z][^:]*")
_COLON = re.compile(rb":|%3[Aa]")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ODD = re.compile(rb"[%;\\]|//")
_BETWEEN = re.compile(rb"[/\\]+")
_KIND = re.compile(rb"deployments|engines|models?", re.IGNORECASE)
_MOST_DECODINGS: Final = 4
_MOST_SEGMENTS: Final = 64
_MOST_NAMES: Final = 16
_MOST_PARAMETERS: Final = 1000
"""Paths and queries of real calls are far shorter; these bound what one costs."""


class PathModels(msgspec.Struct, frozen=True):
    """The models that a path names.

    Attributes:
        names: every one that some server reads there, each once; first the usual reading.
        span: where the only name stands, percent-encoded, if every server reads the same.
    """

    names: tuple[str, ...] = ()
    span: Span | None = None


_NONE = PathModels()


class _Name(NamedTuple):
    """A model's name, and where it begins and ends among the segments of a path."""

    text: bytes
    first: int
    last: int
    is_fixed: bool = False  # it may be something else, so it cannot be replaced


def path_models(path: bytes, *, is_call: bool = True) -> PathModels:
    """Return the models that a path names.

    Segments are compared after percent-decoding, the fixed ones in any case.  Behind
    ``deployments`` and ``engines``, the next segment is a name.  Behind ``models``, it is one with
    a verb: that begins with a letter, and follows a colon.  In a call, a name may have slashes, and
    ends before a verb or before an operation that is known, which is the end of the path.  Where
    neither follows ``models`` or ``model``, the next segment and all the rest are names.

    Args:
        path: raw, without the query; it was admitted, so its escapes are few (``http1/path.py``).
        is_call: the request may call a model: its method is not GET or HEAD.

    Raises:
        BodyError: a name is not percent-encoded UTF-8, or is longer than ``MODEL_BYTES``; there are
            too many segments or names.
    """
    return (_of_call if is_call else _of_read)(path)


def _models(path: bytes, *, is_call: bool) -> PathModels:
    texts = [path]
    while b"%" in texts[-1] and len(texts) < _MOST_DECODINGS:
        texts.append(unquote_to_bytes(texts[-1]))
    if not _KIND.search(texts[-1]):
        return _NONE
    if texts[-1].count(b"/") + texts[-1].count(b"\\") > _MOST_SEGMENTS:
        raise BodyError("The path has too many segments for one that names a model.")
    raw = path.split(b"/")
    found = list(_names([unquote_to_bytes(segment) for segment in raw], is_call=is_call))
    if any(_BAD_ESCAPE.search(part) for one in found for part in raw[one.first : one.last + 1]):
        raise BodyError("The path has a malformed percent escape in the model's name.")
    readings = [found]
    if _ODD.search(path):
        readings += (list(_names(segments, is_call=is_call)) for segments in _lax(texts))
    named = [[model_text(name.text) for name in names] for names in readings]
    names = tuple(dict.fromkeys(name for names in named for name in names))
    if len(names) > _MOST_NAMES:
        raise BodyError("The path names too many models.")
    is_clear = len(found) == 1 and not found[0].is_fixed and all(one == named[0] for one in named)
    return PathModels(names, _span(raw, found[0]) if is_clear else None)


_of_call = known(256)(partial(_models, is_call=True))
_of_read = known(256)(partial(_models, is_call=False))


def query_models(query: bytes) -> tuple[str, ...]:
    """Return the values of the query's parameters that are called ``model``, in any case.

    Args:
        query: raw, with or without its question mark.

    Raises:
        BodyError: there are too many parameters, or a name is too long.
    """
    text = query.removeprefix(b"?").decode()
    if "model" not in unquote_plus(text).casefold():
        return ()
    pairs = re.split("[&;]", text)
    if len(pairs) > _MOST_PARAMETERS:
        raise BodyError("The query has too many parameters for one that names a model.")
    split = (pair.partition("=") for pair in pairs)
    values = (unquote_plus(v) for name, _, v in split if unquote_plus(name).casefold() == "model")
    return tuple(model_text(value.encode()) for value in values)


def replaced(path: bytes, model: str, *, is_call: bool = True) -> bytes:
    """Return the path with another model in the place of the one that it names, if any.

    Raises:
        BodyError: servers could read other names in the path.
    """
    found = path_models(path, is_call=is_call)
    if found.span is None:
        if found.names:
            raise BodyError("The path names its model in a way that cannot be overridden.")
        return path
    start, end = found.span
    return path[:start] + quote(model, safe="").encode("ascii") + path[end:]


def _names(segments: list[bytes], *, is_call: bool) -> Iterator[_Name]:
    """Yield the names that a server finds in a path, in whose segments nothing is encoded."""
    for at, segment in enumerate(segments[:-1], 1):
        kind = segment.lower()
        if kind not in _KINDS or not segments[at]:
            continue
        if is_call:
            yield from dict.fromkeys(_called(kind, segments, at))
        elif kind in _WHOLE:
            yield _Name(segments[at], at, at)
        elif kind in _CALLED and (call := _CALL.fullmatch(segments[at])):
            yield _Name(call[1], at, at)


def _called(kind: bytes, segments: list[bytes], at: int) -> Iterator[_Name]:
    """Yield the names that begin at a segment, behind one of a kind, in a call."""
    verbs = [n for n in range(at, len(segments)) if _VERB.fullmatch(segments[n])]
    if verbs and kind in _CALLED:
        last = verbs[-1]
        whole = b"/".join(segments[at : last + 1])
        name = whole.rpartition(b":")[0]
        if (call := _BEFORE_VERB.match(segments[at])) and call[0] != name:
            yield _Name(call[0], at, at, is_fixed=True)
            yield _Name(whole, at, last, is_fixed=True)
        yield _Name(name, at, last)
        if last == len(segments) - 1:
            return
    end = _operation(segments, at)
    if end is not None:
        yield _Name(b"/".join(segments[at:end]), at, end - 1)
        if end - 1 > at and _VERSION.fullmatch(segments[end - 1]):  # of the operation, or the name
            yield _Name(b"/".join(segments[at : end - 1]), at, end - 2, is_fixed=True)
    elif kind in _WHOLE:
        yield _Name(segments[at], at, at)
    elif not verbs or kind in _INVOKED:
        yield _Name(segments[at], at, at, is_fixed=True)
        yield _Name(b"/".join(segments[at:]).rstrip(b"/"), at, len(segments) - 1, is_fixed=True)


def _operation(segments: list[bytes], at: int) -> int | None:
    """Return where a known operation begins that ends a path, behind a name from ``at`` on."""
    end = len(segments) - (not segments[-1])
    for begin in range(max(at + 1, end - 3), end):
        if b"/".join(segments[begin:end]).lower() in _OPERATIONS:
            return begin
    return None


def _span(raw: list[bytes], name: _Name) -> Span:
    """Return where a name stands in a path with these segments."""
    starts = list(accumulate((len(segment) + 1 for segment in raw), initial=0))
    end = starts[name.last] + len(raw[name.last])
    if unquote_to_bytes(b"/".join(raw[name.first : name.last + 1])) != name.text:  # a verb follows
        *_, colon = _COLON.finditer(raw[name.last])
        end = starts[name.last] + colon.start()
    return Span(starts[name.first], end)


def _lax(texts: list[bytes]) -> Iterator[list[bytes]]:
    """Yield the segments that each lax server finds: slashes merged, decoded early or often.

    Args:
        texts: the path, decoded as often as nothing, once, twice and so on.
    """
    for text in texts:
        whole = [unquote_to_bytes(segment) for segment in _BETWEEN.split(text)]
        for segments in (whole, [segment.partition(b";")[0] for segment in whole]):
            yield [kind if (kind := one.strip()).lower() in _KINDS else one for one in segments]
