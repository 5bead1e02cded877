"""Values that mean something to a proxy: names, header fields, key digests.

Each reader follows the promise of ``values.py``: it returns the value or raises ``Wrong``.  Nothing
here knows a section or a struct.  A value that may be a secret that went astray is never shown.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import socket
import ssl
from collections.abc import Callable, Collection

from llmproxy.config.endpoints import of_instance
from llmproxy.config.url import has_odd_segment, host
from llmproxy.config.values import Wrong, absolute_path, duration, show, token
from llmproxy.http1.headers import KEY_FIELDS, is_owned

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROUTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")
_INSTANCE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PATH = re.compile(r"/[!-~]*")
_HOST_AND_PORT = re.compile(r"(?:[^:]*|\[.*\]):[0-9]*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_PARAMETER = re.compile(r"[A-Za-z0-9._-]{1,64}")
_WORD_MARKS = re.compile(r"[._-]")
_KEY_PARAMETERS = frozenset(
    ("key", "apikey", "xapikey", "accesstoken", "token", "authorization", "subscriptionkey", "sig")
)
_OF_NOTHING = hashlib.sha256().hexdigest()
_NOT_TOKEN = re.compile(r"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")
_FIELD_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")


def instance_name(value: object) -> str:
    """Read the name of one of several daemons."""
    if not isinstance(value, str) or not _INSTANCE.fullmatch(value):
        raise Wrong("up to 64 letters, digits and ._-")
    return value


def file_of_instance(instance: str) -> Callable[[object], str]:
    """Return a reader of a file's absolute path, ``{instance}`` filled in."""

    def read(value: object) -> str:
        if absolute_path(value).endswith("/"):
            raise Wrong("the absolute path of a file")
        return of_instance(str(value), instance)

    return read


def default_via() -> str:
    """Return our pseudonym where the file has none: this host's name, as a token."""
    return "llmproxy-" + _NOT_TOKEN.sub("-", socket.gethostname())


def provider_name(value: object) -> str:
    """Read the name of a provider, which becomes a label of metrics."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise Wrong("a name of up to 64 letters, digits and ._- (the first a letter or a digit)")
    return value


def client_name(value: object) -> str:
    """Read the name of a client, which becomes a label of metrics."""
    if value == "anonymous":
        raise Wrong("another name, as this one is for whoever shows no key")
    return provider_name(value)


def route_name(value: object) -> str:
    """Read the name of a route, which becomes a label of metrics."""
    if not isinstance(value, str) or not _ROUTE_NAME.fullmatch(value):
        raise Wrong("a name of up to 64 letters, digits and ._/- (the first a letter or a digit)")
    return value


_FAILURES = ("connect", "reset", "timeout")


def reference(known: Collection[str], what: str) -> Callable[[object], str]:
    """Return a reader of one of the ``known`` names, which are those of ``what``."""

    def read(value: object) -> str:
        if isinstance(value, str) and value in known:
            return value
        close = difflib.get_close_matches(str(value)[:80], known, n=1)
        hint = f" (did you mean {show(close[0])}?)" if close else ""
        raise Wrong(f"the name of {what}{hint}")

    return read


def route_path(value: object) -> str:
    """Read the path prefix of a route: whole segments, in one spelling."""
    if not isinstance(value, str) or not _PATH.fullmatch(value) or "?" in value or "#" in value:
        raise Wrong('a path of visible ASCII that begins with "/", without "?" or "#"')
    if value != "/" and value.endswith("/"):
        raise Wrong(f"a path without a trailing slash (write {show(value.rstrip('/') or '/')})")
    if value != "/" and has_odd_segment(value):
        raise Wrong('a path without empty, "." or ".." segments, encoded or not')
    if value == "/-" or value.startswith("/-/"):
        raise Wrong('a path other than "/-", which is for the proxy\'s own pages')
    return value


def host_value(value: object) -> str:
    """Read what a Host field may name: no port; IPv6 keeps its brackets."""
    if isinstance(value, str) and _HOST_AND_PORT.fullmatch(value):
        raise Wrong("a host's name or address without a port")
    found = host(value)
    return f"[{found}]" if ":" in found else found


def web_origin(value: object) -> str:
    """Read an origin as browsers write it in ``Origin`` (RFC 6454, section 6.1), or ``*``."""
    if value == "*":
        return "*"
    if not isinstance(value, str) or not _ORIGIN.fullmatch(value.lower()):
        raise Wrong('"*" or an origin such as "https://app.example", without a path')
    scheme, _, place = value.lower().partition("://")
    return f"{scheme}://{place.removesuffix(_DEFAULT_PORTS.get(scheme, ''))}"


def header_name(value: object) -> str:
    """Read the name of the field that carries a credential, in lower case."""
    try:
        lower = token(value).lower()
    except Wrong as wrong:  # it may be a whole "Authorization: Bearer ..." line
        raise Wrong(f"a header's name, {wrong.expected}", hidden=True) from None
    if is_owned(lower.encode("ascii")):
        raise Wrong("a header that neither the proxy nor HTTP's framing owns")
    return lower


def added_header_name(value: object, credential: str) -> str:
    """Read the name of a field that a provider adds; ``credential`` names the one with its key."""
    lower = header_name(value)
    if lower == credential or _carries_key(lower):
        raise Wrong("no header that carries a key here: use `credential`, `header` and `format`")
    return lower


def parameter_name(value: object) -> str:
    """Read the name of a parameter of the query."""
    if not isinstance(value, str) or not _PARAMETER.fullmatch(value):
        raise Wrong("the name of a parameter in letters, digits, `.`, `_` and `-`", hidden=True)
    return value


def added_parameter_name(value: object) -> str:
    """Read the name of a parameter that the proxy adds to the query; none that carries a key."""
    name = parameter_name(value)
    if _WORD_MARKS.sub("", name).lower() in _KEY_PARAMETERS:
        raise Wrong("no parameter that carries a key here: use `credential`, `header` and `format`")
    return name


def parameter_value(value: object) -> str:
    """Read the value of a parameter of the query, which may be empty."""
    if not isinstance(value, str) or not value.isprintable():
        raise Wrong("a string without control characters", hidden=True)
    return value


def key_query(value: object) -> str | None:
    """Read the name of the query's parameter that holds a key: ``true`` is Google's, ``key``."""
    if isinstance(value, bool):
        return "key" if value else None
    if not isinstance(value, str) or not _PARAMETER.fullmatch(value):
        raise Wrong("true, false, or the name of a parameter in letters, digits, `.`, `_` and `-`")
    return value


def argument(value: object) -> str:
    """Read one word of a command line."""
    if not isinstance(value, str) or "\0" in value:
        raise Wrong("a string", hidden=True)
    return value


def time_to_live(value: object) -> float:
    """Read how long a credential is good, in seconds."""
    if (seconds := duration(value)) < 1:
        raise Wrong('a duration of at least "1s"')
    return seconds


def session_header(value: object) -> str:
    """Read the name of the field in which callers name their session, in lower case."""
    lower = header_name(value)
    if _carries_key(lower) or lower == "cookie":
        raise Wrong("a header that carries no key: what it says is recorded")
    return lower


def failure(value: object) -> str | int:
    """Read a failure of a provider's after which the next one is asked."""
    if isinstance(value, str) and value in _FAILURES:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
        return value
    words = ", ".join(map(show, _FAILURES))
    raise Wrong(f"one of {words}, or a status from 400 to 599")


def field_value(value: object) -> str:
    """Read the value of a header field."""
    if not isinstance(value, str) or not _FIELD_VALUE.fullmatch(value):
        raise Wrong("a string of visible ASCII, without control characters", hidden=True)
    return value


def credential_format(value: object) -> str:
    """Read how a credential is written into its field: ``{}`` stands for it."""
    if not isinstance(value, str) or not _FIELD_VALUE.fullmatch(value):
        raise Wrong('visible ASCII with "{}" where the credential goes', hidden=True)
    if "{}" not in value or value.count("{") + value.count("}") != 2:
        raise Wrong('exactly one "{}", where the credential goes', hidden=True)
    return value


def visible(value: object) -> str:
    """Read a name of visible ASCII."""
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]{1,128}", value):
        raise Wrong("1 to 128 characters of visible ASCII")
    return value


def certificates(value: object) -> str:
    """Read the path of a PEM file of certificates, which is opened to see that it is one."""
    path = absolute_path(value)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        raise Wrong(f"a PEM file of certificates ({error.strerror or error})") from None
    return path


def digest(client: str) -> Callable[[object], bytes]:
    """Return a reader of the SHA-256 digest of a key of ``client``."""

    def read(value: object) -> bytes:
        found = _DIGEST.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise Wrong(f'"sha256:" and 64 lower-case hex digits; {key_hint(client)}', hidden=True)
        if found[1] == _OF_NOTHING:  # an empty field counts as no key
            raise Wrong(f"the digest of a key that is not empty; {key_hint(client)}", hidden=True)
        return bytes.fromhex(found[1])

    return read


def key_hint(client: str) -> str:
    """Return how an operator gets a key for ``client`` and its line for the file."""
    named = client if _NAME.fullmatch(client) and client != "anonymous" else "NAME"
    return (
        f"`llmproxy keys new {named}` makes a key and prints this line; "
        "`llmproxy keys hash` prints it for a key that is there"
    )


def _carries_key(name: str) -> bool:
    return name.encode("ascii") in KEY_FIELDS
