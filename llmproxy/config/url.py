"""The URL of a provider: the struct, and its strict reader.

What a URL may hold is what a request's head can carry unchanged: no user, query or fragment, a
host that names one place in one spelling, and a path that needs no encoding.
"""

from __future__ import annotations

import ipaddress
import re

import idna
import msgspec

from llmproxy.config.values import Wrong
from llmproxy.http1.path import has_dot_segment

_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)", re.IGNORECASE)
_AFTER_SCHEME = re.compile(r"[/?#]")
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PATH = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})*")  # RFC 3986, pchar
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Url(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's URL: lower-case host without brackets, path without a last slash."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def netloc(self) -> str:
        """``host[:port]`` as a Host field wants it: no default port, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


def url(value: object) -> Url:
    """Read an http:// or https:// URL.

    Raises:
        Wrong: it is none, or holds what cannot be used; a part that may be a secret (a user, a
            query) is not shown.
    """
    if not isinstance(value, str):
        raise Wrong("an http:// or https:// URL")
    if "@" in _AFTER_SCHEME.split(value.partition("://")[2])[0]:
        raise Wrong("a URL without a user or password: use `credential`", hidden=True)
    if "?" in value or "#" in value:
        raise Wrong("a URL without a query or fragment", hidden=True)
    found = _URL.fullmatch(value)
    if found is None or not found[2]:
        raise Wrong("an http:// or https:// URL", hidden="@" in value)
    scheme, path = found[1].lower(), found[3].removesuffix("/")
    split = _AUTHORITY.fullmatch(found[2])
    port = int(split[2] or _DEFAULT_PORTS[scheme]) if split else 0
    if split is None or not 1 <= port <= 65535:
        raise Wrong("a URL with HOST or HOST:PORT, the port from 1 to 65535")
    if not _PATH.fullmatch(path) or has_odd_segment(path):
        raise Wrong("a URL whose path is visible ASCII without empty, `.` or `..` segments")
    return Url(scheme=scheme, host=_host(split[1]), port=port, path=path)


def host(value: object) -> str:
    """Read a host's name or address, and return it lower-case, in ASCII, without brackets."""
    if not isinstance(value, str):
        raise Wrong("a host's name or address")
    return _host(value)


def has_odd_segment(path: str) -> bool:
    """Tell whether ``path`` (ASCII) has an empty, ``.`` or ``..`` segment, in any disguise."""
    return has_dot_segment(path.encode("ascii")) or "" in path.split("/")[1:]


def _host(name: str) -> str:
    expected = "a host's name or address"
    try:
        if name.startswith("[") and name.endswith("]") and "%" not in name:
            return str(ipaddress.IPv6Address(name[1:-1]))
        if not name.isascii():
            name = idna.encode(name, uts46=True).decode("ascii")
        name = name.lower()
        if name.rpartition(".")[2].isdigit():
            return str(ipaddress.IPv4Address(name))
    except ValueError:  # idna.IDNAError and ipaddress.AddressValueError are ValueErrors too
        raise Wrong(expected) from None
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise Wrong(expected)
    return name
