"""Wheels of the program and of all that it needs, without a package index.

The program's is built from this tree.  Those of its requirements are put together again from what
is installed here, so that a machine without a network can be given them.
"""

from __future__ import annotations

import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_packaging import build, copy
from tests.test_versions import closure

_NOT_IN_A_WHEEL = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}


def checkout(folder: Path) -> None:
    """Copy the tree to ``folder``, with every wheel that an installation needs in its ``dist``."""
    copy(folder)
    house = build(folder, "--wheel")
    for name in sorted(_required()):
        _repack(distribution(name), house)


def newer(folder: Path, version: str) -> None:
    """Copy the tree to ``folder`` as it could be in a later commit, with its wheel in ``dist``."""
    copy(folder)
    settings = folder / "pyproject.toml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace('fallback_version = "0.0"', f'fallback_version = "{version}"'))
    build(folder, "--wheel")


def _required() -> set[str]:
    """Return the names of what the installed program requires, directly or not, and is here."""
    wanted = [
        requirement
        for requirement in map(Requirement, requires("llmproxy") or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    names = {canonicalize_name(requirement.name) for requirement in closure(wanted)}
    return {name for name in names if _is_installed(name)}


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _repack(found: Distribution, folder: Path) -> None:
    """Write the wheel of an installed distribution, without what pip makes at an installation."""
    metadata = (found.read_text("WHEEL") or "").splitlines()
    tags = [line.split()[1].split("-") for line in metadata if line.startswith("Tag: ")]
    tag = "-".join(".".join(dict.fromkeys(parts)) for parts in zip(*tags, strict=True))
    name = f"{canonicalize_name(found.name).replace('-', '_')}-{found.version}"
    files = [
        path
        for path in found.files or []
        if ".." not in path.parts
        and "__pycache__" not in path.parts
        and not (path.parent.suffix == ".dist-info" and path.name in _NOT_IN_A_WHEEL)
    ]
    with zipfile.ZipFile(folder / f"{name}-{tag}.whl", "w", zipfile.ZIP_STORED) as wheel:
        for path in files:
            wheel.write(str(path.locate()), str(path))
        (info,) = {path.parts[0] for path in files if path.parts[0].endswith(".dist-info")}
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in files))
