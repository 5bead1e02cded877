"""Where each dialect keeps text, usage, model, end marker and errors: a table of endpoints.

A row is an :class:`Endpoint`; :func:`endpoint` finds it by the path.  A module for each API holds
the shapes that are decoded, with the members that are read and no others, and the functions that
read them into :class:`~llmproxy.stream.gathered.Accumulated`.

A decoder with a type passes over all that it does not want at a speed which no search for a word in
the bytes reaches (0.4 µs for a chunk of 300 bytes; five searches take 1.2 µs).  So events are
decoded, but for those whose name says that they carry text alone.  That also means that nothing can
be missed, and nothing in a text be mistaken for something else.

Nothing here knows HTTP, framing or the tap.
"""

from __future__ import annotations

from llmproxy.dialects import anthropic, ollama, openai, openai_responses
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import DONE, Endpoint, is_whole

__all__ = ["DONE", "TABLE", "Endpoint", "endpoint", "is_whole"]

_OPENAI: dict[bytes, Endpoint] = {
    b"chat/completions": openai.CHAT,
    b"completions": openai.COMPLETIONS,
    b"embeddings": openai.EMBEDDINGS,
    b"responses": openai_responses.RESPONSES,
}

TABLE: dict[Dialect, dict[bytes, Endpoint]] = {
    Dialect.OPENAI: _OPENAI,
    Dialect.ANTHROPIC: {b"messages": anthropic.MESSAGES, **_OPENAI},
    Dialect.OLLAMA: {
        b"api/chat": ollama.CHAT,
        b"api/generate": ollama.GENERATE,
        b"api/embed": ollama.EMBED,
        **_OPENAI,
    },
    Dialect.RAW: {},
}
"""The endpoints of each dialect, by the last one or two segments of their paths.

Anthropic and Ollama offer OpenAI's API beside their own.
"""


def endpoint(dialect: Dialect, path: bytes) -> Endpoint | None:
    """Return the row that a path names, or None where its responses are not read.

    Args:
        dialect: the provider's.
        path: raw; whatever stands before the last segments, and a query, do not matter.
    """
    rows = TABLE[dialect]
    segments = path.partition(b"?")[0].removesuffix(b"/").rsplit(b"/", 2)
    return rows.get(b"/".join(segments[-2:])) or rows.get(segments[-1])
