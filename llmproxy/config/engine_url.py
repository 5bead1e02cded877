"""Where the engine is that several processes share: Redis or Valkey."""

from __future__ import annotations

import re

import msgspec

from llmproxy.config.url import host
from llmproxy.config.values import Wrong

_URL = re.compile(r"(rediss?)://(\[[^\[\]/]*\]|[^:/?#\[\]@]+)(?::([0-9]{1,5}))?(?:/([0-9]{1,4})?)?")
_SOCKET = re.compile(r"unix://(/[\x21-\x7e]+)")
_WORDS = "redis://HOST:PORT/DATABASE, rediss:// likewise, or unix:///PATH"


class EngineUrl(msgspec.Struct, frozen=True, kw_only=True):
    """An engine: by TCP, by TLS, or through a Unix socket.

    Attributes:
        path: of the socket; "" where there is a host.
        database: its number.
    """

    host: str = ""
    port: int = 0
    tls: bool = False
    path: str = ""
    database: int = 0

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"redis{'s' * self.tls}://{name}:{self.port}/{self.database}"


def engine_url(value: object) -> EngineUrl:
    """Read the URL of an engine.

    Raises:
        Wrong: it is none; a user or a password is not shown.
    """
    if not isinstance(value, str):
        raise Wrong(_WORDS)
    if "@" in value:
        raise Wrong("a URL without a user or password: use `user` and `credential`", hidden=True)
    if (socket := _SOCKET.fullmatch(value)) is not None:
        return EngineUrl(path=socket[1])
    found = _URL.fullmatch(value)
    if found is None:
        raise Wrong(_WORDS)
    port = int(found[3] or 6379)
    if not 1 <= port <= 65535:
        raise Wrong("a port from 1 to 65535")
    name = host(found[2])
    return EngineUrl(host=name, port=port, tls=found[1] == "rediss", database=int(found[4] or 0))
