"""``llmproxy doctor trust`` in a sandbox: it is right of every real program that is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmproxy.cli.doctor.trust import PROGRAMS
from tests.support.live_proxy import response
from tests.support.sandbox import Sandbox, open_sandbox

BINARIES = Path(__file__).parent / "node_modules" / ".bin"
OLD_NODE = "NODE_USE_ENV_PROXY is known to Node 24"
"""What is said of a Node that cannot be led to a proxy; `make peers` brings a newer one."""

TRUST = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS")
LONGEST = 150.0
"""Seconds that all programs may take together on a busy machine."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A proxy with a provider that answers everything."""
    with open_sandbox(tmp_path_factory.mktemp("trust")) as live:
        live.reply(response(200, body=b"ok"))
        yield live


def examine(
    live: Sandbox, changes: dict[str, str] | None = None, *, without: tuple[str, ...] = ()
) -> tuple[int, dict[str, dict[str, str]], str]:
    """Run the command; return its code, what it found by program, and what it complained of."""
    environ = {**live.environment(), **(changes or {})}
    for name in without:
        del environ[name]
    environ["PATH"] = os.pathsep.join(
        (str(BINARIES), str(Path(sys.executable).parent), os.environ["PATH"])
    )
    program = Path(sys.executable).parent / "llmproxy"
    done = subprocess.run(
        [str(program), "doctor", "trust", "--json"],
        env={**environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST,
    )
    report: dict[str, Any] = json.loads(done.stdout or '{"programs": [], "not_installed": []}')
    found = {one["program"]: one for one in report["programs"]}
    if done.stdout:
        assert {*found, *report["not_installed"]} == {one.name for one in PROGRAMS}
    return done.returncode, found, done.stderr


def advices(found: dict[str, dict[str, str]], outcome: str) -> dict[str, str]:
    """Return the advice for every program but those that take none of these variables."""
    found = {name: one for name, one in found.items() if not _is_apart(one)}
    assert {one["outcome"] for one in found.values()} == {outcome}, found
    return {name: one["advice"] for name, one in found.items()}


def _is_apart(found: dict[str, str]) -> bool:
    return found["program"] == "Java" or found["advice"].startswith(OLD_NODE)


@pytest.mark.timeout(200)
def test_all_is_well(live: Sandbox) -> None:
    """Each reaches the proxy; Java's proxy stands nowhere, and that is said."""
    code, found, _ = examine(live)
    assert set(advices(found, "reached").values()) == {""}
    assert {"Python (ssl)", "requests", "httpx"} <= set(found)
    assert code == any(map(_is_apart, found.values()))
    if "Java" in found:
        assert f"-Dhttps.proxyPort={live.daemon.port}" in found["Java"]["advice"]


@pytest.mark.timeout(200)
def test_no_variable_names_the_authority(live: Sandbox) -> None:
    """Each has its own."""
    code, found, _ = examine(live, without=TRUST)
    expected = {
        "Python (ssl)": "set SSL_CERT_FILE",
        "requests": "set REQUESTS_CA_BUNDLE",
        "httpx": "set SSL_CERT_FILE",
        "Node (fetch)": "set NODE_EXTRA_CA_CERTS",
        "curl": "set SSL_CERT_FILE",
        "git": "set GIT_SSL_CAINFO",
        "Codex": "set SSL_CERT_FILE",
    }
    said = advices(found, "untrusted")
    assert code == 1
    assert said == {name: words for name, words in expected.items() if name in said}


@pytest.mark.timeout(200)
def test_a_file_that_is_wrong(live: Sandbox, tmp_path: Path) -> None:
    """One that is not there, and one without the root, are told apart."""
    other = tmp_path / "other.pem"
    other.write_bytes(Path("/etc/ssl/certs/ca-certificates.crt").read_bytes())
    gone = str(tmp_path / "gone.pem")
    changes = dict.fromkeys(TRUST, str(other)) | {"REQUESTS_CA_BUNDLE": gone}
    _, found, _ = examine(live, changes)
    assert found["Python (ssl)"]["advice"] == (
        f"SSL_CERT_FILE names {other}, which does not hold the authority's root"
    )
    assert found["requests"]["advice"] == f"REQUESTS_CA_BUNDLE names {gone}, which is not there"
    if "git" in found:
        assert found["git"]["advice"].startswith(f"GIT_SSL_CAINFO names {other}, which does not")


@pytest.mark.timeout(200)
def test_a_host_that_is_excluded(live: Sandbox) -> None:
    """Programs go their own way, and find nobody."""
    _, found, _ = examine(live, {"NO_PROXY": "localhost,.local"})
    words = set(advices(found, "bypassed").values())
    assert words == {"NO_PROXY names inference.local: take it out"}


def test_a_wrong_key_is_said_at_once(live: Sandbox) -> None:
    """Nothing is tried then; the key is not shown."""
    url = f"http://team:wrong-key@127.0.0.1:{live.daemon.port}"
    code, found, said = examine(live, {"HTTPS_PROXY": url, "https_proxy": url})
    assert (code, found) == (2, {})
    assert "407 Proxy key unknown" in said
    assert "wrong-key" not in said


def test_a_sandbox_that_knows_no_proxy(live: Sandbox) -> None:
    """That is the first thing to set."""
    code, found, said = examine(live, without=("HTTPS_PROXY", "https_proxy"))
    assert (code, found) == (2, {})
    assert "HTTPS_PROXY is not set" in said
