"""Rules, dashboard and examples of ``monitoring/``: for Prometheus, Grafana and the daemon."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import ROOT, Daemon, provider_table, route_table
from tests.support.live_proxy import LiveProxy, client_config, post, response, until
from tests.support.programs import free_port
from tests.support.sockets import Wire

FOLDER = ROOT / "monitoring"
RULES = FOLDER / "llmproxy.rules.yml"
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool: make peers")

_METRIC = re.compile(r"\b(?:llmproxy|process)_[a-z_]+\b")
_ALERT = re.compile(r"^  - alert: (\w+)$", re.MULTILINE)
_RECORD = re.compile(r"^  - record: (\S+)$", re.MULTILINE)
_SUFFIX = re.compile(r"_(?:bucket|count|sum)\Z")


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "llmproxy.rules.yml"),
        ("test", "rules", "llmproxy.test.yml"),
        ("check", "config", "prometheus.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_nothing_wrong(command: tuple[str, ...]) -> None:
    """Each alert fires in a test and stays silent in another; the example can be loaded."""
    done = subprocess.run(
        [str(PROMTOOL), *command], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_is_tested() -> None:
    """An alert or a recording rule that no test names would never be missed."""
    rules, tests = RULES.read_text(), (FOLDER / "llmproxy.test.yml").read_text()
    alerts = _ALERT.findall(rules)
    assert len(alerts) == len(set(alerts)) > 20
    for alert in alerts:
        assert len(re.findall(rf"^    alertname: {alert}$", tests, re.MULTILINE)) == 2, alert
    for record in _RECORD.findall(rules):
        assert f"expr: '{record}'" in tests, record


def test_every_alert_has_its_section() -> None:
    """With what it means and what to do, at the address that the alert names."""
    guide = (ROOT / "docs" / "trouble.rst").read_text()
    for alert in _ALERT.findall(RULES.read_text()):
        found = re.search(rf"^{alert}\n~{{{len(alert)}}}\n\n(\S.*)", guide, re.MULTILINE)
        assert found is not None, alert
        assert f"runbook_url: docs/trouble.rst#{alert.lower()}\n" in RULES.read_text()


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the metrics that a daemon exposes."""
    config = provider_table("p", url="http://127.0.0.1:1") + route_table("/p", "p")
    with Daemon(tmp_path_factory.mktemp("daemon"), config) as daemon:
        return set(re.findall(r"^# TYPE (\S+) ", daemon.admin("/metrics"), re.MULTILINE))


def dashboard() -> Any:
    """Return the dashboard."""
    return json.loads((FOLDER / "dashboard.json").read_text())


def expressions() -> list[str]:
    """Return what the dashboard asks Prometheus."""
    panels = dashboard()["panels"]
    return [target["expr"] for one in panels for target in one.get("targets", ())]


def test_rules_and_dashboard_name_what_the_daemon_has(exposed: set[str]) -> None:
    """A name that no daemon exposes would be an alert that never fires."""
    records = _RECORD.sub("", RULES.read_text())
    records = re.sub(r"\bjob:llmproxy_\w+(?::\w+)?", "", records)
    asked = set(_METRIC.findall(records)) | set(_METRIC.findall("\n".join(expressions())))
    unknown = {name for name in asked if not {name, _SUFFIX.sub("", name)} & exposed}
    assert unknown == set()
    assert len(asked) > 30


def test_all_is_also_what_has_no_label() -> None:
    """A refused request has no provider, and one that was never asked is in no list of them."""
    several = [one for one in dashboard()["templating"]["list"] if one.get("includeAll")]
    assert {one["name"] for one in several} == {"instance", "route", "provider", "client"}
    assert {one.get("allValue") for one in several} == {".*"}


def test_the_dashboard_is_the_scripts() -> None:
    """Whoever edits the file by hand finds the change gone at the next one."""
    pytest.importorskip("grafana_foundation_sdk", reason="needs grafana-foundation-sdk")
    path = FOLDER / "dashboard.py"
    spec = importlib.util.spec_from_file_location("dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (FOLDER / "dashboard.json").read_text() == module.text()


# --- a real Prometheus ----------------------------------------------------------------------------


class Prometheus:
    """A running Prometheus.

    Args:
        port: where it listens.
    """

    def __init__(self, port: int) -> None:
        self._origin = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **query: str) -> Any:
        """Return what its API says."""
        url = f"{self._origin}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - it is http
            return json.load(answer)["data"]

    def is_ready(self) -> bool:
        """Return whether it takes queries."""
        try:
            return bool(self.ask("status/runtimeinfo"))
        except OSError:
            return False

    def value(self, expression: str) -> dict[tuple[str, ...], float]:
        """Return what an expression is now, by the values of its labels."""
        rows = self.ask("query", query=expression)["result"]
        return {tuple(row["metric"].values()): float(row["value"][1]) for row in rows}


@contextmanager
def prometheus(folder: Path, admin_port: int) -> Iterator[Prometheus]:
    """Let a Prometheus scrape a daemon each second, with the rules of ``monitoring/``."""
    config = (FOLDER / "prometheus.yml").read_text()
    config = config.replace("15s", "1s").replace("127.0.0.1:9080", f"127.0.0.1:{admin_port}")
    rules = re.sub(r"^    for: .*\n", "", RULES.read_text(), flags=re.MULTILINE)
    (folder / "llmproxy.rules.yml").write_text(rules)
    (folder / "prometheus.yml").write_text(config)
    port = free_port()
    command = [str(PROMETHEUS), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--log.level=warn"], stdout=log, stderr=log)
    try:
        running = Prometheus(port)
        until(running.is_ready, "prometheus is ready")
        yield running
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus: make peers")
@pytest.mark.timeout(120)
def test_prometheus_knows_what_was_sent_and_rings(tmp_path: Path) -> None:
    """Requests, tokens and ends are those that were sent; a reload that failed rings."""
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    good = json.dumps({"object": "chat.completion", "model": "m", "usage": usage}).encode()
    live = LiveProxy()

    def script(wire: Wire) -> None:
        is_good = b'"good"' in wire.read_request().body
        kind = "content-type: application/json"
        wire.send(response(200 if is_good else 500, kind, "connection: close", body=good))

    live.script = script
    config = provider_table("p", url=live.provider.url) + route_table("/p", "p", 'name = "r"')
    config += client_config("c", "k")
    with (
        live.provider,
        Daemon(tmp_path, config, proxy="") as live.daemon,
        prometheus(tmp_path, live.daemon.admin_port) as asked,
    ):
        until(lambda: asked.value('up{job="llmproxy"} == 1'), "it is scraped")
        for key, model, count in (("k", "good", 40), ("k", "bad", 20), ("wrong", "good", 10)):
            body = json.dumps({"model": model}).encode()
            for _ in range(count):
                live.get(post("/p/v1/chat/completions", body, f"x-api-key: {key}"))
        ends = {("complete",): 40, ("upstream_refused",): 20, ("rejected",): 10}
        until(lambda: asked.value("sum by (reason) (llmproxy_ended_total)") == ends, "all ends")
        requests = asked.value('sum by (client, status) (llmproxy_requests_total{client="c"})')
        assert requests == {("c", "2xx"): 40, ("c", "5xx"): 20}
        tokens = asked.value("sum by (type) (llmproxy_tokens_total)")
        assert tokens == {("input",): 120, ("output",): 200}

        def rings() -> set[str]:
            firing = asked.ask("alerts")["alerts"]
            return {one["labels"]["alertname"] for one in firing if one["state"] == "firing"}

        assert "LlmproxyReloadFailed" not in rings()
        live.daemon.config_path.write_text("nonsense")
        live.daemon.process.send_signal(1)
        until(lambda: "LlmproxyReloadFailed" in rings(), "the alert rings")
        live.daemon.take_errors()
        for expression in expressions():
            text = re.sub(r"\$(job|\w+)", lambda found: _VALUES.get(found[1], ".*"), expression)
            asked.ask("query", query=text)


_VALUES = {"job": "llmproxy", "__rate_interval": "1m"}
"""What the dashboard's variables are; the others stand for all."""
