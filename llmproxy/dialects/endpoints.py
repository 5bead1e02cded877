"""The table of endpoints: what the path of a request says, for every dialect.

A row is an :class:`Endpoint`, and :func:`endpoint` finds it by the end of the path.  The request
learns from the row whether it asks for a stream (``request.py``) and whether it must ask for its
token counts (``include_usage.py``); the tap learns how to read the response, the span what was
done.  The modules ``openai.py``, ``openai_responses.py``, ``openai_others.py``, ``anthropic.py``,
``ollama.py`` and ``gemini.py`` make the rows.  Each holds the shapes that are decoded, with only
the members that are read, and the functions that read them into
:class:`~llmproxy.dialects.accumulated.Accumulated`.

Why events are decoded and not searched: a decoder with a type passes over all other members faster
than any search for a word in the bytes (0.4 µs for a chunk of 300 bytes; five searches take
1.2 µs).  So all events are decoded but those whose name says that they hold text alone.  Nothing
can be missed this way, and nothing inside a text can be mistaken for something else.

Nothing here knows HTTP, framing or the tap.
"""

from __future__ import annotations

import re
from functools import partial

from llmproxy.dialects import (
    anthropic,
    gemini,
    ollama,
    openai,
    openai_others,
    openai_responses,
)
from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoint import Endpoint
from llmproxy.http1.known import known

TABLE: dict[bytes, Endpoint] = {
    b"chat/completions": openai.CHAT,
    b"completions": openai.COMPLETIONS,
    b"embeddings": openai.EMBEDDINGS,
    b"responses": openai_responses.RESPONSES,
    b"responses/compact": openai_responses.COMPACT,
    b"decisions": openai_others.DECISIONS,
    b"images/generations": openai_others.IMAGES,
    b"images/edits": openai_others.IMAGES,
    b"images/variations": openai_others.IMAGES,
    b"audio/transcriptions": openai_others.TRANSCRIPTIONS,
    b"threads/runs": openai_others.RUNS,
    b"v1/messages": anthropic.MESSAGES,
    b"api/chat": ollama.CHAT,
    b"api/generate": ollama.GENERATE,
    b"api/embed": ollama.EMBED,
    b"v1/systemone": ollama.SYSTEMONE,
    b":generateContent": gemini.GENERATE,
    b":streamGenerateContent": gemini.STREAM,
    b":embedContent": gemini.EMBED,
    b":batchEmbedContents": gemini.EMBED,
}
"""The endpoints by the last one or two segments of their paths, at a provider of any dialect.

A key with a colon is a verb of Google's: it ends the last segment, behind the name of a model.

llama.cpp, vLLM, LM Studio and Ollama offer the APIs of the others beside their own.
"""

_ANTHROPIC = {b"messages": anthropic.MESSAGES, **TABLE}
"""Elsewhere ``messages`` alone may be another thing: a thread of OpenAI's assistants has some."""

_VERB = re.compile(rb"(?::|%3[Aa])([A-Za-z]+)\Z")

_ALONE = (b"v1/messages", b"api/chat", b"api/generate", b"api/embed")
"""Paths whose last segment alone says enough for a span."""

_BY_LAST_SEGMENT = {key.rpartition(b"/")[2]: TABLE[key] for key in _ALONE} | TABLE

_RUN = re.compile(rb"threads/[^/]+/runs(?:/[^/]+/submit_tool_outputs)?\Z")
"""A run of a thread that exists."""


def endpoint(dialect: Dialect, path: bytes) -> Endpoint | None:
    """Return the row that a path names, or None where its responses are not read.

    Args:
        dialect: the provider's.  Of a ``raw`` one nothing is known; all others may have any row.
        path: raw.  What stands before the last two segments does not matter; nor does a query.
    """
    if dialect is Dialect.RAW:
        return None
    return _of_anthropic(path) if dialect is Dialect.ANTHROPIC else _of_others(path)


def endpoint_of_record(path: bytes) -> Endpoint | None:
    """Return the row of a request's path, or None where no endpoint is known.

    A span wants this also of a request that reached no provider, so no dialect is asked for: the
    last segment of an endpoint is enough, unless it may be another thing.
    """
    return _row(_BY_LAST_SEGMENT, path)


def _row(rows: dict[bytes, Endpoint], path: bytes) -> Endpoint | None:
    path = _RUN.sub(b"threads/runs", path.partition(b"?")[0].removesuffix(b"/"))
    segments = path.rsplit(b"/", 2)
    last = segments[-1]
    found = rows.get(b"/".join(segments[-2:])) or rows.get(last)
    if found is None and (verb := _VERB.search(last)):
        return rows.get(b":" + verb[1])
    return found


_of_anthropic = known(256)(partial(_row, _ANTHROPIC))
_of_others = known(256)(partial(_row, TABLE))
