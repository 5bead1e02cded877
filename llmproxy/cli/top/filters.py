"""Which streams are shown, as somebody types it: ``client=x phase=paused``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

FILTERS = ("client", "route", "provider", "model", "session", "phase")
"""The parameters of ``/streams`` that choose among them."""


class FilterError(Exception):
    """What was typed is no filter."""


def parsed(text: str) -> dict[str, str]:
    """Return the values by the names of what must have them; a word without a name is a client.

    Raises:
        FilterError: it says why.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        raise FilterError("a quote is not closed") from None
    found = dict[str, str]()
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            name, value = "client", word
        if name not in FILTERS:
            raise FilterError(f"there is no {name!r}, but {', '.join(FILTERS)}")
        if name in found or not value:
            raise FilterError(f"expected one {name}")
        found[name] = value
    return found


def written(query: Mapping[str, str]) -> str:
    """Return the filters of a query as they are typed."""
    return " ".join(shlex.quote(f"{name}={query[name]}") for name in FILTERS if name in query)
