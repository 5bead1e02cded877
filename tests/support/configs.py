"""Configurations of tests: a flat mapping over the smallest file that is accepted.

A file is written as a mapping from a key's path to its TOML value; so a test names the very path
that a problem must name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from llmproxy.config import Config, ConfigError, parse

SECRET = "sk-very-secret-0123456789"
DIGEST = "ab" * 32
KEYS_LINE = f'["sha256:{DIGEST}"]'
BASE = {
    "proxy.anonymous": "true",
    "providers.p.url": '"http://127.0.0.1:1"',
    "providers.p.dialect": '"openai"',
    "routes[0].path": '"/a"',
    "routes[0].providers": '["p"]',
}


def vault(folder: Path) -> Path:
    """Return a directory for credential files that is closed to others, with ``key`` in it."""
    directory = folder / "credentials"
    directory.mkdir(mode=0o700)
    (directory / "key").write_text(SECRET + "\n")
    return directory


def toml(changes: Mapping[str, str | None]) -> str:
    """Return the smallest accepted file with ``changes``; ``None`` leaves a key out."""
    routes: dict[str, list[str]] = {}
    lines: list[str] = []
    for key, value in {**BASE, **changes}.items():
        route = re.fullmatch(r"(routes\[\d\])\.(.*)", key)
        if value is None:
            continue
        if route:
            routes.setdefault(route[1], []).append(f"{route[2]} = {value}")
        else:
            lines.append(f"{key} = {value}")
    if routes:
        tables = ", ".join("{ " + ", ".join(one) + " }" for one in routes.values())
        lines.append(f"routes = [{tables}]")
    return "\n".join(lines)


def accepted(changes: Mapping[str, str | None], **environ: str) -> Config:
    """Return the configuration of an accepted file."""
    return parse(toml(changes), environ=environ)


def problems_of(changes: Mapping[str, str | None], **environ: str) -> tuple[str, ...]:
    """Return the problems of a refused file."""
    with pytest.raises(ConfigError) as caught:
        parse(toml(changes), environ=environ)
    return caught.value.problems


def with_credential(directory: Path, **changes: str) -> dict[str, str]:
    """Return the changes by which the provider takes its credential from ``directory``."""
    return {
        "credentials.directory": json.dumps(str(directory)),
        "providers.p.credential": '"key"',
        **changes,
    }
