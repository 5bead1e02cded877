"""Every path that the installed SDKs call stands in docs/endpoints.rst, with what is read of it.

The paths are found in the SDKs' own source, and so is whether a response has counts of tokens: a
release with a new path, or with counts at an old one, fails here until the page says what the tap
makes of it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import anthropic.resources
import google.genai
import openai.resources
import pydantic
import pytest
from packaging.version import Version

from llmproxy.dialects.dialect import Dialect
from llmproxy.dialects.endpoints import TABLE, endpoint

PAGE = Path(__file__).parents[2] / "docs" / "endpoints.rst"

_VERBS = {"_get": "GET", "_post": "POST", "_put": "PUT", "_patch": "PATCH", "_delete": "DELETE"}
_COUNTS = frozenset(
    ("input_tokens", "output_tokens", "prompt_tokens", "completion_tokens", "total_tokens")
)
_TYPES = ("cast_to", "stream_cls", "page", "model")
_NOTHING = "nothing: "


class Call(NamedTuple):
    """What an SDK calls: method, path without the query, and whether a response may have counts."""

    method: str
    path: str
    has_counts: bool = False

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


# -- what the SDKs call ----------------------------------------------------------------------------


def modules_of(package: ModuleType) -> Iterator[ModuleType]:
    """Yield every module of a package."""
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        yield importlib.import_module(info.name)


def calls_in(module: ModuleType) -> Iterator[ast.Call]:
    """Yield every call of a method in a module's source."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


def resource_calls(package: ModuleType) -> Iterator[Call]:
    """Yield what the resources of an SDK of Stainless's make call."""
    for module in modules_of(package):
        for call in calls_in(module):
            assert isinstance(call.func, ast.Attribute)
            given = {one.arg: one.value for one in call.keywords if one.arg}
            verb = call.func.attr
            if verb == "_get_api_list":
                method = ast.literal_eval(given["method"]).upper() if "method" in given else "GET"
            elif verb in _VERBS:
                method = _VERBS[verb]
            else:
                continue
            sources = [ast.unparse(given[name]) for name in _TYPES if name in given]
            sources += [ast.unparse(one) for one in call.args[1:]]
            found = any(has_counts(kind_of(source, module)) for source in sources)
            yield Call(method, path_in(call.args[0]), found)


def path_in(node: ast.expr) -> str:
    """Return the path that an expression gives, without its query."""
    if isinstance(node, ast.Call):  # path_template("/x/{id}", id=id)
        node = node.args[0]
    if isinstance(node, ast.Attribute):
        return f"<{ast.unparse(node)}>"
    path = ast.literal_eval(node)
    assert isinstance(path, str)
    return path.partition("?")[0]


def kind_of(source: str, module: ModuleType) -> Any:
    """Return the type that a piece of source means; what is no type has no counts."""
    names = {**vars(module), "cast": lambda kind, value: value, "Any": Any}
    try:
        return eval(source, names)  # noqa: S307  (it is the source of an SDK that runs here anyway)
    except NameError:  # it depends on the arguments of the call
        return Any


def has_counts(kind: Any, seen: set[Any] | None = None) -> bool:
    """Return whether a type has members that count tokens, at any depth."""
    seen = set() if seen is None else seen
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        if kind in seen:
            return False
        seen.add(kind)
        fields = kind.model_fields
        return bool(_COUNTS & set(fields)) or any(
            has_counts(field.annotation, seen) for field in fields.values()
        )
    inner = [*typing.get_args(kind), *([kind.__value__] if hasattr(kind, "__value__") else [])]
    return any(has_counts(one, seen) for one in inner)


def ollama_calls() -> Iterator[Call]:
    """Yield what Ollama's client calls."""
    for call in calls_in(importlib.import_module("ollama._client")):
        assert isinstance(call.func, ast.Attribute)
        if not call.func.attr.startswith("_request"):
            continue
        words = [part for part in call.args if isinstance(part, ast.Constant | ast.JoinedStr)]
        texts = [
            "".join(
                str(piece.value) if isinstance(piece, ast.Constant) else "{digest}"
                for piece in (word.values if isinstance(word, ast.JoinedStr) else [word])
            )
            for word in words
        ]
        if len(texts) == 2:
            yield Call(texts[0], texts[1])


def gemini_calls() -> Iterator[Call]:
    """Yield the verbs with which Google's SDK calls models; its other paths call none."""
    verb = re.compile(r"'\{model\}(:[A-Za-z]+)")
    for name in ("models", "batches"):
        module = importlib.import_module(f"{google.genai.__name__}.{name}")
        for found in verb.finditer(inspect.getsource(module)):
            yield Call("POST", "/v1beta/models/{model}" + found[1])


class Sdk(NamedTuple):
    """An SDK, the dialect that it speaks, and where its paths are joined to."""

    name: str
    dialect: Dialect
    base: str

    @cache  # noqa: B019  (there are four, and they live as long as the tests)
    def calls(self) -> list[Call]:
        """Return everything that it calls, each once."""
        found = {
            "openai": lambda: resource_calls(openai.resources),
            "anthropic": lambda: resource_calls(anthropic.resources),
            "ollama": ollama_calls,
            "google-genai": gemini_calls,
        }[self.name]()
        calls: dict[str, Call] = {}
        for call in found:
            known = calls.get(str(call), call)
            calls[str(call)] = call._replace(has_counts=known.has_counts or call.has_counts)
        return sorted(calls.values())


SDKS = (
    Sdk("openai", Dialect.OPENAI, "/v1"),
    Sdk("anthropic", Dialect.ANTHROPIC, ""),
    Sdk("ollama", Dialect.OLLAMA, ""),
    Sdk("google-genai", Dialect.GEMINI, ""),
)
every_sdk = pytest.mark.parametrize("sdk", SDKS, ids=lambda sdk: sdk.name)


# -- what the page says ----------------------------------------------------------------------------


@cache
def rows(sdk: str) -> dict[str, str]:
    """Return the table of an SDK: what is read, by ``METHOD PATH`` or ``PATH…``."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.split(f".. paths of {sdk}\n", 1)[1].split("\n.. end of paths\n", 1)[0]
    found = {}
    for line in section.splitlines():
        if cells := re.fullmatch(r"``(.+?)``\s\s+(\S.*)", line):
            assert cells[1] not in found, cells[1]
            found[cells[1]] = cells[2]
    return found


def row_of(call: Call, table: dict[str, str]) -> str | None:
    """Return the row that a call stands in: its own, or the longest one that it begins with."""
    if str(call) in table:
        return str(call)
    if call.has_counts and call.method != "GET":
        return None  # such a path needs a row of its own
    beginnings = [key for key in table if key.endswith("…") and call.path.startswith(key[:-1])]
    return max(beginnings, key=len, default=None)


@every_sdk
def test_every_path_stands_on_the_page(sdk: Sdk) -> None:
    """A call whose response has counts has a row of its own."""
    assert len(sdk.calls()) > 8
    table = rows(sdk.name)
    assert [str(call) for call in sdk.calls() if row_of(call, table) is None] == []


@every_sdk
def test_every_row_is_of_use(sdk: Sdk) -> None:
    """No row stands there for what the SDK does not call, unless a newer release does."""
    used = {row_of(call, rows(sdk.name)) for call in sdk.calls()}
    installed = Version(version(sdk.name))
    for key in set(rows(sdk.name)) - used:
        since = re.search(r"from ([0-9.]+) on", rows(sdk.name)[key])
        assert since, key
        assert installed < Version(since[1]), key


@every_sdk
def test_the_tap_does_what_the_page_says(sdk: Sdk) -> None:
    """A row names the endpoint by which its responses are read, or says why they are not."""
    table = rows(sdk.name)
    for call in sdk.calls():
        key = row_of(call, table)
        assert key is not None
        path = sdk.base + re.sub(r"\{\w+\}", "id-1", call.path)
        row = endpoint(sdk.dialect, path.encode()) if call.method == "POST" else None
        said = table[key]
        name = re.match(r"``(.+?)``", said)
        assert (row and row.name) == (name and name[1]), call
        assert bool(name) is not said.startswith(_NOTHING), call


def test_the_page_says_what_ends_a_stream() -> None:
    """Every endpoint with an end marker is there, and whether that needs its blank line."""
    text = PAGE.read_text(encoding="utf-8")
    section = text.split(".. ends of streams\n", 1)[1].split("\n.. end of ends\n", 1)[0]
    said = dict(re.findall(r"^``(.+?)`` +(``.+?`` +(?:yes|no))$", section, re.MULTILINE))
    words = {True: "yes", False: "no"}
    assert {name: re.sub(" +", " ", end) for name, end in said.items()} == {
        row.name: f"``{row.end_marker}`` {words[row.needs_blank_line]}"
        for row in TABLE.values()
        if row.end_marker is not None
    }


def test_counts_are_found_in_types() -> None:
    """The search goes through lists, unions and further models, and ends."""
    calls = {str(call): call.has_counts for sdk in SDKS[:2] for call in sdk.calls()}
    assert calls["POST /chat/completions"]
    assert calls["POST /responses/compact"]
    assert calls["POST /v1/messages"]
    assert not calls["GET /models"]
    assert not calls["POST /moderations"]


def test_a_path_with_counts_needs_a_row_of_its_own() -> None:
    """A row for many paths is enough only where no tokens are at stake."""
    table = {"/things…": "nothing: administration", "POST /things/{id}": "``x``"}
    assert row_of(Call("POST", "/things/{id}/make"), table) == "/things…"
    assert row_of(Call("POST", "/things/{id}/make", has_counts=True), table) is None
    assert row_of(Call("GET", "/things/{id}", has_counts=True), table) == "/things…"
    assert row_of(Call("POST", "/things/{id}", has_counts=True), table) == "POST /things/{id}"
    assert row_of(Call("POST", "/other"), table) is None
