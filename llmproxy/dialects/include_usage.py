"""Asks an OpenAI provider for the token counts of a stream if the caller did not.

OpenAI's chat completions and completions leave the counts out of a stream unless
``stream_options.include_usage`` is true; the table of endpoints says at which paths.
:func:`ask_for_usage` puts the option into the bytes of a body that ``json_body.py`` has checked,
before the body goes to the provider.

Nothing here decodes a body and encodes it again: what the caller wrote crosses byte for byte around
the addition.  Nothing here refuses a request: a body in which the option could be read in two ways
crosses as it is.
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
    """Return the body with ``include_usage`` set, if the response has its counts only then.

    A ``stream_options`` object gets the member, and a body without that object gets the object;
    null counts as absent.  If the caller wrote true or false, the body stays as it is.  A body also
    stays if it asks for no stream, if it is not JSON, or if either member stands in it twice (in
    any case) or has another type.

    Args:
        body: the whole body, as it would be sent.
        dialect: the provider's.
        target: the raw path that the provider gets, with or without a query.
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
        return body  # the names left differ in case alone, and some readers take these
    if options is None:
        after = Span(stream.end, stream.end)
        return _replaced(body, after, b',"stream_options":{%b}' % _ASKED)
    if body[options.start : options.start + 1] != b"{":
        is_null = body[slice(*options)] == b"null"
        return _replaced(body, options, b"{%b}" % _ASKED) if is_null else body
    return _replaced(body, options, _with_option(body[slice(*options)]))


def _with_option(options: bytes) -> bytes:
    """Return the bytes of a ``stream_options`` object with the option, unless it has it already."""
    spans = member_spans(options, (_OPTION,))
    value = spans.pop(_OPTION, None)
    if spans:
        return options
    if value is not None:
        is_null = options[slice(*value)] == b"null"
        return _replaced(options, value, b"true") if is_null else options
    is_empty = not options[1:-1].strip()
    return _replaced(options, Span(1, 1), _ASKED if is_empty else _ASKED + b",")


def _replaced(text: bytes, span: Span, value: bytes) -> bytes:
    return b"".join((text[: span.start], value, text[span.end :]))
