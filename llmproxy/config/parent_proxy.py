"""The parent proxy: how it is written, and which hosts are reached past it.

The parent is reached over plain HTTP, and is asked for a tunnel to the provider (ADR-0028).  A
provider's host is compared as its URL has it: no name is looked up for that.  Nothing is read of
the environment.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from llmproxy.config.credentials import Secret
from llmproxy.config.host_pattern import HostPatterns, host_pattern, is_address
from llmproxy.config.url import Url, url
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
    """Read which hosts are reached past the parent proxy, as :class:`DirectHosts` takes them."""
    if not isinstance(value, str):
        raise Wrong(_HOST)
    try:
        if "/" in value:
            return str(ipaddress.ip_network(value))
        if ":" in value and not value.startswith("["):
            return str(ipaddress.IPv6Address(value))
        return host_pattern(value)
    except (ValueError, Wrong):
        raise Wrong(_HOST) from None


class DirectHosts:
    """The hosts that are reached past the parent proxy.

    Args:
        hosts: patterns, addresses and networks, as :func:`direct_host` returns them.
    """

    __slots__ = ("_networks", "_patterns")

    def __init__(self, hosts: Iterable[str]) -> None:
        listed = tuple(hosts)
        self._patterns = HostPatterns(one for one in listed if "/" not in one)
        self._networks = tuple(ipaddress.ip_network(one) for one in listed if "/" in one)

    def match(self, name: str) -> bool:
        """Return whether the host ``name``, as patterns are compared with it, is one of them."""
        if self._patterns.match(name):
            return True
        if not self._networks or not is_address(name):
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False  # a name that ends in digits
        return any(address in one for one in self._networks)
