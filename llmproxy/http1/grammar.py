"""HTTP/1.1's own grammar: start lines, fields, tokens, lists and numbers, strictly.

Both sides of the wire read heads with this module, so that they cannot disagree about a message.
It is strict by RFC 9110 and RFC 9112: no bare LF, no folded lines, no white space before a colon,
no number but plain digits.  Whatever is not in the grammar raises :class:`BadMessage`; nothing is
repaired.  No socket, provider or client is known here.
"""

from __future__ import annotations

import re

import msgspec

from llmproxy.http1.known import known

Fields = list[tuple[bytes, bytes]]
"""Header fields in their order; names in lower case, values without surrounding white space."""

NO_FIELDS: Fields = []
NO_VALUES: dict[bytes, bytes] = {}
"""Stand for a head that is gone, or that is not there; nothing is added to them."""

MAX_LINE = 8192
"""Longest field line outside of a head, in bytes: a head's own limit bounds its lines."""

MAX_FIELDS = 128
"""Most field lines of one head; Node allows about 2000, Apache and hyper 100."""

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CTL = bytes([*range(0, 9), *range(10, 32), 127])
_COLON = b": "
_MOST_KNOWN, _LONGEST_KNOWN = 1024, 128
"""How many field lines of servers are remembered, and of how many bytes."""

_PRIVATE = frozenset((b"set-cookie",))
_DIGITS = re.compile(rb"[0-9]{1,18}")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD_LINES = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[\x20-\x7e\x80-\xff]*+\r\n)++")
"""Lines without a fault and without a tab; other lines are looked at one by one."""

_REQUEST_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([\x21\x22\x24-\x7e]+) HTTP/([0-9]\.[0-9])"
)
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z\-._~!$&'()*+,;=%]*)(?::[0-9]{0,5})?",
)

_AUTHORITY = re.compile(rb"(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z\-._~]{1,255})):([0-9]{1,5})")
_ABSOLUTE = re.compile(
    rb"([A-Za-z][A-Za-z0-9+.-]*)://(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z\-._~]{1,255}))"
    rb"(?::([0-9]{1,5}))?([/?].*)?"
)


class BadMessage(ValueError):
    """The bytes are not HTTP/1.1; the text says what is wrong, without quoting values.

    Attributes:
        status: of the response that a server gives to it (RFC 9110, section 15.5).
    """

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class RequestHead(msgspec.Struct, frozen=True):
    """The head of a request: ``target`` as it came, ``minor`` 0 or 1.

    ``first`` has the first value of each name.
    """

    method: bytes
    target: bytes
    minor: int
    fields: Fields
    first: dict[bytes, bytes]


@known(256)
def parse_status_line(line: bytes) -> tuple[int, int]:
    """Return x and the status in ``HTTP/1.x SP 3DIGIT [SP reason]`` (RFC 9112, section 4).

    Raises:
        BadMessage: it is malformed, or the status is not one from 100 to 599.
    """
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise BadMessage("the status line is malformed")
    return int(match[1]), int(match[2])


def parse_request_head(head: bytes) -> RequestHead:
    """Read a request's head, without its empty line (RFC 9112, section 3).

    Raises:
        BadMessage: 400 for what is malformed, for a missing, second or malformed ``Host``, and for
            a second ``Content-Type`` (RFC 9110, section 5.3: it is no list); 431
            for too many fields; 505 for a version other than 1.0 and 1.1.
    """
    lines = head.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None:
        raise BadMessage("the request line is malformed")
    if match[3] not in (b"1.0", b"1.1"):
        raise BadMessage("only HTTP/1.0 and HTTP/1.1 are served", 505)
    minor = int(match[3][2:])
    fields = parse_fields(lines[1:], longest=len(head))
    first = first_values(fields)
    host = first.get(b"host")
    repeats = len(first) < len(fields)
    if minor if host is None else repeats and len(field_values(fields, b"host")) > 1:
        raise BadMessage("exactly one Host field is needed")
    if host is not None and _HOST.fullmatch(host) is None:
        raise BadMessage("the Host field is malformed")
    if repeats and len(field_values(fields, b"content-type")) > 1:
        raise BadMessage("more than one Content-Type field")  # readers differ in which counts
    return RequestHead(match[1], match[2], minor, fields, first)


def parse_fields(lines: list[bytes], *, most: int = MAX_FIELDS, longest: int = MAX_LINE) -> Fields:
    """Read field lines, without their line ends (RFC 9112, section 5).

    Raises:
        BadMessage: a name that is no token (so a folded line, or white space before the colon), a
            control character in a value, too many lines, a line that is too long.
    """
    if len(lines) > most:
        raise BadMessage(f"more than {most} header fields", 431)
    block = b"\r\n".join((*lines, b""))
    may_be_long = len(block) > longest and max(map(len, lines)) > longest
    if may_be_long or _FIELD_LINES.fullmatch(block) is None:
        return [parse_field(line, longest) for line in lines]
    fields = []
    for line in lines:
        name, _, value = line.partition(b":")
        fields.append((name.lower(), value.strip()))  # of blanks: no other space is in the block
    return fields


class _KnownLines(dict[bytes, tuple[bytes, bytes]]):
    """Field lines that came before, as they were read: a server sends most of them again and again.

    Those that are a client's own are not remembered, nor long ones; when there are too many, all
    are forgotten.
    """

    def __missing__(self, line: bytes) -> tuple[bytes, bytes]:
        field = parse_field(line, len(line))
        if len(line) <= _LONGEST_KNOWN and field[0] not in _PRIVATE:
            if len(self) >= _MOST_KNOWN:
                self.clear()
            self[line] = field
        return field


_field_of = _KnownLines().__getitem__


def parse_known_fields(lines: list[bytes]) -> Fields:
    """Read field lines of a server's head, without their line ends; they may be of any length.

    Raises:
        BadMessage: as :func:`parse_fields`.
    """
    if len(lines) > MAX_FIELDS:
        raise BadMessage(f"more than {MAX_FIELDS} header fields", 431)
    return [*map(_field_of, lines)]


def parse_field(line: bytes, longest: int = MAX_LINE) -> tuple[bytes, bytes]:
    """Read one field line.

    Raises:
        BadMessage: it is malformed, or longer than ``longest`` bytes.
    """
    if len(line) > longest:
        raise BadMessage(f"a header field longer than {longest} bytes")
    name, colon, value = line.partition(b":")
    if not colon or _TOKEN.fullmatch(name) is None:
        raise BadMessage("a header field's name is malformed")
    if len(value.translate(None, _CTL)) != len(value):
        raise BadMessage("a header field's value holds a control character")
    name = name.lower()
    if b"\t" in value and name == b"transfer-encoding":
        # Allowed by RFC 9110, 5.6.3, but llhttp does not see `chunked` beside a tab.
        raise BadMessage("a tab beside a transfer coding")
    return name, value.strip(b" \t")


def field_lines(fields: Fields) -> list[bytes]:
    """Return the lines of fields on the wire, without their ends."""
    return [*map(_COLON.join, fields)]


def first_values(fields: Fields) -> dict[bytes, bytes]:
    """Return the first value of each name."""
    return dict(reversed(fields))


def field_values(fields: Fields, name: bytes) -> list[bytes]:
    """Return the values of every line that is called ``name`` (lower case), in order."""
    return [value for key, value in fields if key == name]


def list_tokens(values: list[bytes]) -> list[bytes]:
    """Split the comma lists of several lines into lower-case members (RFC 9110, 5.6.1)."""
    members = b",".join(values).lower().split(b",")
    return [token for member in members if (token := member.strip(b" \t"))]


def is_persistent(by_default: bool, fields: Fields, first: dict[bytes, bytes]) -> bool:
    """Return whether the sender of a head lets the connection be used again (RFC 9112, 9.3).

    Args:
        by_default: the version is HTTP/1.1.
    """
    if b"connection" not in first:
        return by_default
    return by_default and b"close" not in list_tokens(field_values(fields, b"connection"))


def parse_authority(target: bytes) -> tuple[str, int]:
    """Read the target of CONNECT (RFC 9112, section 3.2.3): a host and a port.

    Returns:
        the host as it came, an IPv6 address without its brackets; and the port.

    Raises:
        BadMessage: it is anything else.
    """
    match = _AUTHORITY.fullmatch(target)
    if match is None or not 0 < int(match[3]) < 65536:
        raise BadMessage("the target of CONNECT must be HOST:PORT")
    return (match[1] or match[2]).decode("ascii"), int(match[3])


def authority_of(host: str, port: int) -> str:
    """Return host and port as CONNECT has them; an IPv6 address is without its brackets before."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_absolute(target: bytes) -> tuple[str, str, int, bytes]:
    """Read the target of a request to a proxy: an http:// URL (RFC 9112, section 3.2.2).

    Returns:
        the authority as a Host field has it, without the default port; the host as it came, an IPv6
        address without its brackets; the port; and path and query, byte for byte.

    Raises:
        BadMessage: it is anything else, such as a URL with a user or of another scheme.
    """
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise BadMessage("the target must be a path, or http://HOST[:PORT]/PATH without a user")
    scheme, port = match[1].lower(), int(match[4] or b"80")
    if scheme == b"https":
        raise BadMessage("https:// is reached with CONNECT")
    if scheme != b"http" or not 0 < port < 65536:
        raise BadMessage("the target must be an http:// URL")
    host = (match[2] or match[3]).decode("ascii")
    authority = f"[{host}]" if match[2] else host
    rest = match[5] or b"/"
    rest = rest if rest.startswith(b"/") else b"/" + rest
    return authority if port == 80 else f"{authority}:{port}", host, port, rest


def is_chunked(values: list[bytes]) -> bool:
    """Return whether ``Transfer-Encoding`` is one line with ``chunked`` and nothing beside it."""
    return [value.lower() for value in values] == [b"chunked"]


def parse_length(values: list[bytes]) -> int | None:
    """Read ``Content-Length`` (RFC 9110, section 8.6): bytes, or None where the field is absent.

    A second value is refused even where it repeats the first: a sender that frames twice cannot be
    trusted to have meant the same.
    """
    if not values:
        return None
    if len(values) > 1 or _DIGITS.fullmatch(values[0]) is None:
        raise BadMessage("the Content-Length is malformed or given twice")
    return int(values[0])
