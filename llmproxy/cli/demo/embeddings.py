"""The demo provider's OpenAI embeddings.

It knows the published shapes of that endpoint and what ``dialect.py`` offers; no HTTP, no reactor.
"""

from __future__ import annotations

from typing import Any

from llmproxy.cli.demo.dialect import Clock, Document, Endpoint
from llmproxy.cli.demo.openai import OPENAI
from llmproxy.cli.demo.reading import dimensions_of, model_named, texts_of
from llmproxy.cli.demo.response import Asked, Response
from llmproxy.cli.demo.vector import as_base64, vector


class Embeddings(Endpoint):
    """``POST /v1/embeddings``: a vector for each text, each in the time of one token."""

    dialect = OPENAI

    def ask(self, body: dict[str, Any]) -> Asked:
        """Read an embedding request; ``encoding_format`` is honoured."""
        return Asked(
            model=model_named(body),
            stream=False,
            prompt=texts_of(body, "input"),
            said="",
            user_last=False,
            dimensions=dimensions_of(body),
            base64=body.get("encoding_format") == "base64",
        )

    def document(self, response: Response, ask: Asked, clock: Clock) -> Document:
        """The vectors in the order of their texts, and the words of all texts."""
        vectors = [vector(text, ask.dimensions) for text in ask.prompt]
        data = [
            {"object": "embedding", "index": at, "embedding": as_base64(one) if ask.base64 else one}
            for at, one in enumerate(vectors)
        ]
        tokens = response.prompt_tokens
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": response.model, "usage": usage}

    def work(self, response: Response, ask: Asked) -> int:
        """A token's time for each text."""
        return len(ask.prompt)
