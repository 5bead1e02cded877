"""Asks an OpenAI provider for the token counts of a stream if the caller did not.

OpenAI's chat completions and completions leave the counts out of a stream unless
``stream_options.include_usage`` is true; the table of endpoints says at which paths.
:func:`usage_edit` says where the option goes in the bytes of a body that ``json_body.py`` has
checked, before the body goes to the provider.

Nothing here decodes a body and encodes it again: what the caller wrote crosses byte for byte around
the addition.  Nothing here refuses a request: a body in which the option could be read in two ways
crosses as it is.
"""

from __future__ import annotations

from typing import Final

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import endpoint
from llmproxy.dialects.json_spans import BodyError, Edit, Span, Steps, finish, member_spans

OPTIONS_BYTES: Final = 4096  # of the caller's own stream_options

_OPTIONS: Final = "stream_options"
_OPTION: Final = "include_usage"
_ASKED: Final = b'"include_usage":true'


def usage_edit(body: bytes, dialect: Dialect, target: bytes) -> Steps[Edit | None]:
    """Return what sets ``include_usage`` in the body, if the response has its counts only then.

    A ``stream_options`` object gets the member, and a body without that object gets the object;
    null counts as absent.  If the caller wrote true or false, the body stays as it is.  A body also
    stays if it asks for no stream, if it is not JSON, if either member stands in it twice (in any
    case) or has another type, or if the options are longer than ``OPTIONS_BYTES``.

    Args:
        body: the whole body, in UTF-8.
        dialect: the provider's.
        target: the raw path that the provider gets, with or without a query.
    """
    row = endpoint(dialect, target)
    if row is None or row.dialect is not dialect or row.usage_option is None:
        return None
    if row.usage_option.fullmatch(target.partition(b"?")[0]) is None:
        return None
    try:
        return (yield from _edit(body))
    except BodyError:
        return None


def _edit(body: bytes) -> Steps[Edit | None]:
    """Do the same for a body that goes to such an endpoint, or raise BodyError."""
    spans = yield from member_spans(body, ("stream", _OPTIONS))
    stream, options = spans.pop("stream", None), spans.pop(_OPTIONS, None)
    if stream is None or body[slice(*stream)] != b"true" or spans:
        return None  # the names left differ in case alone, and some readers take these
    if options is None:
        return Edit(Span(stream.end, stream.end), b',"stream_options":{%b}' % _ASKED)
    if options.end - options.start > OPTIONS_BYTES:
        return None
    text = body[slice(*options)]
    if not text.startswith(b"{"):
        return Edit(options, b"{%b}" % _ASKED) if text == b"null" else None
    inner = _with_option(text)
    return None if inner is None else Edit(inner.span.moved(options.start), inner.text)


def _with_option(options: bytes) -> Edit | None:
    """Return what gives a ``stream_options`` object the option, unless it has it already."""
    spans = finish(member_spans(options, (_OPTION,)))
    value = spans.pop(_OPTION, None)
    if spans:
        return None
    if value is not None:
        return Edit(value, b"true") if options[slice(*value)] == b"null" else None
    is_empty = not options[1:-1].strip()
    return Edit(Span(1, 1), _ASKED if is_empty else _ASKED + b",")
