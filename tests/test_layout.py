"""The order of the modules, and that no import goes against it (ADR-0001)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# An import goes from an earlier line to a later one, never back; a package stands before its
# modules.
ORDER = (
    "llmproxy",
    "llmproxy.cli",
    "llmproxy.cli.main",
    "llmproxy.cli.usage",
    "llmproxy.cli.probe",
    "llmproxy.cli.top",
    "llmproxy.cli.demo",
    "llmproxy.cli.demo.run",
    "llmproxy.cli.demo.provider",
    "llmproxy.cli.demo.texts",
    "llmproxy.cli.demo.chat",
    "llmproxy.cli.demo.completions",
    "llmproxy.cli.demo.responses",
    "llmproxy.cli.demo.embeddings",
    "llmproxy.cli.demo.openai",
    "llmproxy.cli.demo.anthropic",
    "llmproxy.cli.demo.ollama",
    "llmproxy.cli.demo.flow",
    "llmproxy.cli.demo.dialect",
    "llmproxy.cli.demo.vector",
    "llmproxy.cli.demo.reading",
    "llmproxy.cli.demo.answer",
    "llmproxy.service",
    "llmproxy.ops",
    "llmproxy.ops.admin",
    "llmproxy.ops.figures",
    "llmproxy.ops.status",
    "llmproxy.ops.streams",
    "llmproxy.ops.reload",
    "llmproxy.ops.setup",
    "llmproxy.ops.listeners",
    "llmproxy.ops.drain",
    "llmproxy.ops.notify",
    "llmproxy.ops.lag",
    "llmproxy.ops.signals",
    "llmproxy.ops.descriptors",
    "llmproxy.front",
    "llmproxy.front.connect",
    "llmproxy.front.certs",
    "llmproxy.front.gateway",
    "llmproxy.front.admission",
    "llmproxy.front.books",
    "llmproxy.front.drains",
    "llmproxy.front.findings",
    "llmproxy.front.exchange",
    "llmproxy.front.pace",
    "llmproxy.front.listen",
    "llmproxy.front.balancer",
    "llmproxy.front.http",
    "llmproxy.front.channel",
    "llmproxy.front.receiver",
    "llmproxy.front.progress",
    "llmproxy.front.request",
    "llmproxy.front.incoming",
    "llmproxy.front.lazy",
    "llmproxy.front.upload",
    "llmproxy.front.door",
    "llmproxy.front.refusal",
    "llmproxy.front.task",
    "llmproxy.front.tls",
    "llmproxy.policy",
    "llmproxy.policy.auth",
    "llmproxy.policy.routes",
    "llmproxy.policy.ask",
    "llmproxy.policy.usage",
    "llmproxy.policy.form",
    "llmproxy.policy.body",
    "llmproxy.policy.members",
    "llmproxy.policy.limits",
    "llmproxy.upstream",
    "llmproxy.upstream.client",
    "llmproxy.upstream.health",
    "llmproxy.upstream.agent",
    "llmproxy.upstream.deadline",
    "llmproxy.upstream.connect",
    "llmproxy.upstream.http1",
    "llmproxy.upstream.answer",
    "llmproxy.upstream.body",
    "llmproxy.upstream.names",
    "llmproxy.upstream.tls",
    "llmproxy.stream",
    "llmproxy.stream.relay",
    "llmproxy.stream.trail",
    "llmproxy.stream.backlog",
    "llmproxy.stream.tap",
    "llmproxy.stream.result",
    "llmproxy.stream.inflate",
    "llmproxy.stream.document",
    "llmproxy.stream.events",
    "llmproxy.stream.dialects",
    "llmproxy.stream.dialects.anthropic",
    "llmproxy.stream.dialects.ollama",
    "llmproxy.stream.dialects.responses",
    "llmproxy.stream.dialects.openai",
    "llmproxy.stream.dialects.endpoint",
    "llmproxy.stream.gathered",
    "llmproxy.record",
    "llmproxy.record.log",
    "llmproxy.record.sinks",
    "llmproxy.record.writer",
    "llmproxy.record.otlp",
    "llmproxy.record.spans",
    "llmproxy.record.lines",
    "llmproxy.record.ledger",
    "llmproxy.record.usage",
    "llmproxy.record.tables",
    "llmproxy.record.output",
    "llmproxy.record.trace",
    "llmproxy.record.metrics",
    "llmproxy.wire",
    "llmproxy.wire.framing",
    "llmproxy.wire.grammar",
    "llmproxy.wire.secure",
    "llmproxy.wire.direct",
    "llmproxy.wire.transport",
    "llmproxy.wire.timers",
    "llmproxy.wire.addresses",
    "llmproxy.wire.loop",
    "llmproxy.config",
    "llmproxy.config.sections",
    "llmproxy.config.keypair",
    "llmproxy.config.credentials",
    "llmproxy.config.settings",
    "llmproxy.config.schema",
    "llmproxy.config.readers",
    "llmproxy.config.url",
    "llmproxy.config.values",
    "llmproxy.headers",
    "llmproxy.errors",
    "llmproxy.version",
)

MOST_LINES = 300
# Modules that are longer, each with the reason why it is still one thing.
LONGER: dict[str, str] = {}


def modules(root: Path) -> dict[str, str]:
    """The source of each module below ``root/llmproxy``, by its dotted name."""
    found = {}
    for path in sorted((root / "llmproxy").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


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
    for name, source in sources.items():
        if name not in ORDER:
            found.append(f"{name} has no place in the order")
            continue
        length = source.count("\n")
        if length > MOST_LINES and name not in LONGER:
            found.append(f"{name} has {length} lines and no reason for more than {MOST_LINES}")
        package = any(other.startswith(f"{name}.") for other in known)
        for target in dict.fromkeys(imports(name, source, known, package=package)):
            if target not in ORDER:
                found.append(f"{name} imports {target}, which has no place in the order")
            elif ORDER.index(target) <= ORDER.index(name):
                found.append(f"{name} imports {target}, which stands before it")
    return found


def test_every_import_goes_down_the_order() -> None:
    """No module imports one that stands before it, none is unplaced, and none is overlong."""
    sources = modules(ROOT)
    assert "llmproxy.errors" in sources
    found = breaches(sources)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "statement", "target"),
    [
        ("llmproxy.wire.grammar", "import llmproxy.front.http", "llmproxy.front.http"),
        ("llmproxy.wire.grammar", "from llmproxy.front import http", "llmproxy.front.http"),
        ("llmproxy.wire.grammar", "from llmproxy.front.http import Site", "llmproxy.front.http"),
        ("llmproxy.stream.tap", "from llmproxy.stream import relay", "llmproxy.stream.relay"),
        ("llmproxy.stream.tap", "from .relay import Relay", "llmproxy.stream.relay"),
        ("llmproxy.stream.tap", "from . import relay", "llmproxy.stream.relay"),
        ("llmproxy.stream.tap", "from ..front import http", "llmproxy.front.http"),
        ("llmproxy.stream", "from ..front import http", "llmproxy.front.http"),
        ("llmproxy.errors", "from llmproxy import __version__", "llmproxy"),
        ("llmproxy.errors", "def f():\n    import llmproxy.config", "llmproxy.config"),
        (
            "llmproxy.errors",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import config",
            "llmproxy.config",
        ),
        ("llmproxy.errors", "import llmproxy.errors", "llmproxy.errors"),
    ],
)
def test_an_import_against_the_order_is_found(name: str, statement: str, target: str) -> None:
    """Each way to write an import that goes back, or to the module itself, is seen."""
    assert breaches({name: statement}) == [f"{name} imports {target}, which stands before it"]


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("llmproxy.front.gateway", "from llmproxy.stream.relay import Relay"),
        ("llmproxy.front.gateway", "from llmproxy import errors"),
        ("llmproxy.front", "from .http import Site"),
        ("llmproxy.front", "from . import http"),
        ("llmproxy.stream.tap", "from ..wire import grammar"),
        ("llmproxy", "from .config import load"),
        ("llmproxy.errors", "import msgspec, twisted.internet"),
    ],
)
def test_an_import_down_the_order_is_none(name: str, statement: str) -> None:
    """What goes down the order, or out of the program, is no breach."""
    assert breaches({name: statement}) == []


def test_an_unplaced_module_is_found() -> None:
    """A module that nobody placed is a breach, and so is an import of one."""
    assert breaches({"llmproxy.util": ""}) == ["llmproxy.util has no place in the order"]
    assert breaches({"llmproxy.config": "from llmproxy.wire.missing import x"}) == [
        "llmproxy.config imports llmproxy.wire.missing, which has no place in the order"
    ]


def test_an_overlong_module_is_found() -> None:
    """The line after the last allowed one is a breach where no reason is given."""
    assert breaches({"llmproxy.errors": "#\n" * MOST_LINES}) == []
    assert breaches({"llmproxy.errors": "#\n" * (MOST_LINES + 1)}) == [
        "llmproxy.errors has 301 lines and no reason for more than 300"
    ]


def test_every_reason_is_needed() -> None:
    """A reason for a long module goes when the module is gone or has become short."""
    sources = modules(ROOT)
    assert [n for n in LONGER if sources.get(n, "").count("\n") <= MOST_LINES] == []
