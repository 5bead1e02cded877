"""Lists of models that the proxy makes itself: who asks for one, and how it looks.

OpenAI's and Anthropic's lists stand at ``/v1/models``, with a model of one below it; Ollama's is
``/api/tags``.  All three have members that only a provider knows: a time is the beginning of time,
as Anthropic's reference allows where a release date is unknown, and a size is 0.  Who may use a
model is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from llmproxy.dialects.dialect import Dialect
from llmproxy.errors import ProxyError

Document = dict[str, object]

_ASKED = re.compile(
    rb"(?:/v[0-9][^/]*)?/models(?:/(?P<name>.+))?|(?P<tags>(?:/api)?/tags)", re.DOTALL
)
_NO_TIME = "1970-01-01T00:00:00Z"
_USUAL_LIMIT, _MOST_LIMIT = 20, 1000
"""Models on one page of Anthropic's list."""


class Asked(NamedTuple):
    """What a request asks of a list.

    Attributes:
        name: the one model that it wants, or None for all.
        is_tags: Ollama's list is asked for.
    """

    name: str | None
    is_tags: bool


def asked(path: bytes) -> Asked | None:
    """Return what the path of a read asks for, or None where that is no list of models.

    Args:
        path: raw, as it goes on behind the route's own.
    """
    found = _ASKED.fullmatch(path.removesuffix(b"/"))
    if found is None:
        return None
    name = found["name"]
    return Asked(None if name is None else unquote(name.decode("latin-1")), bool(found["tags"]))


def document(what: Asked, names: Sequence[str], dialect: Dialect, query: bytes) -> Document:
    """Return the list, or the model, that is asked for.

    Args:
        names: the models that the caller may use, in order.
        dialect: the route's.
        query: says which page of Anthropic's list is meant; others have one page.

    Raises:
        ProxyError: 404, there is no such model; 400, there is no such page.
    """
    if what.is_tags:
        return {"models": [_tag(name) for name in names]}
    shape = _of_anthropic if dialect is Dialect.ANTHROPIC else _of_openai
    if what.name is not None:
        if what.name not in names:
            raise ProxyError(404, "no_model", "There is no model of this name in the list.")
        return shape(what.name)
    if dialect is not Dialect.ANTHROPIC:
        return {"object": "list", "data": [shape(name) for name in names]}
    page, has_more = _page(names, dict(parse_qsl(query.decode("latin-1"))))
    return {
        "data": [shape(name) for name in page],
        "has_more": has_more,
        "first_id": page[0] if page else None,
        "last_id": page[-1] if page else None,
    }


def _of_openai(name: str) -> Document:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llmproxy"}


def _of_anthropic(name: str) -> Document:
    return {"type": "model", "id": name, "display_name": name, "created_at": _NO_TIME}


def _tag(name: str) -> Document:
    return {
        "name": name,
        "model": name,
        "modified_at": _NO_TIME,
        "size": 0,
        "digest": sha256(name.encode()).hexdigest(),  # clients take equal ones for one model
        "details": {},
    }


def _page(names: Sequence[str], asked: Mapping[str, str]) -> tuple[Sequence[str], bool]:
    """Return a page of Anthropic's list, and whether there is more in the direction of reading."""
    word = asked.get("limit", str(_USUAL_LIMIT))
    limit = int(word) if word.isascii() and word.isdigit() and len(word) < 5 else 0
    if not 1 <= limit <= _MOST_LIMIT:
        raise _bad(f"limit must be a number from 1 to {_MOST_LIMIT}.")
    if "before_id" in asked and "after_id" in asked:
        raise _bad("after_id and before_id cannot be used together.")
    if "before_id" in asked:
        end = _place(names, asked["before_id"], "before_id")
        return names[max(0, end - limit) : end], end > limit
    first = 0
    if "after_id" in asked:
        first = _place(names, asked["after_id"], "after_id") + 1
    return names[first : first + limit], len(names) > first + limit


def _place(names: Sequence[str], name: str, key: str) -> int:
    if name not in names:
        raise _bad(f"{key} must be the id of a model in the list.")
    return names.index(name)


def _bad(text: str) -> ProxyError:
    return ProxyError(400, "bad_query", text)
