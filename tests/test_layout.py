"""The order of the folders; no import goes against it, and there is no circle (ADR-0015)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The rooms, from the outside to the inside: a folder, or a single module.  An import stays in its
# room or goes down this list, never back.  Inside a room no order is prescribed.
ORDER = (
    "llmproxy",
    "llmproxy.cli",
    "llmproxy.service",
    "llmproxy.ops",
    "llmproxy.admin",
    "llmproxy.gateway",
    "llmproxy.record",
    "llmproxy.shared",
    "llmproxy.policy",
    "llmproxy.upstream",
    "llmproxy.server",
    "llmproxy.stream",
    "llmproxy.config",
    "llmproxy.dialects",
    "llmproxy.http1",
    "llmproxy.net",
    "llmproxy.errors",
    "llmproxy.version",
)

MOST_LINES = 650
# Modules that are longer, each with the reason why it is still one concept.
LONGER = {
    "llmproxy.config.settings": "every key of the file is declared once, in one list",
    "llmproxy.server.connection": "its phases share one table, and each other's state",
}


def modules(root: Path) -> dict[str, str]:
    """The source of each module below ``root/llmproxy``, by its dotted name."""
    found = {}
    for path in sorted((root / "llmproxy").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def needless(reasons: dict[str, str], sources: dict[str, str]) -> list[str]:
    """The modules with a reason to be long that are not long, or not there."""
    return [name for name in reasons if sources.get(name, "").count("\n") <= MOST_LINES]


def room(name: str) -> str:
    """The room that a module stands in: itself, or the folder right below the program's."""
    return ".".join(name.split(".")[:2])


def imports(name: str, source: str, known: frozenset[str], *, package: bool) -> Iterator[str]:
    """The modules of the program that a module imports, at whatever depth the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                above = parts[: len(parts) + package - node.level]
                base = ".".join([*above, base] if base else above)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in known else base for target in inner]
        else:
            continue
        yield from (target for target in targets if target.partition(".")[0] == "llmproxy")


def breaches(sources: dict[str, str]) -> list[str]:
    """What is wrong with the layout of these modules, one sentence each."""
    found = []
    known = frozenset(ORDER) | frozenset(sources)
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        if room(name) not in ORDER:
            found.append(f"{name} has no place in the order")
            continue
        length = source.count("\n")
        if length > MOST_LINES and name not in LONGER:
            found.append(f"{name} has {length} lines and no reason for more than {MOST_LINES}")
        package = (ROOT / name.replace(".", "/")).is_dir()
        graph[name] = set(imports(name, source, known, package=package))
        for target in sorted(graph[name]):
            if room(target) not in ORDER:
                found.append(f"{name} imports {target}, which has no place in the order")
            elif ORDER.index(room(target)) < ORDER.index(room(name)):
                found.append(f"{name} imports {target}, which stands before it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        found.append("a circle of imports: " + " <- ".join(circle.args[1]))
    return found


def test_every_import_goes_down_the_order() -> None:
    """No room imports one that stands before it, there is no circle, and no module is overlong."""
    sources = modules(ROOT)
    assert "llmproxy.errors" in sources
    found = breaches(sources)
    assert not found, "\n".join(found)


def test_every_room_has_somebody_in_it() -> None:
    """A room without a module has no place in the order."""
    inhabited = {room(name) for name in modules(ROOT)}
    assert [one for one in ORDER if one not in inhabited] == []


@pytest.mark.parametrize(
    ("name", "statement", "target"),
    [
        ("llmproxy.http1.grammar", "import llmproxy.server.site", "llmproxy.server.site"),
        ("llmproxy.http1.grammar", "from llmproxy.server import site", "llmproxy.server"),
        ("llmproxy.http1.grammar", "from llmproxy.server.site import S", "llmproxy.server.site"),
        ("llmproxy.stream.tap", "from ..server import site", "llmproxy.server"),
        ("llmproxy.stream", "from ..server import site", "llmproxy.server"),
        ("llmproxy.stream.tap", "from ..server.site import Site", "llmproxy.server.site"),
        ("llmproxy.errors", "from llmproxy import __version__", "llmproxy"),
        ("llmproxy.errors", "def f():\n    import llmproxy.config", "llmproxy.config"),
        (
            "llmproxy.errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import config",
            "llmproxy.config",
        ),
    ],
)
def test_an_import_against_the_order_is_found(name: str, statement: str, target: str) -> None:
    """Each way to write an import that goes back is seen."""
    assert breaches({name: statement}) == [f"{name} imports {target}, which stands before it"]


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("llmproxy.gateway.gateway", "from llmproxy.stream.relay import Relay"),
        ("llmproxy.gateway.gateway", "from llmproxy import errors"),
        ("llmproxy.server", "from .site import Site"),
        ("llmproxy.stream.tap", "from .relay import Relay"),
        ("llmproxy.stream.tap", "from ..http1 import grammar"),
        ("llmproxy", "from .config import load"),
        ("llmproxy.errors", "import msgspec, twisted.internet"),
    ],
)
def test_an_import_in_or_down_the_order_is_none(name: str, statement: str) -> None:
    """What stays in its room, goes down the order, or out of the program, is no breach."""
    assert breaches({name: statement}) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"llmproxy.errors": "import llmproxy.errors"},
        {
            "llmproxy.net.tcp": "from llmproxy.net.tls import TlsTransport",
            "llmproxy.net.tls": "def f():\n    from . import tcp",
        },
    ],
)
def test_a_circle_is_found(sources: dict[str, str]) -> None:
    """Modules that import each other are a breach, inside a room and inside a function, too."""
    (breach,) = breaches(sources)
    assert breach.startswith("a circle of imports: ")
    assert all(name in breach for name in sources)


def test_an_unplaced_module_is_found() -> None:
    """A module outside of every room is a breach, and so is an import of one."""
    assert breaches({"llmproxy.util": ""}) == ["llmproxy.util has no place in the order"]
    assert breaches({"llmproxy.config": "from llmproxy.wire.missing import x"}) == [
        "llmproxy.config imports llmproxy.wire.missing, which has no place in the order"
    ]


def test_an_overlong_module_is_found() -> None:
    """The line after the last allowed one is a breach where no reason is given."""
    assert breaches({"llmproxy.errors": "#\n" * MOST_LINES}) == []
    assert breaches({"llmproxy.errors": "#\n" * (MOST_LINES + 1)}) == [
        "llmproxy.errors has 651 lines and no reason for more than 650"
    ]


def test_a_needless_reason_is_found() -> None:
    """A reason for a long module goes when the module is gone or has become short."""
    long, short = "#\n" * (MOST_LINES + 1), "#\n" * MOST_LINES
    reasons = dict.fromkeys(("llmproxy.long", "llmproxy.short", "llmproxy.gone"), "it is one table")
    assert needless(reasons, {"llmproxy.long": long, "llmproxy.short": short}) == [
        "llmproxy.short",
        "llmproxy.gone",
    ]
    assert needless(LONGER, modules(ROOT)) == []
