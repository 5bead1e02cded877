"""Lists of models of our own: which paths ask for one, and how it looks in each API."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.model_list import Asked, asked, document
from llmproxy.errors import ProxyError

ALL, TAGS = Asked(None, False), Asked(None, True)
NAMES = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        (b"/v1/models", ALL),
        (b"/v1/models/", ALL),
        (b"/v1beta/models", ALL),
        (b"/models", ALL),
        (b"/v1/models/gpt-4o", Asked("gpt-4o", False)),
        (b"/v1/models/meta/llama%203%2F1", Asked("meta/llama 3/1", False)),
        (b"/models/a:b", Asked("a:b", False)),
        (b"/api/tags", TAGS),
        (b"/tags", TAGS),
        (b"/v1/models/\xff", Asked("ÿ", False)),
        (b"", None),
        (b"/", None),
        (b"/v1", None),
        (b"/v1/modelsx", None),
        (b"/v1/files/models", None),
        (b"/api/tags/x", None),
        (b"/v1/api/tags", None),
        (b"/v1/x/models/gpt-4o", None),
    ],
)
def test_the_path_says_what_is_asked_for(path: bytes, what: Asked | None) -> None:
    """It is read behind the route's own path; all else is the provider's."""
    assert asked(path) == what


def shown(names: list[str], dialect: Dialect = Dialect.OPENAI, query: bytes = b"") -> Any:
    """Return a list as the client decodes it."""
    return json.loads(json.dumps(document(ALL, names, dialect, query)))


@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.OLLAMA, Dialect.RAW])
def test_openais_list(dialect: Dialect) -> None:
    """It has one page, whatever the query says."""
    a = {"id": "a", "object": "model", "created": 0, "owned_by": "llmproxy"}
    assert shown(["a"], dialect) == {"object": "list", "data": [a]}
    assert len(shown(NAMES, dialect, b"limit=2")["data"]) == 5
    assert document(Asked("a", False), ["a"], dialect, b"") == a


def test_anthropics_list() -> None:
    """Each model has a name to show, and a time that stands for none."""
    time = "1970-01-01T00:00:00Z"
    a = {"type": "model", "id": "a", "display_name": "a", "created_at": time}
    whole = {"data": [a], "has_more": False, "first_id": "a", "last_id": "a"}
    assert shown(["a"], Dialect.ANTHROPIC) == whole
    assert document(Asked("a", False), ["a"], Dialect.ANTHROPIC, b"") == a
    nothing = {"data": [], "has_more": False, "first_id": None, "last_id": None}
    assert shown([], Dialect.ANTHROPIC) == nothing


@pytest.mark.parametrize(
    ("query", "page", "has_more"),
    [
        (b"", "abcde", False),
        (b"limit=2", "ab", True),
        (b"limit=5", "abcde", False),
        (b"limit=2&after_id=b", "cd", True),
        (b"limit=2&after_id=c", "de", False),
        (b"limit=2&after_id=e", "", False),
        (b"limit=2&before_id=d", "bc", True),
        (b"limit=2&before_id=c", "ab", False),
        (b"before_id=a", "", False),
        (b"limit=1000&x=1", "abcde", False),
    ],
)
def test_anthropics_list_has_pages(query: bytes, page: str, has_more: bool) -> None:
    """``has_more`` is about the direction in which the pages are read."""
    found = shown(NAMES, Dialect.ANTHROPIC, query)
    assert [one["id"] for one in found["data"]] == list(page)
    assert found["has_more"] is has_more
    assert (found["first_id"], found["last_id"]) == ((page[0], page[-1]) if page else (None, None))


def test_anthropics_pages_have_twenty_models() -> None:
    """That is its default."""
    found = shown([str(n) for n in range(21)], Dialect.ANTHROPIC)
    assert (len(found["data"]), found["has_more"]) == (20, True)


@pytest.mark.parametrize(
    "query",
    [
        *(b"limit=0", b"limit=1001", b"limit=x", b"limit=-1", b"limit=99999999999"),
        *(b"after_id=z", b"before_id=z", b"after_id=a&before_id=b", "limit=²".encode()),
    ],
)
def test_a_page_that_there_is_not_is_refused(query: bytes) -> None:
    """A client that took a first page for the next one would read for ever."""
    with pytest.raises(ProxyError) as caught:
        shown(NAMES, Dialect.ANTHROPIC, query)
    assert (caught.value.status, caught.value.reason) == (400, "bad_query")


@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.ANTHROPIC])
def test_a_model_that_is_not_in_the_list_is_not_found(dialect: Dialect) -> None:
    """Whether it exists at the provider is not said."""
    with pytest.raises(ProxyError) as caught:
        document(Asked("z", False), NAMES, dialect, b"")
    assert (caught.value.status, caught.value.reason) == (404, "no_model")


def test_ollamas_tags() -> None:
    """Each has a digest of its own, whatever the route's dialect is."""
    for dialect in Dialect:
        found: Any = document(TAGS, ["a", "b"], dialect, b"")
        assert [one["model"] for one in found["models"]] == ["a", "b"]
        assert found["models"][0].keys() == {
            *("name", "model", "modified_at", "size", "digest", "details"),
        }
        assert len({one["digest"] for one in found["models"]}) == 2
