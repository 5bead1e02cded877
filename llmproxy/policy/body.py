"""What routing needs to know of a request: the model it names, and whether it asks for a stream.

Here live pure functions over the bytes of a body (or a path), between the front and `routes.py`.
Nothing here does I/O, knows a client, a route or a provider, or decodes and encodes a body anew.

Theory of operation: the one danger is that the provider reads another model than we did. So what
two readers could read differently is a `BodyError`; what is accepted has one reading. No Python
code runs per byte, token or bracket: C code checks JSON (`members.py`), and a form is searched for
its delimiters; what lies in a file is never looked at. Members, parts, nesting are bounded, and
every pass is linear.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from llmproxy.policy.members import MEMBERS, BodyError, Span, member_spans

__all__ = [
    "DEPTH",
    "MEMBERS",
    "MODEL_BYTES",
    "PARTS",
    "PART_HEAD_BYTES",
    "BodyError",
    "JsonFacts",
    "Span",
    "asks_for_stream",
    "inspect_json",
    "is_json",
    "multipart_model",
    "path_model",
    "replace_model",
]

DEPTH: Final = 512  # arrays and objects in each other; CPython's own json gives up near 1000
PARTS: Final = 1000  # of one form; Starlette allows as many fields
PART_HEAD_BYTES: Final = 8192  # the header fields of one part
MODEL_BYTES: Final = 1024  # a model's name, as UTF-8

_SLICE: Final = 65_536  # bytes decoded at once to check UTF-8: text can take four times its memory
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: in is 1, out is -1
_NOT_MARKS: Final = bytes(set(range(256)) - set(b'[]{}"'))
_FLAGS: Final = {b"true": True, b"false": False, b"null": None}
_MODEL_VERB = re.compile(rb"([^:]+):[A-Za-z]+")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_TOKEN: Final = rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]++)"  # RFC 9110, section 5.6.2
_PARAMETER = re.compile(rb'(?s);[ \t]*+%b=(?:"((?:[^"\\]++|\\.)*+)"|%b)[ \t]*+' % (_TOKEN, _TOKEN))
_FIELD = re.compile(rb"%b:([^\r\n\0]*+)" % _TOKEN)
_JSON = re.compile(rb"application/(?:.+\+)?json")
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
_LINE_END = re.compile(rb"[ \t]*+\r\n")
_CLOSE = re.compile(rb"--[ \t]*+(?:\r\n)?")


@dataclass(frozen=True, slots=True)
class JsonFacts:
    """What the top-level members of a JSON body say; null counts as absent, but has a span."""

    model: str | None = None
    model_span: Span | None = None
    stream: bool | None = None
    stream_span: Span | None = None


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
    _check_text(body)
    spans = member_spans(body, ("model", "stream"))
    if body.count(b"[") + body.count(b"{") > DEPTH and _depth(body) > DEPTH:
        raise BodyError(f"The body has more than {DEPTH} arrays and objects in each other.")
    model, stream = spans.get("model"), spans.get("stream")
    flag = body[slice(*stream)] if stream else b"null"
    if flag not in _FLAGS:
        raise BodyError('"stream" must be true or false.')
    try:
        name = msgspec.json.decode(body[slice(*model)], type=str | None) if model else None
    except msgspec.DecodeError:
        raise BodyError('"model" must be a string, and of whole characters.') from None
    known = None if name is None else _model_text(name.encode())
    return JsonFacts(known, model, _FLAGS[flag], stream)


def replace_model(body: bytes, span: Span, model: str) -> bytes:
    """Return the body with `model` as a JSON string at `span`, which is its `model_span`.

    Nothing inserts one: an override changes the bytes of that value alone, and so none without it.
    """
    view = memoryview(body)
    return b"".join((view[: span.start], msgspec.json.encode(model), view[span.end :]))


def is_json(content_type: bytes | None) -> bool:
    """Whether a Content-Type is `application/json` or `application/*+json` (RFC 6839, 3.1)."""
    return bool(_JSON.fullmatch(_kind(content_type or b"")))


def asks_for_stream(facts: JsonFacts, dialect: str, path: bytes) -> bool:
    """Whether the body asks for a stream: `"stream": true`, in Ollama's own API also nothing.

    `path` is the raw path without its query; Ollama's own API are `/api/chat` and `/api/generate`.
    """
    own_api = dialect == "ollama" and path.endswith((b"/api/chat", b"/api/generate"))
    return own_api if facts.stream is None else facts.stream


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
            return _model_text(call[1] if call else name)
    return None


def multipart_model(content_type: bytes, body: bytes) -> str | None:
    """Return the field `model`, no file, of a whole multipart/form-data body (RFC 7578), or None.

    Raises:
        BodyError: no valid boundary (RFC 2046, section 5.1.1); two `model` fields; a value that is
            not UTF-8 or longer than `MODEL_BYTES`; more than `PARTS` parts; and what servers read
            differently: text before the first or after the last delimiter, one after a bare CR or
            LF, none at the end, malformed or repeated part headers and parameters, `name*`, and for
            `model` an empty or encoded file name or a Content-Transfer-Encoding.
    """
    if _kind(content_type) != b"multipart/form-data":
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
        model = _model_text(body[head_end + 4 : min(head_end + 5 + MODEL_BYTES, part.end)])
    return model


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


def _depth(body: bytes) -> int:
    """Return how deep arrays and objects nest in valid JSON."""
    # Without escapes each quote is a string's edge, and edges in pairs say nothing about the rest.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = unescaped.translate(None, _NOT_MARKS).replace(b'""', b"")
    outside = b"".join(marks.split(b'"')[::2])
    return max(accumulate(memoryview(outside.translate(_STEPS)).cast("b")), default=0)


def _model_text(name: bytes) -> str:
    if len(name) > MODEL_BYTES:
        raise BodyError(f'"model" is longer than {MODEL_BYTES} bytes.')
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise BodyError('"model" is not UTF-8.') from None


def _kind(value: bytes) -> bytes:
    """Return what stands before the parameters of a header value, in lower case."""
    return value.partition(b";")[0].strip(b" \t").lower()


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
    plain = _kind(disposition) == b"form-data" and b"\\" not in name
    if not plain or any(key.startswith(b"name*") for key in parameters):
        raise BodyError("A part of the form has no plain field name.")
    if name != b"model" or parameters.get(b"filename"):
        return False
    encoding = fields.get(b"content-transfer-encoding", b"binary").lower()
    named = any(key.startswith(b"filename") for key in parameters)
    if named or encoding not in (b"7bit", b"8bit", b"binary"):
        raise BodyError('The "model" field of the form is encoded or has an unclear file name.')
    return True
