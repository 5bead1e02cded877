"""Heads that came before: what was found out about one need not be found out again.

A program sends the same head with each of its requests, but for the length of the body.  Whoever
serves a request may keep what its head alone decides (:meth:`Sighting.keep`), and has it at once
when that head comes again: nothing is parsed then.  One changed byte makes another head.

A head holds a key, so neither is kept: heads are told apart by a digest with a key of this
process's own (BLAKE2, RFC 7693).  What is kept is bounded, and belongs to one router: a reload
brings another one, which has seen nothing (ADR-0038).
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import msgspec

MOST = 512
"""Heads that are remembered; when there are more, all are forgotten."""

LONGEST = 4096
"""Bytes of a head that is remembered."""

_LENGTHS = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_LENGTH_SIZE = len(_LENGTHS[0])
_MOST_DIGITS = 18
_DIGEST = 16


class SeenHead(msgspec.Struct, frozen=True):
    """A head that is known, and what its requests have in common.

    Attributes:
        method, target, path: as the request line has them; the path is without a query.
        minor: 0 or 1, of HTTP/1.x.
        persistent: whether the client lets the connection be used again.
        handler: what serves the requests.
        kept: what the handler keeps with each of them from its head on.
        body_limit: the most bytes of their bodies, which are all held.
        found: what the handler found out.
    """

    method: bytes
    target: bytes
    path: bytes
    minor: int
    persistent: bool
    handler: Any
    kept: Any
    body_limit: int
    found: Any


class Sighting(msgspec.Struct, frozen=True):
    """One look at a head that was seen before.

    Attributes:
        heads: whose look it was.
        digest: tells the head from all others, whatever length it announces.
        length: of the body, in bytes.
        seen: what is known of it, or None if nobody kept anything so far.
    """

    heads: SeenHeads
    digest: bytes
    length: int
    seen: SeenHead | None

    def keep(self, seen: SeenHead) -> None:
        """Keep what is known of the head; it holds nothing of the head that is secret."""
        heads = self.heads._heads
        if self.digest in heads:  # else they were all forgotten meanwhile
            heads[self.digest] = seen


class SeenHeads:
    """The heads that one router has seen."""

    def __init__(self) -> None:
        self._keyed = hashlib.blake2b(key=secrets.token_bytes(32), digest_size=_DIGEST)
        self._heads: dict[bytes, SeenHead | None] = {}

    def look(self, head: bytes) -> Sighting | None:
        """Look whether a head came before.

        Args:
            head: without its empty line; it need not be HTTP.

        Returns:
            None where it did not, or where it announces no length in the usual way.
        """
        at = head.find(_LENGTHS[0])
        if at < 0:
            at = head.find(_LENGTHS[1])
        if at < 0 or len(head) > LONGEST:
            return None
        at += _LENGTH_SIZE
        end = head.find(b"\r\n", at)
        if end < 0:
            end = len(head)
        digits = head[at:end]
        if not digits.isdigit() or len(digits) > _MOST_DIGITS:
            return None
        told = self._keyed.copy()
        told.update(head[:at])
        told.update(head[end:])
        digest = told.digest()
        heads = self._heads
        if digest in heads:
            return Sighting(self, digest, int(digits), heads[digest])
        if len(heads) >= MOST:
            heads.clear()
        heads[digest] = None
        return None
