"""Where tunnels may lead: a pattern of hosts, and a port or all of them.

How a host is compared is ``host_pattern.py``'s; whether its address may be reached is another
question, which ``net/addresses.py`` answers for what a name turns out to be.
"""

from __future__ import annotations

import re

import msgspec

from llmproxy.config.host_pattern import host_pattern
from llmproxy.config.values import Wrong

_TARGET = 'HOST:PORT, such as "packages.example.org:443", "*.example.com:443" or "[fd12::1]:443"'
_PORT = re.compile(r"[0-9]{1,5}")


class TunnelTarget(msgspec.Struct, frozen=True):
    """Where a tunnel may lead; ``port`` is None for every port."""

    host: str
    port: int | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{'*' if self.port is None else self.port}"


def tunnel_target(value: object) -> TunnelTarget:
    """Read a pattern of hosts with a port; ``*`` is every port.

    Raises:
        Wrong: it is none, or has no port.
    """
    if not isinstance(value, str) or "://" in value or "/" in value:
        raise Wrong(f"{_TARGET}, without a scheme or a path")
    host, colon, port = value.rpartition(":")
    if not colon or "]" in port or (":" in host and not host.startswith("[")):
        address = ":" in value and not value.startswith("[")
        if address:
            raise Wrong(f"{_TARGET}: an IPv6 address stands in brackets")
        raise Wrong(f'{_TARGET}: a port, or "*" for every port')
    if port != "*" and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535):
        raise Wrong(f'{_TARGET}: a port from 1 to 65535, or "*" for every port')
    try:
        return TunnelTarget(host_pattern(host), None if port == "*" else int(port))
    except Wrong as wrong:
        raise Wrong(f"HOST:PORT, and as HOST {wrong.expected}") from None
