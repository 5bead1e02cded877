"""Hosts in lists of the configuration: one host, or every host below a domain.

A pattern is a host's exact name, or ``*.DOMAIN``: every name below the domain at any depth, and
not the domain itself.  Some lists take addresses, too; an address is an exact host, ``10.1.2.3`` or
``[fd12::1]``.  Names are compared in lower case, without a last dot, and in ASCII: a name in
another script stands there in its A-labels (RFC 5890).  No name is looked up, and ports are not
known here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from llmproxy.config.url import host
from llmproxy.config.values import Wrong

_NAME = 'a host\'s name such as "api.example.com", or "*.example.com" for every name below it'
_OR_ADDRESS = f"{_NAME}, or an address"
_LONGEST = 253
"""Characters of the longest name (RFC 1035): a longer one is no host."""


def host_pattern(value: object, *, addresses: bool = True) -> str:
    """Read a pattern, and return it as it is compared; an IPv6 address loses its brackets.

    Args:
        value: whatever stood in the file.
        addresses: whether an address is a host here, as it is by default.

    Raises:
        Wrong: it is no pattern, has a port, or is an address where only names can be.
    """
    expected = _OR_ADDRESS if addresses else _NAME
    if not isinstance(value, str):
        raise Wrong(expected)
    if value in ("*", "*."):
        raise Wrong(f"{expected}; no pattern stands for all hosts")
    is_below, name = value.startswith("*."), value.removeprefix("*.")
    if "*" in name:
        raise Wrong(f'{expected}; "*" stands for whole labels, and only at the beginning')
    if name.rpartition(":")[2].isdecimal() and name.count(":") == 1:
        raise Wrong(f"{expected}, without a port")
    try:
        found = host(name)
    except Wrong:
        raise Wrong(expected) from None
    if is_address(found):
        if is_below:
            raise Wrong(f"{expected}; an address has no names below it")
        if not addresses:
            raise Wrong(f"{expected}; an address cannot stand here")
    return f"*.{found}" if is_below else found


def host_name_pattern(value: object) -> str:
    """Read a pattern as :func:`host_pattern` does, in a list that takes no addresses."""
    return host_pattern(value, addresses=False)


def as_compared(name: str) -> str:
    """Return a host that a caller names as patterns are compared with it.

    It is lower-case, without brackets and without one last dot.  An IPv6 address is in its shortest
    spelling.  Nothing is checked: what is no host matches no pattern.
    """
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    if ":" in name:
        try:
            return str(ipaddress.IPv6Address(name))
        except ValueError:
            pass
    return name.lower().removesuffix(".")


def is_address(name: str) -> bool:
    """Return whether a host, as it is compared, is an address in its usual spelling."""
    return ":" in name or name.rpartition(".")[2].isdigit()


class HostPatterns:
    """A list of patterns, asked whether a host is on it.

    What a question costs depends on the number of labels of the host, and not on the number of
    patterns.

    Args:
        patterns: as :func:`host_pattern` returns them.
    """

    __slots__ = ("_domains", "_exact")

    def __init__(self, patterns: Iterable[str]) -> None:
        listed = frozenset(patterns)
        self._domains = frozenset(one[2:] for one in listed if one.startswith("*."))
        self._exact = frozenset(one for one in listed if not one.startswith("*."))

    def __bool__(self) -> bool:
        return bool(self._exact or self._domains)

    def match(self, name: str) -> bool:
        """Return whether a pattern stands for ``name``, which is as :func:`as_compared` has it."""
        if len(name) > _LONGEST:
            return False
        if name in self._exact:
            return True
        dot = name.find(".") if self._domains else -1
        while dot > 0:
            if name[dot + 1 :] in self._domains:
                return True
            dot = name.find(".", dot + 1)
        return False
