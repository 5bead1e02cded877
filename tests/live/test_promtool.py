"""The real promtool reads the daemon's metrics, and tries the alert of docs/clients.rst."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.support.daemon import ROOT
from tests.support.live_proxy import ONE_ROUTE, open_live_proxy, read_response
from tests.support.sockets import connect, request

PROMTOOL = shutil.which("promtool")

pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool: make peers")

SERIES = 'llmproxy_ended_total{reason="unfinished"}'


def promtool(*args: str, given: bytes = b"") -> tuple[int, str]:
    """Run promtool; return its status and all that it printed."""
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *args],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.decode()


def documented() -> str:
    """Return the expression of the alert that stands in the docs."""
    guide = (ROOT / "docs" / "clients.rst").read_text(encoding="utf-8")
    found = re.search(r"^    increase\(llmproxy_ended_total(?:.*\n)+?\n", guide, re.MULTILINE)
    assert found is not None
    return textwrap.dedent(found[0]).strip()


def test_the_metrics_have_no_fault(tmp_path: Path) -> None:
    """Names, help texts and types are as Prometheus wants them, after requests of many ends."""
    with open_live_proxy(tmp_path, ONE_ROUTE) as live:
        live.ask(request("GET", "/p/x"))
        live.get(request("GET", "/nowhere"))
        with connect(live.daemon.admin_port) as client:
            client.send(request("GET", "/metrics"))
            body = read_response(client).body
    assert b"llmproxy_requests_total{" in body
    assert promtool("check", "metrics", given=body) == (0, "")


@pytest.mark.parametrize(
    ("values", "at", "rings"),
    [
        ("_x5 1x30", "6m", True),
        ("0x5 1x30", "7m", True),
        ("3x40", "20m", False),
        ("_x5 1x40", "30m", False),
    ],
    ids=["the first one ever", "one more", "none new", "long ago"],
)
def test_the_alert_rings(tmp_path: Path, values: str, at: str, rings: bool) -> None:
    """It does for the first unfinished stream after a start, and for each later one."""
    expression = textwrap.indent(documented(), " " * 10)
    rule = (
        f"groups:\n- name: llmproxy\n  rules:\n  - alert: Unfinished\n    expr: |\n{expression}\n"
    )
    (tmp_path / "rules.yml").write_text(rule)
    expected = "[{exp_labels: {reason: unfinished}}]" if rings else "[]"
    (tmp_path / "tests.yml").write_text(
        f"""\
rule_files: [rules.yml]
evaluation_interval: 1m
tests:
- interval: 1m
  input_series:
  - {{series: '{SERIES}', values: '{values}'}}
  alert_rule_test:
  - {{eval_time: {at}, alertname: Unfinished, exp_alerts: {expected}}}
"""
    )
    status, printed = promtool("test", "rules", str(tmp_path / "tests.yml"))
    assert status == 0, printed
