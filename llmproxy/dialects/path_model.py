"""The models that a request's target names: in its path, and in its query.

Azure and Gemini put the model into the path (``/deployments/M``, ``/models/M:verb``).  Servers
read one path in different ways: some decode ``%2F`` before they look for slashes, merge ``//``,
drop what stands behind a ``;``, or decode twice.  So a path is read as the strictest and as the
laxest of them would, and every name that either finds counts (ADR-0016).  Nothing here knows a
client, a route or a provider.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_plus, unquote_to_bytes

from llmproxy.dialects.json_body import model_text
from llmproxy.dialects.json_spans import BodyError, Span

_WHOLE: Final = (b"deployments", b"engines")  # the next segment is a model
_CALLED: Final = (b"models", b"tunedmodels")  # it is one if a verb follows the name
_CALL = re.compile(rb"([^:]+):[A-Za-z][^:]*")
_COLON = re.compile(rb":|%3[Aa]")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ODD = re.compile(rb"[%;\\]|//")
_BETWEEN = re.compile(rb"[/\\]+")
_KIND = re.compile(rb"deployments|engines|models", re.IGNORECASE)
_MOST_DECODINGS: Final = 4
_MOST_SEGMENTS: Final = 256
_MOST_PARAMETERS: Final = 1000
"""Paths and queries of real calls are far shorter; these bound what one costs."""


class PathModels(NamedTuple):
    """The models that a path names.

    Attributes:
        names: every one that some server reads there, each once; first the usual reading.
        span: where the only name stands, percent-encoded, if every server reads the same.
    """

    names: tuple[str, ...] = ()
    span: Span | None = None


_NONE = PathModels()


@lru_cache(maxsize=256)
def path_models(path: bytes) -> PathModels:
    """Return the models that a path names: ``/deployments/M`` or ``/models/M:verb``.

    Segments are compared after percent-decoding, the fixed ones in any case.  A verb begins with a
    letter and follows the only colon; without a verb, ``/models/M`` is a resource and no call.

    Args:
        path: raw, without the query.

    Raises:
        BodyError: a name is not percent-encoded UTF-8, or is longer than ``MODEL_BYTES``; there are
            too many segments.
    """
    texts = [path]
    while b"%" in texts[-1] and len(texts) < _MOST_DECODINGS:
        texts.append(unquote_to_bytes(texts[-1]))
    if not _KIND.search(texts[-1]):
        return _NONE
    if texts[-1].count(b"/") + texts[-1].count(b"\\") > _MOST_SEGMENTS:
        raise BodyError("The path has too many segments for one that names a model.")
    found, at = [], 0
    for before, segment in pairwise(path.split(b"/")):
        at += len(before) + 1
        kind = unquote_to_bytes(before).lower()
        name = _name(kind, unquote_to_bytes(segment))
        if name is None:
            continue
        if _BAD_ESCAPE.search(segment):
            raise BodyError("The path has a malformed percent escape in the model's name.")
        colon = _COLON.search(segment) if kind in _CALLED else None
        end = at + (colon.start() if colon else len(segment))
        found.append((model_text(name), Span(at, end)))
    strict = [name for name, _ in found]
    readings = [strict, *(_lax_readings(texts) if _ODD.search(path) else ())]
    names = tuple(dict.fromkeys(name for names in readings for name in names))
    is_clear = len(found) == 1 and all(names == strict for names in readings)
    return PathModels(names, found[0][1] if is_clear else None)


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


def replaced(path: bytes, model: str) -> bytes:
    """Return the path with another model in the place of the one that it names, if any.

    Raises:
        BodyError: servers could read other names in the path.
    """
    found = path_models(path)
    if found.span is None:
        if found.names:
            raise BodyError("The path names its model in a way that cannot be overridden.")
        return path
    start, end = found.span
    return path[:start] + quote(model, safe="").encode("ascii") + path[end:]


def _name(kind: bytes, segment: bytes) -> bytes | None:
    """Return the model that a segment names behind one that says its kind, both decoded."""
    if kind in _CALLED:
        call = _CALL.fullmatch(segment)
        return call[1] if call else None
    return segment if segment and kind in _WHOLE else None


def _lax_readings(texts: list[bytes]) -> Iterator[list[str]]:
    """Yield the names that each lax server finds: slashes merged, decoded early or often.

    Args:
        texts: the path, decoded as often as nothing, once, twice and so on.
    """
    for text in texts:
        whole = [unquote_to_bytes(segment) for segment in _BETWEEN.split(text)]
        bare = [segment.partition(b";")[0] for segment in whole]
        for segments in (whole, bare):
            names = (_name(one.strip().lower(), two) for one, two in pairwise(segments))
            yield [model_text(name) for name in names if name is not None]
