"""The documentation of the configuration says what the code does."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import msgspec
import pytest

from llmproxy.config import parse
from llmproxy.config.reference import rewritten
from llmproxy.config.settings import ROOT, SECTIONS
from llmproxy.http1.grammar import MAX_FIELDS
from tests.support.authorities import OpenAuthority
from tests.support.configs import KEYS_LINE, accepted

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "configuration.rst").read_text(encoding="utf-8")
STATED = re.compile(r"``(\w+)`` \(.*, default ``([^`]+)``\)")


def test_the_sample_is_accepted(directory: Path) -> None:
    """The shipped sample is accepted once its credential files are there, and states defaults."""
    for name in ("openai-key", "anthropic-key"):
        (directory / name).write_text("sk-sample\n")
    text = (DOCS / "llmproxy.toml").read_text()
    there = "/etc/llmproxy/credentials"
    config = parse(text.replace(f'directory = "{there}"', f'directory = "{directory}"'), environ={})
    assert [route.name for route in config.routes] == ["openai", "anthropic"]
    default = accepted({})
    assert config.timeouts == default.timeouts
    assert config.limits == default.limits
    assert config.admin == default.admin
    assert config.proxy == msgspec.structs.replace(default.proxy, anonymous=False)


def test_the_sample_shows_every_key() -> None:
    """Each built key stands in the sample, in force or commented out."""
    text = (DOCS / "llmproxy.toml").read_text()
    missing = {
        key
        for path, section in SECTIONS.items()
        if not path.endswith(".timeouts")
        for key in section.names
        if not re.search(rf"\b{key} = ", text)
    }
    assert missing == set()


def entries() -> dict[str, list[str]]:
    """Return the lines of the page that begin the description of keys, by section."""
    sections: dict[str, list[str]] = {}
    section = None
    for line in PAGE.splitlines():
        heading = re.fullmatch(r"``\[+([^\]]+)\]+``", line)
        if heading:
            section = heading[1].replace("NAME", "*")
            sections[section] = []
        elif line.startswith("``") and section is not None:
            sections[section].append(line)
    return sections


def test_the_page_is_what_the_declarations_say() -> None:
    """If this fails, `make docs` writes the page anew."""
    assert rewritten(PAGE) == PAGE


def test_the_limit_of_fields_is_documented() -> None:
    """It is no key, and holds for both sides."""
    assert PAGE.count(f"at most {MAX_FIELDS} header fields") == 2


def test_what_was_changed_by_hand_is_written_anew() -> None:
    """A default, a key or an explanation in a block are those of the code."""
    changed = re.sub(r'``"5m"``|``anonymous`` \(|Endpoint of', "x", PAGE)
    assert changed != PAGE
    assert rewritten(changed) == PAGE


@pytest.mark.parametrize(
    ("old", "new"), [("keys of admin:", "keys:"), ("keys of admin:", "keys of proxy:")]
)
def test_a_page_without_a_section_is_refused(old: str, new: str) -> None:
    """Each section has its block in the page, and just one."""
    with pytest.raises(ValueError, match="expected a block for each of proxy, admin"):
        rewritten(PAGE.replace(old, new))


def test_every_key_is_documented() -> None:
    """Below the heading of a section stand its keys, and no other."""
    found = {}
    for path, lines in entries().items():
        terms = [re.sub(r" \(.*\)$", "", line) for line in lines]
        assert all(re.fullmatch(r"``\w+``(, ``\w+``)*", term) for term in terms), terms
        found[path] = tuple(re.findall(r"``(\w+)``", " ".join(terms)))
    assert found == {path: tuple(section.names) for path, section in SECTIONS.items()}
    assert {path.split(".")[0] for path in found} == set(ROOT.names)


PLACES = {
    "providers.*": "providers.p",
    "providers.*.health": "providers.p.health",
    "providers.*.queue": "providers.p.queue",
    "routes": "routes[0]",
    "routes.override.*": "routes[0].override.p",
    "providers.*.credential": "providers.p.credential",
    "clients.*": "clients.c",
}
DEFAULTS = [
    (f"{PLACES.get(path, path)}.{found[1]}", found[2])
    for path, lines in entries().items()
    for found in map(STATED.fullmatch, lines)
    if found
]


@pytest.mark.parametrize(("key", "default"), DEFAULTS, ids=[key for key, _ in DEFAULTS])
def test_a_documented_default_is_the_one_in_force(
    key: str, default: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that writes the default down gives the same configuration as a file without it."""
    monkeypatch.setattr(socket, "gethostname", lambda: "HOSTNAME")
    base: dict[str, str | None] = {"clients.c.keys": KEYS_LINE, "trace.ledger": '"/l"'}
    base["proxy.parent_proxy"] = '"http://p:3128"'
    if key == "proxy.anonymous":
        base[key] = None
    if key.startswith("providers.p.queue"):
        base |= {"providers.p.max_streams": "1", "providers.p.queue.size": "200"}
    if key == "routes[0].override.p.weight":
        base["routes[0].override.p.model"] = '"m"'
    if key.startswith("providers.p.credential."):
        base["providers.p.credential.command"] = '["/bin/token"]'
    if key.startswith("intercept."):
        made = OpenAuthority(tmp_path, "inference.local")
        base["credentials.directory"] = json.dumps(str(made.directory))
        base |= {"intercept.hosts": '["inference.local"]', "intercept.ca_key": '"ca-key"'}
        base["intercept.ca_certificate"] = json.dumps(str(made.chain))
    assert accepted({**base, key: default}) == accepted(base)


def test_every_documented_default_is_tried() -> None:
    """The test above leaves out two keys, whose default follows the dialect."""
    left = [line for lines in entries().values() for line in lines if not STATED.fullmatch(line)]
    dependent = [line.partition(" ")[0] for line in left if " default ``" in line]
    assert dependent == ["``header``", "``format``"]
