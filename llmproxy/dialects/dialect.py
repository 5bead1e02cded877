"""The dialects: which shapes a provider may speak.

A dialect is an argument almost everywhere: the configuration names that of each provider, and the
other modules of this folder say what it means.  This module knows nothing else.
"""

from __future__ import annotations

from enum import StrEnum


class Dialect(StrEnum):
    """The shape that a provider speaks; ``raw`` is one of which nothing is known."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"
    GEMINI = "gemini"
    RAW = "raw"
