"""The version that a process says is the one that is installed."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from llmproxy.version import version

asked = version.__wrapped__
"""Looks anew."""


def install(folder: Path, name: str, version: str) -> None:
    """Lay a distribution into a folder, as pip does."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("number", ["1.2.3", "0.1.dev781+ge950b762a", "2026.11rc1.post2"])
def test_the_version_is_what_the_standard_library_finds(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one on the path counts; the names of others only begin alike."""
    install(tmp_path / "first", "llmproxy_tools", "9.9")
    install(tmp_path / "first", "llmproxy", number)
    install(tmp_path / "second", "llmproxy", "8.8")
    path = [str(tmp_path / name) for name in ("none", "first", "second")]
    monkeypatch.setattr(sys, "path", path)
    assert asked() == metadata.version("llmproxy") == number


def test_a_source_tree_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is installed, that is said."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert asked() == "(not installed)"


def test_what_runs_does_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is installed beneath the process is not the one that it says."""
    before = version()
    install(tmp_path, "llmproxy", "8.8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert version() == before
