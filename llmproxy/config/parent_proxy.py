"""The parent proxy: how it is written, and which hosts are reached past it.

The parent is reached over plain HTTP, and is asked for a tunnel to the provider (ADR-0028).  A
provider's host is compared as its URL has it: no name is looked up for that.  Nothing is read of
the environment.
"""

from __future__ import annotations

import ipaddress

import msgspec

from llmproxy.config.credentials import Secret
from llmproxy.config.url import Url, host, url
from llmproxy.config.values import Wrong

THIS_MACHINE = ("localhost", "*.localhost", "127.0.0.0/8", "::1")
"""Hosts that a parent would take for its own machine."""

_URL = 'the URL of a proxy, such as "http://proxy.corp.example:3128"'
_HOST = 'a host\'s name or address, "*.DOMAIN" or a network such as "10.0.0.0/8", without a port'


class ParentProxy(msgspec.Struct, frozen=True):
    """The proxy through which a provider is reached; ``credential`` is NAME:PASSWORD."""

    url: Url
    credential: Secret | None = None


def parent_proxy(value: object) -> Url:
    """Read where a parent proxy is reached."""
    if isinstance(value, str) and "@" in value:
        words = f"{_URL}, without a user or password: use `parent_proxy_credential`"
        raise Wrong(words, hidden=True)
    try:
        found = url(value)
    except Wrong as wrong:
        raise Wrong(_URL, hidden=wrong.hidden) from None
    if found.scheme != "http":
        raise Wrong(f"{_URL}: the way to the proxy itself cannot be TLS")
    if found.path:
        raise Wrong(f"{_URL}, without a path")
    return found


def parent_proxy_or_none(value: object) -> Url | str:
    """Read a provider's own parent proxy, or ``"none"``."""
    if value == "none":
        return "none"
    try:
        return parent_proxy(value)
    except Wrong as wrong:
        raise Wrong(f'{wrong.expected}, or "none"', hidden=wrong.hidden) from None


def direct_host(value: object) -> str:
    """Read which hosts are reached past the parent proxy, in the spelling of :func:`is_direct`."""
    if not isinstance(value, str):
        raise Wrong(_HOST)
    try:
        if "/" in value:
            return str(ipaddress.ip_network(value))
        if ":" in value and not value.startswith("["):
            return str(ipaddress.IPv6Address(value))
        found = host(value.removeprefix("*."))
    except (ValueError, Wrong):
        raise Wrong(_HOST) from None
    if not value.startswith("*."):
        return found
    if ":" in found or found.rpartition(".")[2].isdigit():
        raise Wrong(_HOST)  # an address has no names below it
    return f"*.{found}"


def is_direct(name: str, hosts: tuple[str, ...]) -> bool:
    """Return whether one of ``hosts`` means the host ``name`` of a provider's URL."""
    return any(_is_meant(name, one) for one in hosts)


def _is_meant(name: str, one: str) -> bool:
    if one.startswith("*."):
        return name.endswith(one[1:])
    if "/" not in one:
        return name == one
    try:
        return ipaddress.ip_address(name) in ipaddress.ip_network(one)
    except ValueError:
        return False  # a name is no address
