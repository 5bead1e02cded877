"""What the demo provider embeds a text as: a vector that depends on the text alone.

This module knows no dialect, no HTTP, no reactor and nothing else of the program.
"""

from __future__ import annotations

import base64
import hashlib
import math
import struct


def vector(text: str, dimensions: int) -> list[float]:
    """So many numbers, together of length 1, each of them exactly a 32-bit float."""
    data = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(4 * dimensions)
    raw = [number / 2**31 for number in struct.unpack(f"<{dimensions}i", data)]
    length = math.hypot(*raw) or 1.0
    return list(struct.unpack(f"<{dimensions}f", _packed([number / length for number in raw])))


def as_base64(numbers: list[float]) -> str:
    """The numbers as base64 of little-endian 32-bit floats, as OpenAI writes them."""
    return base64.b64encode(_packed(numbers)).decode("ascii")


def _packed(numbers: list[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)
