"""Any JSON value, and its many spellings: whitespace and escapes at random."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import strategies as st

KEYS = st.sampled_from(["model", "stream", "a", "Model", '"]}', "\\", ""]) | st.text(max_size=4)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def _string(text: str, rng: random.Random) -> str:
    """Write a JSON string, each character plain or escaped as JSON allows."""
    units = text.encode("utf-16-be").hex()
    written, at = "", 0
    for character in text:
        width = 4 * (1 + (ord(character) > 0xFFFF))
        escapes = "".join(f"\\u{units[i : i + 4]}" for i in range(at, at + width, 4))
        at += width
        plain = json.dumps(character, ensure_ascii=False)[1:-1]
        written += rng.choice([plain, plain, escapes, escapes.upper().replace("\\U", "\\u")])
    return f'"{written}"'


def write(value: Any, rng: random.Random) -> str:
    """Write any JSON value with whitespace and escapes at random."""
    gap = "".join(rng.choices(" \t\n\r", k=rng.choice([0, 0, 1, 2])))
    if isinstance(value, str):
        return gap + _string(value, rng) + gap
    if isinstance(value, list):
        return gap + "[" + ",".join(write(item, rng) for item in value) + gap + "]" + gap
    if isinstance(value, dict):
        pairs = (write(key, rng) + ":" + write(item, rng) for key, item in value.items())
        return gap + "{" + ",".join(pairs) + gap + "}" + gap
    return gap + json.dumps(value) + gap
