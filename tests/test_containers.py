"""The image's recipe and the page about containers: what they say together starts and stops."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from llmproxy.config import Proxy
from tests.live.test_starting import read_until, started
from tests.support.daemon import ROOT
from tests.support.live_proxy import write_credential

PAGE = (ROOT / "docs" / "containers.rst").read_text(encoding="utf-8")
RECIPE = (ROOT / "Containerfile").read_text(encoding="utf-8")
SPARE_S = 30


def instruction(name: str) -> str:
    """Return the last instruction of this name, which is the final image's."""
    found: list[str] = re.findall(rf"^{name} (.*)$", RECIPE, re.MULTILINE)
    return found[-1]


def configuration(folder: Path) -> Path:
    """Write the page's configuration, on ports of the kernel's choice; return its path."""
    found = re.search(r"a listener of their own::\n\n((?:    .*\n|\n)+)", PAGE)
    assert found is not None
    text = re.sub(r"tcp:\d+", "tcp:0", found[1].replace("\n    ", "\n"))
    write_credential(folder, "openai-key", "sk-sample")
    path = folder / "llmproxy.toml"
    path.write_text(text.strip().replace("/run/secrets/llmproxy", f"{folder}/credentials"))
    return path


def status(port: int, path: str) -> int:
    """Return the status of a page."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def ports(lines: list[str]) -> list[int]:
    """Return the ports of the listeners that the log names, in their order."""
    listening = [line for line in map(json.loads, lines) if "listens on" in line["message"]]
    return [line["port"] for line in listening]


def test_the_image_starts_with_the_configuration_of_the_page(tmp_path: Path) -> None:
    """Its command serves the probes where the page says, and nothing else there."""
    command = [*json.loads(instruction("ENTRYPOINT")), *json.loads(instruction("CMD"))]
    command[0] = command[0].replace("/opt/llmproxy/bin", str(Path(sys.executable).parent))
    assert command[-1] == "/etc/llmproxy/llmproxy.toml"
    command[-1] = str(configuration(tmp_path))
    probes = dict(re.findall(r"(\w+Probe): \{httpGet: \{path: (\S+), port: 9100\}", PAGE))
    assert set(probes) == {"livenessProbe", "readinessProbe"}
    with started(tmp_path, command) as process:
        lines = [line for _ in range(3) for line in read_until(process, "listens on")]
        _, admin, public = ports(lines)
        assert {status(public, path) for path in probes.values()} == {200}
        assert status(admin, "/config") == 200
        assert status(public, "/config") == 404
        process.send_signal(getattr(signal, instruction("STOPSIGNAL")))
        assert process.wait(10) == 0


def test_the_platform_waits_longer_than_the_drain() -> None:
    """Each grace period of the page has room for the default drain_timeout."""
    drain_s = Proxy().drain_timeout + SPARE_S
    (asleep,) = re.findall(r'command: \[sleep, "(\d+)"\]', PAGE)
    grace = re.findall(r"terminationGracePeriodSeconds: (\d+)", PAGE)
    assert len(grace) == 2
    assert {int(one) >= drain_s + int(asleep) for one in grace} == {True}
    stops = re.findall(r"--stop-timeout (\d+)|stop -t (\d+)|stop_grace_period: (\d+)s", PAGE)
    assert len(stops) == 4
    assert all(int("".join(one)) >= drain_s for one in stops)


def test_the_image_is_not_root() -> None:
    """Its user is a number, as Kubernetes wants it, and the page names the same one."""
    user, group = instruction("USER").split(":")
    assert user == group
    assert int(user) > 0
    assert f"-o {user} -m 700" in PAGE
    assert f"fsGroup: {group}" in PAGE


def test_the_image_is_built_from_what_is_there() -> None:
    """`make dist` makes the wheel that it copies, with the constraints of this tree."""
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", RECIPE, re.MULTILINE)
    assert copied == ["constraints.txt dist/llmproxy-*.whl"]
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "dist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "-m build" in shown.stdout
