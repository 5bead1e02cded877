"""The systemd units, read by systemd itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
NAMES = sorted(path.name for path in UNITS.iterdir() if path.suffix in {".service", ".socket"})


def complaints(folder: Path, name: str) -> str:
    """What ``systemd-analyze verify`` says about a unit; empty where it has nothing to say.

    All units are copied beside it, and the programs that they start are replaced by one that is
    there: systemd also complains about a program that is not installed on this machine.
    """
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not here")
    for path in UNITS.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_text(path.read_text())
    for path in folder.iterdir():
        path.write_text(re.sub(r"/opt/llmproxy/bin/\w+", "/bin/true", path.read_text()))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(folder / name)],
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{folder}:", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stderr if done.returncode == 0 else done.stderr or f"exit {done.returncode}"


def seconds(text: str) -> int:
    """A time span of systemd in seconds: ``330s``, ``5m``."""
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


@pytest.mark.parametrize("name", NAMES)
def test_systemd_has_nothing_to_say_about_a_unit(name: str, tmp_path: Path) -> None:
    """Each unit is read without an error and without a warning."""
    assert complaints(tmp_path, name) == ""


def test_a_misspelt_key_is_found(tmp_path: Path) -> None:
    """The check above fails where a key is misspelt, which systemd only warns about."""
    text = (UNITS / "llmproxy.service").read_text()
    (tmp_path / "llmproxy.service").write_text(text.replace("LimitNOFILE=", "LimitNOFIEL="))
    assert "LimitNOFIEL" in complaints(tmp_path, "llmproxy.service")


def test_a_stop_waits_longer_than_the_drain() -> None:
    """systemd kills the daemon only after the default drain_timeout, five minutes, has passed."""
    found = re.search(r"^TimeoutStopSec=(\w+)$", (UNITS / "llmproxy.service").read_text(), re.M)
    assert found is not None
    assert seconds(found[1]) > seconds("5m")


@pytest.mark.parametrize("name", NAMES)
def test_memory_may_become_executable(name: str) -> None:
    """No unit forbids what pyOpenSSL's callbacks need: each would fail with MemoryError."""
    keys = [line.partition("=")[0] for line in (UNITS / name).read_text().splitlines()]
    assert "MemoryDenyWriteExecute" not in keys
