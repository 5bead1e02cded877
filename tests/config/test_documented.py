"""Every configuration in the documentation can be used as it stands, or where it belongs."""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from llmproxy.cli.main import main
from llmproxy.config.settings import ROOT, SECTIONS
from tests.support.authorities import OpenAuthority
from tests.support.configs import KEYS_LINE, SECRET
from tests.support.keypairs import Vault

TOP = Path(__file__).parents[2]
DOCS = TOP / "docs"
PAGES = [TOP / "README.rst", TOP / "CONTRIBUTING.rst", *sorted(DOCS.rglob("*.rst"))]
PAGES += sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^.*(?:::|^```\w*| toml)\n\n*((?: {4}.*\n|\n)*(?: {4}.*\n))", re.MULTILINE)
SECTION = re.compile(rf"^\[+(?:{'|'.join(ROOT.names)})\b", re.MULTILINE)
SETTING = re.compile(r"([a-z_]+) = .*")
OWNER = {key: path for path, section in reversed(list(SECTIONS.items())) for key in section.names}
"""A section for each key; that which stands first in the file, where several have the key."""

DIRECTORY = re.compile(r'^directory = ".*?"', re.MULTILINE)
CA_CERTIFICATE = re.compile(r'^ca_certificate = ".*?"', re.MULTILINE)
CREDENTIAL = re.compile(r'^\s*(?:credential|postgres_credential|token) = "(.*?)"', re.MULTILINE)
SERVER = re.compile(r'^postgres = "', re.MULTILINE)


class Shown(NamedTuple):
    """A configuration of a page, from one of its lines on: all of a file, or a part of one."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def sections(self) -> set[str]:
        """The sections that it has."""
        return set(tomllib.loads(self.text))

    @property
    def is_whole(self) -> bool:
        """Whether it has all that a file needs."""
        return {"proxy", "providers", "routes"} <= self.sections

    @property
    def intercepted(self) -> list[str]:
        """The hosts whose TLS it has the proxy end."""
        hosts: list[str] = tomllib.loads(self.text)["intercept"]["hosts"]
        return hosts

    def completed(self, vault: Vault) -> str:
        """Return a file of it: a part gets what it lacks, and credentials are in ``vault``."""
        found, text = self.sections, self.text
        if not self.is_whole:
            if "clients" not in found:
                text += f"\n[clients.c]\nkeys = {KEYS_LINE}\n"
            if "providers" not in found:
                text += '\n[providers.p]\nurl = "https://p.example"\ndialect = "openai"\n'
            if "routes" not in found:
                text += '\n[[routes]]\npath = "/p"\nproviders = ["p"]\n'
        for name in CREDENTIAL.findall(text):
            vault.write(name, SECRET.encode())
        vault.write("proxy-certificate", (issued := vault.put()).chain)
        vault.write("proxy-key", issued.key)
        vault.write("parent-proxy", b"team:" + SECRET.encode())
        if "intercept" in found:
            authority = OpenAuthority(folder := vault.directory.parent, *self.intercepted)
            text = CA_CERTIFICATE.sub(f'ca_certificate = "{folder}/ca.pem"', text)
            vault.write("ca-key", authority.made.key)
        return DIRECTORY.sub(f'directory = "{vault.directory}"', text)


def shown() -> Iterator[Shown]:
    """Yield every configuration of the documentation.

    A block is one if it has one of the sections, or if it consists of settings that have a section.
    """
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            block = textwrap.dedent(found[1])
            settings = [SETTING.match(one) for one in block.splitlines()]
            names = [one[1] for one in settings if one is not None]
            if SECTION.search(block) is None:
                if len(names) < len(settings) or not OWNER.keys() >= set(names):
                    continue
                block = f"[{OWNER[names[0]]}]\n{block}"
            yield Shown(page.name, text.count("\n", 0, found.start(1)) + 1, block)


SHOWN = [*shown(), Shown("llmproxy.toml", 1, (DOCS / "llmproxy.toml").read_text("utf-8"))]


@pytest.mark.parametrize("one", SHOWN, ids=str)
def test_a_documented_configuration_passes_the_check(
    one: Shown, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever copies it gets no problem, and no warning but of folders that are not there yet."""
    if SERVER.search(one.text):
        pytest.importorskip("psycopg", reason="the check says that psycopg is not installed")
    vault = Vault(tmp_path)
    path = tmp_path / "copied.toml"
    path.write_text(one.completed(vault))
    code = main(["check", "--credentials", str(vault.directory), str(path)])
    said = capsys.readouterr().err.splitlines()
    assert code == 0, said
    elsewhere = re.compile(r"warning: (trace\.|.*\.command: /usr/local/bin/token is no file)")
    assert [line for line in said if not elsewhere.match(line)] == []


def test_the_configurations_are_found() -> None:
    """Those that newcomers and operators copy first are among them, whole and in parts."""
    whole = {one.page for one in SHOWN if one.is_whole}
    assert whole >= {"README.rst", "CONTRIBUTING.rst", "llmproxy.toml"}
    parts = {(one.page, key) for one in SHOWN if not one.is_whole for key in one.sections}
    assert parts >= {
        ("README.rst", "proxy"),
        ("operations.rst", "proxy"),
        ("operations.rst", "credentials"),
        ("records.rst", "trace"),
    }
