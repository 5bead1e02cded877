"""Endpoints to listen on: Twisted's notation, checked without a reactor and without a socket.

What cannot be listened on is refused here, with words that say how it is written, instead of by the
start with those of Twisted's parser.  Only whether an address is free, and whether systemd handed
the socket over, is left to the start.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping

from llmproxy.config.values import Wrong, text

_KINDS = frozenset({"tcp", "tcp6", "ssl", "tls", "unix", "systemd", "haproxy"})
"""Server endpoints that make sense for a daemon."""

_PORTED = frozenset({"tcp", "tcp6", "ssl", "tls"})
_POSITIONS = {
    "tcp": ("port", "interface", "backlog"),
    "systemd": ("domain", "index", "name"),
    "unix": ("address", "mode", "backlog"),
}
_SAMPLES = (
    '"tcp:8080:interface=127.0.0.1", "unix:/run/llmproxy.sock" or "systemd:domain=INET:name=proxy"'
)
_IPV6 = (
    "an IPv6 address with a backslash before each colon, in single quotes: "
    r"'tcp6:8080:interface=\:\:1'"
)
_ADDED = {**dict.fromkeys(("tcp", "tcp6", "ssl", "tls"), ("backlog",)), "unix": ("backlog", "mode")}
_DOMAINS = ("INET", "INET6", "UNIX")

_PIECE = re.compile(r"((?:\\.|[^:\\])*)(?::|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"((?:\\.|[^=\\])*)=(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_UNKNOWN = re.compile(r"unexpected keyword argument '(.*?)'")


def endpoint(instance: str) -> Callable[[object], str]:
    """Return a reader of Twisted's server endpoints, ``{instance}`` filled in."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not _has_shape(value):
            raise Wrong(f"an endpoint such as {_SAMPLES}")
        filled = of_instance(text(value), instance)
        _refuse(filled.removeprefix("haproxy:"))
        return filled

    return read


def endpoint_for_tls(instance: str) -> Callable[[object], str]:
    """Return a reader of endpoints below TLS, which is ended with the listener's own key."""
    below = endpoint(instance)

    def read(value: object) -> str:
        if isinstance(value, str) and value.removeprefix("haproxy:").startswith(("ssl:", "tls:")):
            raise Wrong('an endpoint without TLS of its own, such as "tcp:8443"')
        return below(value)

    return read


def socket_path(endpoint: str) -> str | None:
    """Return where an endpoint that was read puts its Unix socket, or None if it has none."""
    kind, _, rest = endpoint.removeprefix("haproxy:").partition(":")
    return _arguments(kind, rest).get("address") if kind == "unix" else None


def of_instance(value: str, instance: str) -> str:
    """Return ``value`` with ``{instance}`` filled in; it may hold no other braces."""
    filled = value.replace("{instance}", instance)
    if "{" in filled or "}" in filled:
        raise Wrong('no braces but those of "{instance}"')
    return filled


def _has_shape(value: str) -> bool:
    kind, _, arguments = value.partition(":")
    if kind == "haproxy":
        return not arguments.startswith("haproxy:") and _has_shape(arguments)
    return kind in _KINDS and bool(arguments)


def _refuse(endpoint: str) -> None:
    """Refuse an endpoint that the start would refuse.

    Raises:
        Wrong: it says what is expected.
    """
    kind, _, rest = endpoint.partition(":")
    arguments = _arguments(kind, rest)
    if kind == "systemd":
        _refuse_inherited(arguments)
        return
    if kind in _PORTED:
        port = arguments.get("port", "")
        if not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) <= 65535):
            raise Wrong(f"an endpoint such as {_SAMPLES}, with a port from 0 to 65535")
        interface = arguments.get("interface", "")
        if (":" in interface or "[" in interface) and not _is_ipv6(interface):
            raise Wrong(_IPV6)
    # Not at the top: the other commands read no endpoint.
    from twisted.internet.endpoints import serverFromString

    for name in _ADDED.get(kind, ()):  # as ``server/listen.py`` does
        if f":{name}=" not in endpoint:
            endpoint += f":{name}=1"
    try:
        serverFromString(None, endpoint)
    except Exception as error:
        if kind in _PORTED and ("::" in rest or "[" in rest):
            raise Wrong(_IPV6) from None
        raise _wrong(kind, error) from None


def _refuse_inherited(arguments: Mapping[str, str]) -> None:
    """Refuse what names no socket of systemd's; whether it is there, only the start can tell."""
    for name in arguments:
        if name not in _POSITIONS["systemd"]:
            raise Wrong(f"an endpoint such as {_SAMPLES} (it takes no `{name}`)")
    if arguments.get("domain") not in _DOMAINS:
        raise Wrong("`domain` with one of " + ", ".join(_DOMAINS[:-1]) + f" or {_DOMAINS[-1]}")
    if ("name" in arguments) == ("index" in arguments):
        raise Wrong("just one of `name` and `index`")


def _arguments(kind: str, rest: str) -> dict[str, str]:
    """Return the arguments by their names, those without one by where they stand."""
    names = list(_POSITIONS.get(kind, ("port",)))
    found = {}
    for piece in (one[1] for one in _PIECE.finditer(rest)):
        named = _ARGUMENT.fullmatch(piece)
        if named is not None:
            found[named[1]] = _ESCAPED.sub(r"\1", named[2])
        elif names and (name := names.pop(0)) and piece:
            found[name] = _ESCAPED.sub(r"\1", piece)
    return found


def _is_ipv6(interface: str) -> bool:
    try:
        ipaddress.IPv6Address(interface)
    except ValueError:
        return False
    return True


def _wrong(kind: str, error: Exception) -> Wrong:
    """Return what an operator reads instead of the words of Twisted's parser."""
    unknown = _UNKNOWN.search(str(error))
    if unknown is not None:
        why = f"it takes no `{unknown[1]}`"
    elif isinstance(error, TypeError):
        why = f"these are not the arguments of `{kind}:`"
    else:
        why = str(error)
    return Wrong(f"an endpoint such as {_SAMPLES} ({why})")
