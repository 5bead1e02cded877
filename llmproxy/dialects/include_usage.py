"""Asking an OpenAI provider for the token counts of a stream, where the caller did not.

Only its chat completions and completions leave the counts out of a stream unless
`stream_options.include_usage` is true. :func:`ask_for_usage` puts that into the bytes of a body,
between `body.py`, which has checked it, and the provider. Nothing here decodes and encodes a body
anew: what the caller wrote crosses byte for byte around the addition. Nothing here refuses a
request either: a body in which the option could be read in two ways is the caller's own business.
"""

from __future__ import annotations

from typing import Final

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.dialects.json_spans import BodyError, Span, member_spans

_OPTIONS: Final = "stream_options"
_OPTION: Final = "include_usage"
_ASKED: Final = b'"include_usage":true'


def ask_for_usage(body: bytes, dialect: Dialect, target: bytes) -> bytes:
    """Return the body with `include_usage` set, where that is a response's only way to its counts.

    A `stream_options` object gains the member, and a body without one gains the object; null counts
    as absent. Where the caller said true or false it stays, and so does a body that asks for no
    stream, is not JSON, or has either member twice (in whichever case), or misshapen.

    Args:
        body: the whole body, as it would be sent.
        dialect: the provider's.
        target: the path, raw and as the provider sees it, with or without a query.
    """
    row = endpoint(dialect, target)
    if row is None or row.dialect is not dialect or row.usage_option is None:
        return body
    if row.usage_option.fullmatch(target.partition(b"?")[0]) is None:
        return body
    try:
        return _with_usage(body)
    except BodyError:
        return body


def _with_usage(body: bytes) -> bytes:
    """Do the same for a body that goes to such an endpoint, or raise BodyError."""
    spans = member_spans(body, ("stream", _OPTIONS))
    stream, options = spans.pop("stream", None), spans.pop(_OPTIONS, None)
    if stream is None or body[slice(*stream)] != b"true" or spans:
        return body  # what is left differs in case alone, and some readers would take it
    if options is None:
        after = Span(stream.end, stream.end)
        return _replaced(body, after, b',"stream_options":{%b}' % _ASKED)
    if body[options.start : options.start + 1] != b"{":
        is_null = body[slice(*options)] == b"null"
        return _replaced(body, options, b"{%b}" % _ASKED) if is_null else body
    return _replaced(body, options, _with_option(body[slice(*options)]))


def _with_option(options: bytes) -> bytes:
    """Return the bytes of a `stream_options` object with the option, unless it says it itself."""
    spans = member_spans(options, (_OPTION,))
    said = spans.pop(_OPTION, None)
    if spans:
        return options
    if said is not None:
        is_null = options[slice(*said)] == b"null"
        return _replaced(options, said, b"true") if is_null else options
    is_empty = not options[1:-1].strip()
    return _replaced(options, Span(1, 1), _ASKED if is_empty else _ASKED + b",")


def _replaced(text: bytes, span: Span, value: bytes) -> bytes:
    return b"".join((text[: span.start], value, text[span.end :]))
