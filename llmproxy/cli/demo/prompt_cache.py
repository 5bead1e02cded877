"""A prompt cache as providers have one: what it holds, and for how long.

A prompt is cut into blocks of :data:`BLOCK_WORDS` words.  A block is known by all that stands
before it, so that only the beginning of a prompt can be found again, and only if it is the same to
the word.  OpenAI keeps blocks of 128 tokens from 1,024 tokens on, and Anthropic nothing below
1,024; in a demo a prompt of that length would never come, so here the first block counts.  What is
left of a prompt behind its last whole block is neither kept nor found.

This module knows no dialect, no HTTP, no reactor and nothing else of the program.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

BLOCK_WORDS = 16
MOST_BLOCKS = 65_536
KEPT_S = 300.0

_PART_BEGINS = b"\xff"  # no text has this byte in UTF-8


class PromptCache:
    """What one provider remembers of the prompts that it was sent.

    It keeps no text, only digests.

    Args:
        clock: seconds.
        seconds: for how long after its last use a block is kept.
        most: how many blocks are kept; those that were used longest ago are dropped first.
    """

    def __init__(
        self, clock: Callable[[], float], *, seconds: float = KEPT_S, most: int = MOST_BLOCKS
    ) -> None:
        self._clock = clock
        self._seconds = seconds
        self._most = most
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        """How many blocks are held, those that are over included."""
        return len(self._until)

    def use(
        self, account: str, model: str, parts: Sequence[str], kept: int | None = None
    ) -> tuple[int, int]:
        """Find the longest beginning of a prompt that is known, and keep the rest of it.

        Args:
            account: who pays; accounts share nothing.
            model: models share nothing either.
            parts: the texts of the prompt, in order.
            kept: how many of them, from the beginning, may be kept and found; None: all.

        Returns:
            How many words were found, and how many are kept from now on that were not before.  The
            last word of a prompt is never found: something must be read to make a response.
        """
        blocks = _blocks(account, model, parts[:kept])
        words = sum(len(part.split()) for part in parts)
        now = self._clock()
        known = [self._until.get(block, 0.0) > now for block in blocks]
        found = known.index(False) if False in known else len(known)
        # From the end, so that a beginning is never dropped before what builds on it.
        for block in reversed(blocks):
            self._until[block] = now + self._seconds
            self._until.move_to_end(block)
        while len(self._until) > self._most:
            self._until.popitem(last=False)
        read = min(found, max(0, words - 1) // BLOCK_WORDS)
        return read * BLOCK_WORDS, (len(blocks) - found) * BLOCK_WORDS


def _blocks(account: str, model: str, parts: Sequence[str]) -> list[bytes]:
    """The digests of the whole blocks of a prompt."""
    chain = hashlib.blake2b(digest_size=16)
    for name in (account, model):
        chain.update(hashlib.sha256(_bytes(name)).digest())
    blocks, words = [], 0
    for part in parts:
        chain.update(_PART_BEGINS)
        for word in part.split():
            chain.update(b"%s " % _bytes(word))
            words += 1
            if words % BLOCK_WORDS == 0:
                blocks.append(chain.digest())
    return blocks


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
