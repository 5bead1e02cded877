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
_SELECTED = re.compile(r"\b((?:llmproxy|process)_\w+)\{([^}]*)\}")
_GROUPED = re.compile(r"\bby \(([^)]*)\)\s*\((?:\w+\()?((?:llmproxy|process)_\w+)")
_OF_PROMETHEUS = {"job", "instance"}
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


def test_every_alert_says_how_much_and_where() -> None:
    """By its labels and its value: a pager shows nothing else."""
    for block in RULES.read_text().split("  - alert: ")[1:]:
        name = block.partition("\n")[0]
        found = re.search(r'^      description: "(.+)"$', block, re.MULTILINE)
        assert found is not None, name
        assert "{{ $labels." in found[1] or "{{ $value" in found[1], name
        assert _before(name).startswith("  # "), name


def _before(alert: str) -> str:
    """Return the line before an alert, which says why its threshold is what it is."""
    return RULES.read_text().partition(f"\n  - alert: {alert}\n")[0].rpartition("\n")[2]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The metrics that a daemon exposes, and the labels of those that have a sample."""
    config = provider_table("p", "max_streams = 1\nqueue = { size = 5 }", url="http://127.0.0.1:1")
    config += route_table("/p", "p", 'name = "r"') + client_config("c", "k")
    config = config.replace("[clients.c]", "[clients.c]\ntokens_per_day = 9")
    config += '[shared]\nurl = "redis://127.0.0.1:1"\n'
    live, daemon = LiveProxy(), Daemon(tmp_path_factory.mktemp("daemon"), config, proxy="")
    with live.provider, daemon as live.daemon:
        asked = post("/p/v1/chat/completions", b'{"model": "m"}', "x-api-key: k")
        assert live.get(asked).status == 502
        text = daemon.admin("/metrics")
    names = re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, labels in re.findall(r"^(\w+)\{([^}]*)\} ", text, re.MULTILINE):
        own = name if name in found else _SUFFIX.sub("", name)
        found[own] |= {label.partition("=")[0] for label in labels.split(",")}
    return found


def dashboard() -> Any:
    """Return the dashboard."""
    return json.loads((FOLDER / "dashboard.json").read_text())


def expressions() -> list[str]:
    """Return what the dashboard asks Prometheus."""
    panels = dashboard()["panels"]
    return [target["expr"] for one in panels for target in one.get("targets", ())]


def test_rules_and_dashboard_name_what_the_daemon_has(exposed: dict[str, set[str]]) -> None:
    """A name that no daemon exposes would be an alert that never fires."""
    records = _RECORD.sub("", RULES.read_text())
    records = re.sub(r"\bjob:llmproxy_\w+(?::\w+)?", "", records)
    asked = set(_METRIC.findall(records)) | set(_METRIC.findall("\n".join(expressions())))
    unknown = {name for name in asked if not {name, _SUFFIX.sub("", name)} & exposed.keys()}
    assert unknown == set()
    assert len(asked) > 30


def test_rules_and_dashboard_use_labels_that_the_daemon_has(exposed: dict[str, set[str]]) -> None:
    """A label that a metric has not selects nothing, and no tool says so."""
    rules = re.findall(r"expr: (.*?)\n(?=  [-#]|    [a-z]|- )", RULES.read_text(), re.DOTALL)
    checked = set()
    for expression in [*rules, *expressions()]:
        text = re.sub(r'"[^"]*"', "", expression)
        used = _SELECTED.findall(text)
        used += [(name, labels) for labels, name in _GROUPED.findall(text)]
        for name, labels in used:
            own = name if name in exposed else _SUFFIX.sub("", name)
            known = exposed.get(own, set())
            if not known:
                continue
            checked.add(own)
            asked = set(re.findall(r"\w+", labels)) - _OF_PROMETHEUS
            assert asked <= known, (expression, own, asked - known)
    assert len(checked) > 15, sorted(checked)


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
