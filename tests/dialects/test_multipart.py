"""The model of a form is read as every server would read it, or the form is refused."""

from __future__ import annotations

from contextlib import suppress
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmproxy.dialects import multipart
from llmproxy.dialects.json_body import MODEL_BYTES
from llmproxy.dialects.json_spans import BodyError, finish
from llmproxy.dialects.multipart import PART_HEAD_BYTES, PARTS, FormModel, multipart_model

TYPE = b"multipart/form-data; boundary=b-1"


def form_model(content_type: bytes, body: bytes) -> str | None:
    """Return the value of a form's field ``model``."""
    found: FormModel = finish(multipart_model(content_type, body))
    if found.span is not None:
        assert body[slice(*found.span)].decode() == found.model
    return found.model


def _form(*parts: tuple[bytes, bytes]) -> bytes:
    """Write a form: a part is its header fields' lines and its content."""
    return b"".join(b"--b-1\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + b"--b-1--\r\n"


def _field(parameters: bytes, content: bytes = b"whisper-1") -> tuple[bytes, bytes]:
    return b"Content-Disposition: form-data; " + parameters, content


FILE = _field(b'name="file"; filename="a.mp3"', b'\xff\x00--b-1\r\n--b\r\nname="model"\r\n\r\nno')


@pytest.mark.parametrize(
    "content_type",
    [
        TYPE,
        b'multipart/form-data; boundary="b-1"',
        b"Multipart/Form-Data;charset=utf-8;BOUNDARY=b-1",
        b'multipart/form-data ; boundary="b-1" ; charset="a;b" ;',
    ],
)
@pytest.mark.parametrize(
    "name", [b'name="model"', b"name=model", b'NAME="model"', b'x="a;name=b";name=model']
)
def test_the_field_model_of_a_form_is_found(content_type: bytes, name: bytes) -> None:
    """Boundary and field name may be quoted or not, beside other parameters in any order."""
    body = _form(FILE, _field(b'name="language"', b"model"), _field(name))

    assert form_model(content_type, body) == "whisper-1"


@pytest.mark.parametrize(
    "boundary", [b"----WebKitFormBoundaryAbC", b"'()+_,-./:=? x", b"=_", b"1" * 70], ids=repr
)
def test_a_boundary_may_use_all_that_mime_allows(boundary: bytes) -> None:
    """Quoted, a boundary is up to seventy of MIME's characters."""
    body = _form(FILE, _field(b"name=model")).replace(b"b-1\r", boundary + b"\r")
    body = body.replace(b"--b-1--", b"--" + boundary + b"--")

    assert form_model(b'multipart/form-data; boundary="%b"' % boundary, body) == "whisper-1"


@pytest.mark.parametrize(
    "body",
    [
        _form(),
        _form(FILE),
        _form(_field(b'name="modes"')),
        _form(_field(b'name="model"; filename="m.txt"')),
        _form(_field(b"filename=m; name=model")),
    ],
)
def test_a_form_without_the_field_names_no_model(body: bytes) -> None:
    """Another name or a file is not the field."""
    assert form_model(TYPE, body) is None


@pytest.mark.parametrize(
    ("head", "value"),
    [
        (b"", b""),
        (b"Content-Type: text/plain\r\n", b"a\r\nb"),
        (b"content-transfer-encoding: 8BIT\r\n", "é".encode()),
        (b"X-Empty:\r\n", b"--b-2"),
    ],
)
def test_a_value_is_the_bytes_up_to_the_delimiter(head: bytes, value: bytes) -> None:
    """Line ends inside a value, other fields of the part and an empty value change nothing."""
    fields, _ = _field(b"name=model")

    assert form_model(TYPE, _form((head + fields, value))) == value.decode()


def test_the_first_delimiter_may_follow_a_line_end_and_padding_any() -> None:
    """What RFC 2046 allows around a delimiter and every server reads is accepted."""
    body = _form(_field(b"name=model"))

    assert form_model(TYPE, b"\r\n" + body) == "whisper-1"
    assert form_model(TYPE, body.replace(b"b-1\r\n", b"b-1 \t\r\n")) == "whisper-1"
    assert form_model(TYPE, body.removesuffix(b"\r\n")) == "whisper-1"
    assert form_model(TYPE, body.removesuffix(b"\r\n") + b" \t") == "whisper-1"


def test_a_part_without_content_may_end_with_its_header_fields() -> None:
    """RFC 2046 lets a part leave out its body together with the empty line."""
    body = b"--b-1\r\n" + _field(b"name=model")[0] + b"\r\n\r\n--b-1--"

    assert form_model(TYPE, body) == ""


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary=""',
        b"multipart/form-data; boundary=%b" % (b"1" * 71),
        b'multipart/form-data; boundary="b "',
        b'multipart/form-data; boundary="b\\-1"',
        b'multipart/form-data; boundary="b-1',
        b"multipart/form-data; boundary=b@1",
        b"multipart/form-data; boundary=b-1; boundary=b-1",
        b"multipart/form-data; boundary = b-1",
        b"multipart/form-data; x; boundary=b-1",
    ],
)
def test_a_form_without_a_valid_boundary_is_refused(content_type: bytes) -> None:
    """A missing, repeated, empty, long or malformed boundary is an error."""
    with pytest.raises(BodyError, match=r"boundary|parameters"):
        form_model(content_type, _form(_field(b"name=model")))


GOOD = _form(_field(b"name=model"))


def test_a_second_delimiter_is_no_header_field() -> None:
    """A boundary with a colon in it cannot pass for a field of the part that it begins."""
    body = GOOD.replace(b"b-1", b"b:1")

    assert form_model(b'multipart/form-data; boundary="b:1"', body) == "whisper-1"
    with pytest.raises(BodyError, match="no header fields"):
        form_model(b'multipart/form-data; boundary="b:1"', b"--b:1\r\n" + body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no delimiter",
        b"preamble\r\n" + GOOD,
        b"\n" + GOOD,
        GOOD + b"epilogue",
        GOOD + GOOD,
        GOOD.removesuffix(b"--b-1--\r\n"),
        GOOD.removesuffix(b"--\r\n"),
        GOOD.replace(b"--b-1\r\n", b"--b-1\n"),
        GOOD.replace(b"--b-1\r\n", b"--b-1x\r\n"),
        GOOD.replace(b"\r\n--b-1--", b"\n--b-1--"),
        GOOD.replace(b"whisper", b"whisper\n--b-1\r\n"),
        GOOD.replace(b"whisper", b"whisper\r--b-1\r\n"),
        b"--b-1\r\n" + GOOD,
        b"--b-1\r\n\r\n" + GOOD,
    ],
)
def test_delimiters_that_servers_read_differently_are_refused(body: bytes) -> None:
    """Text outside the parts, bare CR or LF before a delimiter and a lacking end are errors."""
    with pytest.raises(BodyError, match=r"The form|A part of the form"):
        form_model(TYPE, body)


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Type: text/plain",
        b"Content-Disposition: form-data",
        b'Content-Disposition: form-data; filename="a"',
        b'Content-Disposition: attachment; name="model"',
        b'Content-Disposition: form-data; name="mod\\el"',
        b"Content-Disposition: form-data; name*=utf-8''model",
        b"Content-Disposition: form-data; name=x; name*=utf-8''model",
        b"Content-Disposition: form-data; name=x; name*0=model",
        b"Content-Disposition: form-data; name=x; name=model",
        b"Content-Disposition: form-data; name=x; Name=model",
        b'Content-Disposition: form-data; name="x" filename=y',
        b'Content-Disposition: form-data; name="model',
        b'Content-Disposition: form-data; name=model; filename=""',
        b"Content-Disposition: form-data; name=model; filename*=utf-8''a",
        b"Content-Disposition : form-data; name=model",
        b"Content-Disposition: form-data;\r\n name=model",
        b"X: y\nContent-Disposition: form-data; name=model",
        b"X: y\rContent-Disposition: form-data; name=model",
        b"Content-Disposition: form-data; name=x\r\nContent-Disposition: form-data; name=model",
        b"Content-Disposition: form-data; name=model\r\nContent-Transfer-Encoding: base64",
        b"Content-Disposition: form-data; name=model\r\nContent-Type: text/plain; charset=utf-7",
        b"Content-Disposition: form-data; name=Model",
        b"Content-Disposition: form-data; name=_charset_",
        b"Content-Disposition: form-data; name=model\0",
        b"no field",
    ],
)
def test_part_heads_that_servers_read_differently_are_refused(head: bytes) -> None:
    """A field name is said once, plainly, in a well-formed header field."""
    with pytest.raises(BodyError):
        form_model(TYPE, _form((head, b"a")))


def test_a_field_model_twice_is_refused() -> None:
    """Servers differ in which of two fields they take."""
    with pytest.raises(BodyError, match='two "model" fields'):
        form_model(TYPE, _form(_field(b"name=model"), FILE, _field(b'name="model"')))


def test_a_value_is_bounded_and_text() -> None:
    """A model's name is at most a KiB of UTF-8."""
    most = b"a" * MODEL_BYTES

    assert form_model(TYPE, _form(_field(b"name=model", most))) == most.decode()
    with pytest.raises(BodyError, match="longer than"):
        form_model(TYPE, _form(_field(b"name=model", most + b"a")))
    with pytest.raises(BodyError, match="not UTF-8"):
        form_model(TYPE, _form(_field(b"name=model", b"\xff")))


def test_parts_and_their_heads_are_bounded() -> None:
    """More parts than the bound, or more header bytes in one, are refused."""
    field = _field(b"name=model")
    long = (b"X: " + b"a" * PART_HEAD_BYTES + b"\r\n" + field[0], b"")

    assert form_model(TYPE, _form(*[FILE] * (PARTS - 1), field)) == "whisper-1"
    with pytest.raises(BodyError, match="more than"):
        form_model(TYPE, _form(*[FILE] * PARTS, field))
    with pytest.raises(BodyError, match="too many"):
        form_model(TYPE, _form(long))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_a_form_is_searched_in_slices(size: int) -> None:
    """A delimiter that two slices share is found, and no step takes more than one."""
    body = _form(FILE, _field(b"name=language", b"x" * 50), _field(b"name=model"), FILE)
    with patch.object(multipart, "_SLICE", size):
        assert form_model(TYPE, body) == "whisper-1"
        with pytest.raises(BodyError, match="bare CR"):
            form_model(TYPE, body.replace(b"x" * 50, b"x" * 20 + b"\r--b-1" + b"x" * 20))
    steps = multipart_model(TYPE, _form(_field(b"name=file; filename=a", b"\n--b-" * 10**6)))
    assert sum(1 for _ in steps) > 20


def test_white_space_behind_a_delimiter_is_bounded() -> None:
    """A line of blanks is read in one step, so it is short."""
    for at in (b"--b-1", b"--b-1--"):
        with pytest.raises(BodyError):
            form_model(TYPE, GOOD.replace(at + b"\r\n", at + b" " * 2000 + b"\r\n"))


@given(st.binary(max_size=60), st.binary(max_size=20))
def test_any_file_beside_the_field_is_passed_over(content: bytes, value: bytes) -> None:
    """Whatever a file holds, the field is found; a value is decoded or refused, never altered."""
    if b"\n--b-1" in content or b"\r--b-1" in content:
        return
    body = _form(_field(b"name=file; filename=a", content), _field(b"name=model", b"v" + value))
    try:
        text = (b"v" + value).decode()
    except UnicodeDecodeError:
        with pytest.raises(BodyError, match="not UTF-8"):
            form_model(TYPE, body)
    else:
        assert form_model(TYPE, body) == text


_PIECES = st.sampled_from([b"--b-1", b"--", b"\r\n", b"\n", GOOD[7:52], b"a"])


@given(st.lists(_PIECES, max_size=9))
def test_any_form_is_read_or_refused(pieces: list[bytes]) -> None:
    """No bytes raise anything but a BodyError."""
    with suppress(BodyError):
        form_model(TYPE, b"".join(pieces))


@given(st.integers(0, len(GOOD)), st.integers(0, 2), _PIECES | st.just(b""))
def test_a_damaged_form_names_its_model_or_is_refused(at: int, length: int, piece: bytes) -> None:
    """Where it is read, the model is what stands behind the field's head, or there is none."""
    body = GOOD[:at] + piece + GOOD[at + length :]
    try:
        model = form_model(TYPE, body)
    except BodyError:
        return
    assert model is None or b"\r\n\r\n%b" % model.encode() in body
