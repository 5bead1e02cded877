"""What becomes of a query on its way to a provider.

A query crosses byte for byte, but for the parameters that an operator drops or adds (ADR-0018).
Names are compared decoded and in any case, as the laxest server reads them.  This module knows no
provider and no client, only names.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from urllib.parse import quote, unquote_to_bytes

_BETWEEN = re.compile(rb"([&;])")  # some servers take a semicolon for an ampersand


class QueryRewriter:
    """What crosses towards one provider, prepared once for all requests.

    Args:
        dropped: names of parameters that do not cross.
        defaults: parameters that are added where the client sent none of that name; names and
            values as they are, not encoded.
    """

    def __init__(self, dropped: Iterable[str], defaults: Iterable[tuple[str, str]]) -> None:
        self._dropped = names_of(dropped)
        self._defaults = [
            (_name(name.encode()), f"{quote(name, safe='')}={quote(value, safe='')}".encode())
            for name, value in defaults
        ]

    def for_provider(self, query: bytes) -> bytes:
        """Return the query for the provider; both are empty, or begin with a question mark."""
        if self._dropped:
            query = without(query, self._dropped)
        sent = {_name(piece) for piece in query[1:].split(b"&")}
        added = b"&".join(piece for name, piece in self._defaults if name not in sent)
        if not added:
            return query
        if not query:
            return b"?" + added
        return query + added if query.endswith((b"?", b"&")) else query + b"&" + added


def names_of(parameters: Iterable[str]) -> frozenset[bytes]:
    """Return the names of parameters as :func:`without` takes them."""
    return frozenset(_name(one.encode()) for one in parameters)


def without(target: bytes, names: Container[bytes]) -> bytes:
    """Return ``target``, a path with or without its query, without some parameters of the query.

    Args:
        target: raw; the path may be empty.
        names: from :func:`names_of`.
    """
    path, mark, query = target.partition(b"?")
    between, *parts = (b"&", *_BETWEEN.split(query))
    kept = []
    for at in range(0, len(parts), 2):
        if _name(parts[at]) not in names:
            kept.append(between + parts[at])
        between = parts[at + 1] if at + 1 < len(parts) else b""
    if 2 * len(kept) == len(parts) + 1:
        return target
    rest = b"".join(kept)[1:]
    return path + mark + rest if rest else path


def _name(piece: bytes) -> bytes:
    """Return the name in a piece of a query, decoded, in lower case."""
    name = piece.partition(b"=")[0]
    return unquote_to_bytes(name.replace(b"+", b" ")).strip().lower()
