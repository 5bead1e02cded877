"""The field ``model`` of a form (multipart/form-data, RFC 7578), found without looking into files.

What servers could read differently is refused, as in ``dialects/json_body.py``, so that the
provider cannot read another model than we did. A form is searched for its delimiters; what lies in
a file is never looked at. Parts and their heads are bounded, and every pass is linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from llmproxy.dialects.json_body import MODEL_BYTES, model_text
from llmproxy.dialects.json_spans import BodyError, Span
from llmproxy.http1.headers import media_type, without_parameters

PARTS: Final = 1000  # of one form; Starlette allows as many fields
PART_HEAD_BYTES: Final = 8192  # the header fields of one part

_TOKEN: Final = rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]++)"  # RFC 9110, section 5.6.2
_PARAMETER = re.compile(rb'(?s);[ \t]*+%b=(?:"((?:[^"\\]++|\\.)*+)"|%b)[ \t]*+' % (_TOKEN, _TOKEN))
_FIELD = re.compile(rb"%b:([^\r\n\0]*+)" % _TOKEN)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_LINE_END = re.compile(rb"[ \t]*+\r\n")
_CLOSE = re.compile(rb"--[ \t]*+(?:\r\n)?")


def multipart_model(content_type: bytes, body: bytes) -> str | None:
    """Return the field `model`, no file, of a whole multipart/form-data body (RFC 7578), or None.

    Raises:
        BodyError: no valid boundary (RFC 2046, section 5.1.1); two `model` fields; a value that is
            not UTF-8 or longer than `MODEL_BYTES`; more than `PARTS` parts; and what servers read
            differently: text before the first or after the last delimiter, one after a bare CR or
            LF, none at the end, malformed or repeated part headers and parameters, `name*`, and for
            `model` an empty or encoded file name or a Content-Transfer-Encoding.
    """
    if media_type(content_type) != b"multipart/form-data":
        return None
    boundary = _parameters(content_type).get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary):
        raise BodyError("The Content-Type of the form has no valid boundary.")
    model = None
    for part in _parts(body, b"--" + boundary):
        limit = min(part.start + PART_HEAD_BYTES, part.end + 2)  # a part may end with its head
        head_end = body.find(b"\r\n\r\n", part.start, limit)
        if head_end < 0:
            raise BodyError("A part of the form has no header fields, or too many.")
        if not _is_model_field(body[part.start : head_end]):
            continue
        if model is not None:
            raise BodyError('The form has two "model" fields.')
        model = model_text(body[head_end + 4 : min(head_end + 5 + MODEL_BYTES, part.end)])
    return model


def _parameters(value: bytes) -> dict[bytes, bytes]:
    """Read the `;name=value` parameters of a header value; quoted ones keep their backslashes."""
    text = value[len(value.partition(b";")[0]) :].rstrip(b"; \t")
    pairs = _PARAMETER.findall(text)
    found = {name.lower(): quoted or token for name, quoted, token in pairs}
    if len(found) < len(pairs) or _PARAMETER.sub(b"", text):
        raise BodyError("The form has malformed or repeated parameters in a header field.")
    return found


def _parts(body: bytes, delimiter: bytes) -> Iterator[Span]:
    """Yield where the parts stand, header fields and content, without the delimiters' line ends."""
    line = b"\n" + delimiter
    if not body.startswith((delimiter, b"\r" + line)) or b"\r" + delimiter in body:
        raise BodyError("The form does not begin with its delimiter, or has one after a bare CR.")
    at = body.index(delimiter) + len(delimiter)
    for _ in range(PARTS + 1):
        if _CLOSE.fullmatch(body, at):
            return
        line_end = _LINE_END.match(body, at)
        end = body.find(line, line_end.end() - 1) if line_end else -1
        if line_end is None or end < 0 or not body.endswith(b"\r", 0, end):
            raise BodyError("The form has a malformed delimiter, or lacks its last one.")
        yield Span(line_end.end(), end - 1)
        at = end + len(line)
    raise BodyError(f"The form has more than {PARTS} parts.")


def _is_model_field(head: bytes) -> bool:
    """Whether a part's header fields (without their last line end) make it the field `model`."""
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
    if name != b"model" or parameters.get(b"filename"):
        return False
    encoding = fields.get(b"content-transfer-encoding", b"binary").lower()
    named = any(key.startswith(b"filename") for key in parameters)
    if named or encoding not in (b"7bit", b"8bit", b"binary"):
        raise BodyError('The "model" field of the form is encoded or has an unclear file name.')
    return True
