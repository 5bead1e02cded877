"""The systemd units, read by systemd itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from llmproxy.config import Proxy
from llmproxy.ops.failed_start import MISTAKE
from llmproxy.ops.setup import needed
from tests.support.daemon import ROOT

UNITS = ROOT / "systemd"
SERVICES = ("llmproxy.service", "llmproxy@.service")
NAMES = (*SERVICES, "llmproxy.socket", "llmproxy.target")
DROP_INS = ("credentials.conf", "link-local.conf")
MOST_EXPOSURE = 1.5


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``systemd-analyze`` over a copy of all units, whose programs are ones that are there.

    systemd also complains about a program that is not installed on this machine.
    """
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not here")
    for name in NAMES:
        if not (folder / name).exists():
            (folder / name).write_text((UNITS / name).read_text())
    for path in filter(Path.is_file, folder.rglob("*.*")):
        path.write_text(re.sub(r"/opt/llmproxy/bin/\w+", "/bin/true", path.read_text()))
    return subprocess.run(
        [program, *arguments],
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{folder}:", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def complaints(folder: Path, name: str) -> str:
    """Return what systemd says about a unit; empty where it accepts the unit."""
    done = analyze(folder, "verify", "--man=no", str(folder / name))
    return done.stderr if done.returncode == 0 else done.stderr or f"exit {done.returncode}"


def exposure(folder: Path, name: str) -> float:
    """Return how exposed a service is by systemd's own count, from 0 to 10."""
    done = analyze(folder, "security", "--offline=true", "--no-pager", str(folder / name))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    return float(found[1])


def values(name: str, key: str) -> list[str]:
    """Return the values of a key in a unit, in their order."""
    text = (UNITS / name).read_text()
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def seconds(text: str) -> int:
    """Return a time span of systemd (``330s``, ``5m``) in seconds."""
    return int(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def test_every_unit_is_tested() -> None:
    """The folder holds the units that are named above, and no others."""
    assert {path.name for path in UNITS.iterdir()} == {*NAMES, "drop-ins"}
    assert {path.name for path in (UNITS / "drop-ins").iterdir()} == set(DROP_INS)


@pytest.mark.parametrize("name", NAMES)
def test_systemd_accepts_a_unit(name: str, tmp_path: Path) -> None:
    """Each unit is read without an error and without a warning."""
    assert complaints(tmp_path, name) == ""


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("drop_in", DROP_INS)
def test_systemd_accepts_a_drop_in(service: str, drop_in: str, tmp_path: Path) -> None:
    """Its lines are in force for this, also those that are commented out."""
    text = (UNITS / "drop-ins" / drop_in).read_text()
    folder = tmp_path / f"{service}.d"
    folder.mkdir()
    (folder / drop_in).write_text(re.sub(r"^#(?=[A-Z]\w+=)", "", text, flags=re.MULTILINE))
    assert complaints(tmp_path, service) == ""


def test_a_misspelt_key_is_found(tmp_path: Path) -> None:
    """The check above fails where a key is misspelt, which systemd only warns about."""
    text = (UNITS / "llmproxy.service").read_text()
    (tmp_path / "llmproxy.service").write_text(text.replace("LimitNOFILE=", "LimitNOFIEL="))
    assert "LimitNOFIEL" in complaints(tmp_path, "llmproxy.service")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardly_exposed(name: str, tmp_path: Path) -> None:
    """Systemd's own count stays below the limit that we set."""
    assert exposure(tmp_path, name) <= MOST_EXPOSURE


def test_a_hole_in_the_sandbox_is_found(tmp_path: Path) -> None:
    """The check above fails where some of the sandbox is taken away."""
    text = (UNITS / "llmproxy.service").read_text()
    (tmp_path / "llmproxy.service").write_text(re.sub(r"SystemCallFilter=.*\n", "", text))
    assert exposure(tmp_path, "llmproxy.service") > MOST_EXPOSURE


@pytest.mark.parametrize("name", SERVICES)
def test_a_stop_waits_longer_than_the_drain(name: str) -> None:
    """systemd kills the daemon only after the default drain_timeout has passed."""
    (limit,) = values(name, "TimeoutStopSec")
    assert seconds(limit) > Proxy().drain_timeout


@pytest.mark.parametrize("name", SERVICES)
def test_there_are_descriptors_for_the_default(name: str) -> None:
    """The limit of the unit has room for what the default max_connections may need."""
    (limit,) = values(name, "LimitNOFILE")
    assert int(limit) >= needed(Proxy().max_connections)


@pytest.mark.parametrize("name", SERVICES)
def test_memory_may_become_executable(name: str) -> None:
    """No unit forbids what pyOpenSSL's callbacks need: each would fail with MemoryError."""
    assert values(name, "MemoryDenyWriteExecute") == []


@pytest.mark.parametrize("name", SERVICES)
def test_no_instance_makes_the_socket_of_the_others_block(name: str) -> None:
    """systemd sets the mode of a shared socket anew at each start; see the unit."""
    assert values(name, "NonBlocking") == ["yes"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_mistake_is_not_tried_again(name: str) -> None:
    """The unit knows the exit code of a refused configuration, and systemd's own of a key."""
    (codes,) = values(name, "RestartPreventExitStatus")
    assert codes.split() == [str(MISTAKE), "243"]
    assert values(name, "ExecStartPre") == []  # its exit code would not count


def test_a_service_gives_up_and_an_instance_does_not() -> None:
    """`is-failed` becomes true in minutes; an instance's limit would close the socket of all."""
    (burst,) = values("llmproxy.service", "StartLimitBurst")
    (interval,) = values("llmproxy.service", "StartLimitIntervalSec")
    (pause,) = values("llmproxy.service", "RestartSec")
    slowest_start_s = 3
    assert int(burst) * (seconds(pause) + slowest_start_s) <= seconds(interval.removesuffix("in"))
    assert values("llmproxy@.service", "StartLimitIntervalSec") == ["0"]


def test_the_services_differ_in_what_they_must() -> None:
    """The service with a socket differs from the other one by its instance's name alone."""

    def body(name: str) -> list[str]:
        text = (UNITS / name).read_text().partition("[Service]\n")[2].partition("[Install]")[0]
        return [line.replace("--instance %i ", "") for line in text.splitlines()]

    one, many = (body(name) for name in SERVICES)
    assert "Sockets=llmproxy.socket" in many
    many.remove("Sockets=llmproxy.socket")
    assert [line.removesuffix(" --instance %i").replace("-%i", "") for line in many] == one


def test_every_credential_of_the_sample_has_a_line() -> None:
    """An operator who begins with the sample finds each of its keys in the drop-in."""
    sample = (ROOT / "docs" / "llmproxy.toml").read_text()
    wanted = re.findall(
        r'^(?:# )?(?:credential|certificate|key|ca_key) = "([^"]+)"', sample, re.MULTILINE
    )
    text = (UNITS / "drop-ins" / "credentials.conf").read_text()
    lines = re.findall(r"^#?LoadCredential=(\S+):/etc/llmproxy/credentials/(\S+)$", text, re.M)
    assert len(wanted) >= 4
    assert lines == [(name, name) for name, _ in lines]
    assert {name for name, _ in lines} == set(wanted)
    assert re.findall(r"^#?SetCredential=(\S+):\\n$", text, re.M) == [name for name, _ in lines]
