"""The model that a multipart form names (multipart/form-data, RFC 7578), in its field ``model``.

A form that servers could read differently is refused, as in ``json_body.py``, so that the provider
cannot read another model than the proxy did.  The form is searched for its delimiters; the content
of files is never read.  The number of parts and the length of their heads are bounded, and a form
of any size is searched in short steps.  Nothing here knows a client, a route or a provider.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from llmproxy.dialects.json_body import MODEL_BYTES, OTHER_MODELS, model_text
from llmproxy.dialects.json_spans import BodyError, Span, Steps
from llmproxy.http1.headers import is_utf8, without_parameters

PARTS: Final = 1000  # of one form; Starlette allows as many fields
PART_HEAD_BYTES: Final = 8192  # the header fields of one part

_TOKEN: Final = rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]++)"  # RFC 9110, section 5.6.2
_PARAMETER = re.compile(rb'(?s);[ \t]*+%b=(?:"((?:[^"\\]++|\\.)*+)"|%b)[ \t]*+' % (_TOKEN, _TOKEN))
_FIELD = re.compile(rb"%b:([^\r\n\0]*+)" % _TOKEN)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_LINE_END = re.compile(rb"[ \t]*+\r\n")
_CLOSE = re.compile(rb"--[ \t]*+(?:\r\n)?")
_LINE: Final = 1024  # most bytes of white space behind a delimiter
_SLICE: Final = 262_144  # bytes that are searched at once


class FormModel(NamedTuple):
    """The field ``model`` of a form: its value, and where that stands; both None without it."""

    model: str | None = None
    span: Span | None = None


def multipart_model(content_type: bytes, body: bytes) -> Steps[FormModel]:
    """Return the field ``model`` of a form; a file is no such field.

    Args:
        content_type: the request's.
        body: all of it.

    Raises:
        BodyError: the boundary is not valid (RFC 2046, section 5.1.1); there are two ``model``
            fields, or one in another case, or one of ``OTHER_MODELS``; the value is not UTF-8, or
            longer than ``MODEL_BYTES``; there are more than ``PARTS`` parts.  Also what servers
            read differently: text before the first or after the last delimiter, a delimiter after a
            bare CR or LF, none at the end, part headers or parameters that are malformed or
            repeated, ``name*``, a field ``_charset_`` (RFC 7578, section 4.6), and for ``model`` an
            empty or encoded file name, a charset other than UTF-8 or a Content-Transfer-Encoding.
    """
    boundary = _parameters(content_type).get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise BodyError("The Content-Type of the form has no valid boundary.")
    model = FormModel()
    parts = yield from _parts(body, b"--" + boundary)
    for part in parts:
        limit = min(part.start + PART_HEAD_BYTES, part.end + 2)  # a part may end with its head
        head_end = body.find(b"\r\n\r\n", part.start, limit)
        if head_end < 0:
            raise BodyError("A part of the form has no header fields, or too many.")
        is_model = _is_model_field(body[part.start : head_end])
        yield
        if not is_model:
            continue
        if model.span is not None:
            raise BodyError('The form has two "model" fields.')
        span = Span(min(head_end + 4, part.end), part.end)
        value = body[span.start : min(span.start + 1 + MODEL_BYTES, span.end)]
        model = FormModel(model_text(value), span)
    return model


def _parameters(value: bytes) -> dict[bytes, bytes]:
    """Read the ``;name=value`` parameters of a field; quoted values keep their backslashes."""
    text = value[len(value.partition(b";")[0]) :].rstrip(b"; \t")
    pairs = _PARAMETER.findall(text)
    found = {name.lower(): quoted or token for name, quoted, token in pairs}
    if len(found) < len(pairs) or _PARAMETER.sub(b"", text):
        raise BodyError("The form has malformed or repeated parameters in a header field.")
    return found


def _parts(body: bytes, delimiter: bytes) -> Steps[list[Span]]:
    """Return where the parts stand: fields and content, without the delimiters' line ends."""
    line = b"\n" + delimiter
    begins = body.startswith((delimiter, b"\r" + line))
    if not begins or (yield from _find(body, b"\r" + delimiter, 0)) >= 0:
        raise BodyError("The form does not begin with its delimiter, or has one after a bare CR.")
    at = body.index(delimiter) + len(delimiter)
    parts: list[Span] = []
    while not _CLOSE.fullmatch(body, at, at + _LINE) or len(body) > at + _LINE:
        if len(parts) == PARTS:
            raise BodyError(f"The form has more than {PARTS} parts.")
        line_end = _LINE_END.match(body, at, at + _LINE)
        end = (yield from _find(body, line, line_end.end() - 1)) if line_end else -1
        if line_end is None or end < 0 or not body.endswith(b"\r", 0, end):
            raise BodyError("The form has a malformed delimiter, or lacks its last one.")
        parts.append(Span(line_end.end(), end - 1))
        at = end + len(line)
    return parts


def _find(body: bytes, what: bytes, at: int) -> Steps[int]:
    """Do as ``body.find(what, at)``."""
    while at < len(body):
        found = body.find(what, at, at + _SLICE + len(what) - 1)
        if found >= 0:
            return found
        at += _SLICE
        yield
    return -1


def _is_model_field(head: bytes) -> bool:
    """Return whether a part with these header fields is the field ``model``.

    Args:
        head: the fields, without their last line end.
    """
    lines = [_FIELD.fullmatch(line) for line in head.split(b"\r\n")]
    fields = {line[1].lower(): line[2].strip(b" \t") for line in lines if line}
    if len(fields) < len(lines):
        raise BodyError("A part of the form has a malformed or repeated header field.")
    disposition = fields.get(b"content-disposition", b"")
    parameters = _parameters(disposition)
    name = parameters.get(b"name", b"\\")
    plain = without_parameters(disposition) == b"form-data" and b"\\" not in name
    if not plain or any(key.startswith(b"name*") for key in parameters):
        raise BodyError("A part of the form has no plain field name.")
    if name.lower() == b"_charset_":
        raise BodyError("The form names a character set.")
    if name.lower().decode("latin-1") in OTHER_MODELS:
        raise BodyError('Beside "model", the form names further models, which is not taken here.')
    if name.lower() != b"model" or parameters.get(b"filename"):
        return False
    if name != b"model":
        raise BodyError('The form has a "model" field in another case.')
    encoding = fields.get(b"content-transfer-encoding", b"binary").lower()
    named = any(key.startswith(b"filename") for key in parameters)
    coded = encoding not in (b"7bit", b"8bit", b"binary")
    if named or coded or not is_utf8(fields.get(b"content-type", b"")):
        raise BodyError('The "model" field of the form is encoded or has an unclear file name.')
    return True
