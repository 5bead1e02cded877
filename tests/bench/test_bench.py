"""The benchmark's own arithmetic and grammar; its figures are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import build, compare, peers, quick, ramps, results, starting, table, works
from bench.peers import Listen, Start
from bench.processes import Cores, Program, cores
from bench.rig import Target

ROOT = Path(__file__).parents[2]

LOAD: Mapping[str, Any] = {
    "mode": "stream",
    "elapsed": 2.0,
    "cpu_us": 500_000,
    "events": 1000,
    "events_s": 500,
    "whole": 10,
    "failed": 0,
    "unfinished": 0,
    "wrong": 0,
    "requests_s": 5.0,
    "mb_s": 0.1,
    "delay_us": {"p50": 80.0, "p99": 300.0, "p999": 700.0, "max": 900.0},
    "gap_us": {"p50": 40.0, "p99": 200.0, "p999": 600.0, "max": 900.0},
    "beside_us": None,
    "first_us": {"p50": 90.0, "p99": 400.0, "max": 900.0},
    "round_us": None,
    "left": [],
    "error": "",
}
STATS = {"timed": 1000, "late": 20, "stuck_bytes": 3_000_000}


def observed(shared: bool = True, stats: Any = STATS, **more: Any) -> works.Observed:
    """Return a run in which the load generator reports these values, and else the usual ones."""
    line = {**LOAD, **{name: value for name, value in more.items() if name in LOAD}}
    closes = more.get("closes", {})
    return works.Observed(line, stats, 20_000, 300_000, [1024, 3072, 2048], shared, closes)


# -- the command line -----------------------------------------------------------------------------


def test_everything_is_measured_by_default() -> None:
    """Without arguments all peers and all workloads are measured, three times."""
    asked = compare.options([])
    assert asked.work == list(works.WORKS)
    assert set(asked.peer) == set(peers.EVERY)
    assert (asked.runs, asked.secs, asked.out) == (3, 5.0, None)


def test_the_daemon_is_measured_with_every_choice() -> None:
    """The daemon stands before the named peers: plain, by TLS or both, as they are."""
    assert compare.options(["--peer", "nginx,go"]).peer == ["llmproxy", "nginx", "go"]
    assert peers.choose("go-tls") == ["llmproxy-tls", "go-tls"]
    assert peers.choose("llmproxy") == ["llmproxy"]
    assert peers.choose("go, go-tls") == ["llmproxy", "llmproxy-tls", "go", "go-tls"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--peer", "apache"], "no peer 'apache'"),
        (["--peer", "caddy-tls"], "no peer 'caddy-tls'"),
        (["--peer", "traefik-tls"], "no peer 'traefik-tls'"),
        (["--peer", "litellm-tls"], "no peer 'litellm-tls'"),
        (["--work", "W1,W99"], "no workload 'W99'"),
        (["--runs", "0"], "above zero"),
        (["--secs", "0"], "above zero"),
        (["--secs", "long"], "invalid float value"),
    ],
)
def test_a_wrong_argument_is_reported(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be measured ends the program, with a line that names it."""
    with pytest.raises(SystemExit) as ended:
        compare.options(args)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_every_workload_has_whole_arguments() -> None:
    """No placeholder is left in the load generator's arguments, and W1 has the asked length."""
    for work in works.WORKS.values():
        assert "{" not in " ".join(works.arguments(work, 3))
    args = works.arguments(works.WORKS["W1"], 3)
    assert args[args.index("--events") + 1] == "150"
    assert ramps.rate_arguments(10_000)[5:8] == ["200", "--interval-us", "20000"]


def test_each_proxy_has_the_workloads_that_it_can_do() -> None:
    """TLS on both sides is for those that can end it; some works are done plainly alone."""
    taken = {name: works.WORKS[name] for name in ("W1", "W8", "W8T", "W9", "START")}
    asked = ("go", "go-tls", "aiohttp-tls", "litellm")
    assert {name: [work for work in taken if peers.takes(name, taken[work])] for name in asked} == {
        "go": ["W1", "W8", "W9", "START"],
        "go-tls": ["W1", "W8", "W8T"],
        "aiohttp-tls": ["W1", "W8"],
        "litellm": ["W1", "START"],
    }


def test_more_rounds_are_estimated_to_last_longer() -> None:
    """The estimate grows with proxies, rounds and the length of a run."""
    once = compare.estimate(["llmproxy"], ["W1"], 1, 5)
    assert compare.estimate(["llmproxy", "go"], ["W1"], 3, 5) == pytest.approx(6 * once)
    assert compare.estimate(["llmproxy"], ["W1"], 1, 10) > once


def test_processors_are_shared_out() -> None:
    """Of two processors the proxy has one to itself, of three the provider has one as well."""
    assert cores({4}) == Cores(4, 4, 4)
    assert cores({1, 0}) == Cores(0, 1, 1)
    assert cores({0, 1, 2, 3}) == Cores(0, 1, 3)
    assert cores({0, 1}).shared
    assert not cores(range(3)).shared


# -- one run's figures ----------------------------------------------------------------------------


def test_figures_are_read_from_the_load_generators_line() -> None:
    """Costs are for one event, memory is in MiB, and a figure that was not measured is absent."""
    found = works.figures(works.WORKS["W1"], observed())
    assert (found["us_event"], found["late_share"]) == (20.0, 2.0)
    assert (found["delay_p50"], found["delay_p99"], found["first_p99"]) == (80.0, 300.0, 400.0)
    assert (found["delay_p999"], found["gap_p50"], found["us_stream"]) == (700.0, 40.0, 2000.0)
    assert (found["pss_mib"], found["grown_mib"]) == (3.0, 2.0)
    assert not {"us_request", "round_p50", "beside_p50", "resumed_share"} & set(found)


def test_streams_that_ran_before_have_delays_of_their_own() -> None:
    """What is told of the streams beside which others were opened is not mixed with the rest."""
    beside = {"p50": 1.0, "p99": 2.0, "p999": 3.0, "max": 4.0}
    found = works.figures(works.WORKS["W9"], observed(beside_us=beside))
    assert (found["beside_p99"], found["delay_p99"]) == (2.0, 300.0)


def test_resumed_handshakes_are_a_share() -> None:
    """Of four handshakes with the provider one went on with a session."""
    seen = replace(observed(), resumed=[True, False, False, False])
    assert works.figures(works.WORKS["W8T"], seen)["resumed_share"] == 25.0


def test_requests_are_counted_where_nothing_streams() -> None:
    """In a closed loop the cost is that of one request."""
    loop = {"p50": 1.0, "p99": 2.0, "max": 3.0}
    seen = observed(events=0, delay_us=None, round_us=loop, stats={"timed": 0})
    found = works.figures(works.WORKS["W3"], seen)
    assert (found["us_request"], found["round_p99"]) == (2000.0, 2.0)
    assert not {"us_event", "late_share"} & set(found)


def test_a_shared_processor_is_busy_with_both() -> None:
    """Provider and load generator add up on one processor; on two the busier one counts."""
    assert works.figures(works.WORKS["W1"], observed())["load_share"] == 40.0
    assert works.figures(works.WORKS["W1"], observed(shared=False))["load_share"] == 25.0


def test_closes_are_matched_by_their_numbers() -> None:
    """A close that the provider never saw is counted; times are in milliseconds."""
    seen = observed(left=[[0, 1_000_000], [1, 1_000_000]], closes={0: 3_000_000})
    found = works.figures(works.WORKS["W7"], seen)
    assert (found["close_p50"], found["close_p99"], found["untold"]) == (2.0, 2.0, 1)


def test_a_rate_is_sustained_only_when_everything_is_whole() -> None:
    """Delay, failures and the lack of any event each speak against a rate."""
    assert ramps.is_sustained(LOAD)
    slow = {"p50": 80.0, "p99": 100_000.0, "max": 1e6}
    for fault in ({"delay_us": slow}, {"delay_us": None}, {"unfinished": 1}, {"wrong": 1}):
        assert not ramps.is_sustained({**LOAD, **fault})


class Tiring:
    """A rig whose proxy holds so many streams; ``asked`` has the number of each step."""

    def __init__(self, most: int, on_time: int = 10_000) -> None:
        self.most = most
        self.on_time = on_time
        self.asked: list[int] = []

    def observe(self, _: Target, args: list[str], proxy: object = None) -> works.Observed:
        """Return what a step would show."""
        count = int(args[args.index("--conns") + 1])
        self.asked.append(count)
        delay = {"p50": 10.0, "p99": 1e6 if count > self.most else float(count), "p999": 0.0}
        stats = {"timed": 100, "late": 50 if count > self.on_time else 0}
        return observed(stats=stats, delay_us=delay, cpu_us=1_500_000)


def test_streams_rise_until_delays_are_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has figures of its own, and the one that does not hold is tried twice."""
    monkeypatch.setattr(ramps, "_REST", 0.0)
    rig: Any = Tiring(600)
    found = ramps.most_streams(rig, Target(1, "/"), rig)
    assert rig.asked == [100, 250, 500, 750, 750]
    assert (found["max_streams"], found["delay_p99"], found["beyond_p99"]) == (500, 500.0, 1e6)
    assert [found[f"delay_p99@{count}"] for count in rig.asked[:3]] == [100.0, 250.0, 500.0]
    assert (found["pss_mib@500"], "delay_p99@750" in found) == (3.0, False)
    assert "at the next step load generator at 90 %" in table.remarks(found)


def test_streams_end_where_the_provider_no_longer_keeps_its_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy that would hold more is not said to hold what nobody sent in time."""
    monkeypatch.setattr(ramps, "_REST", 0.0)
    rig: Any = Tiring(5000, on_time=300)
    found = ramps.most_streams(rig, Target(1, "/"), rig)
    assert (found["max_streams"], found["beyond_late_share"]) == (250, 50.0)
    assert table.remarks(found).endswith("at the next step 50 % of events sent late")


def test_runs_are_combined_into_medians() -> None:
    """A median is not moved by one odd run; failures and shares are the worst of all."""
    pairs = ((10.0, 0.0), (12.0, 2.0), (99.0, 1.0))
    runs = [{"us_event": x, "failures": y, "load_share": y} for x, y in pairs]
    assert works.combine(runs) == {"us_event": 12, "failures": 2, "load_share": 2}
    assert works.combine([{"us_event": 1}, {}]) == {"us_event": 1}


# -- the table ------------------------------------------------------------------------------------


def test_a_peer_is_compared_with_the_daemon_on_the_same_upstream() -> None:
    """Plain with plain, TLS with TLS; without the daemon's own line there is no ratio."""
    runs = {
        "llmproxy": [{"us_event": 30.0}],
        "llmproxy-tls": [{"us_event": 40.0}],
        "nginx": [{"us_event": 20.0}],
        "nginx-tls": [{"us_event": 80.0}],
        "go": [{"us_event": 0.0}],
        "haproxy": [],
    }
    w1 = works.WORKS["W1"]
    assert table.ratios(w1, runs) == {"nginx": 1.5, "nginx-tls": 0.5}
    assert table.ratios(w1, {"nginx": runs["nginx"]}) == {}


def test_the_table_shows_figures_ratios_and_doubts() -> None:
    """Each line has its figures; a busy load generator and failures stand behind it."""
    good = works.figures(works.WORKS["W1"], observed(stats={"timed": 0}))
    busy = {**good, "us_event": 10.0, "load_share": 97.0, "failures": 3, "late_share": 5.0}
    shown = table.table({"W1": {"llmproxy": [good, good], "nginx": [busy], "go": []}})
    title, head, ours, nginx, go, *_ = shown.splitlines()
    assert title.startswith("W1  200 streams")
    assert head.split()[:2] == ["µs/event", "p50"]
    assert ours.split() == ["llmproxy", "20.0", "80.0", "300", "400", "20.0..20.0", "3.00", "40"]
    assert nginx.endswith("2.00  3 FAILED, load generator at 97 %, 5 % of events sent late")
    assert go.endswith("did not run")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0"),
        (0.123, "0.12"),
        (22.04, "22.0"),
        (355.6, "356"),
        (355_600.0, "356k"),
    ],
)
def test_figures_have_the_digits_that_mean_something(value: float | None, shown: str) -> None:
    """Three digits or so, and thousands where there are many."""
    assert table.number(value) == shown


# -- programs -------------------------------------------------------------------------------------


def test_a_program_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """Stopping ends a child as well, and costs are those of both."""
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('started', flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    with Program(command, min(os.sched_getaffinity(0)), tmp_path / "log") as program:
        over = time.monotonic() + 30
        while len(pids := program.pids()) < 2:
            assert time.monotonic() < over
            time.sleep(0.01)
        assert program.is_running()
        assert program.cpu_us() > 0
        assert program.pss_kib() > 0
    assert not program.is_running()
    over = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < over
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


STARTING = (
    "import os, socket, sys, time\n"
    "time.sleep(0.05)\n"
    "listener = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
    "time.sleep(0.05)\n"
    "notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
    "notified.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n"
    "time.sleep(600)\n"
)


def test_a_start_is_timed_until_the_port_takes_and_until_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both moments are seen, in their order, and the memory of a proxy that rests."""
    monkeypatch.setattr(starting, "TIMES", 2)
    core = min(os.sched_getaffinity(0))

    def begin(listen: Listen) -> Start:
        return Start([sys.executable, "-c", STARTING, str(listen.port)], {})

    found = starting.starts(begin, core, tmp_path / "log")
    assert 50 < found["ready_ms"] < found["notified_ms"]
    assert found["idle_mib"] > 0


def test_a_proxy_that_does_not_start_is_told_with_its_last_word(tmp_path: Path) -> None:
    """What it wrote last is in the error."""

    def begin(_: Listen) -> Start:
        return Start([sys.executable, "-c", "raise SystemExit('no such file')"], {})

    with pytest.raises(build.CannotBuildError, match="does not start: no such file"):
        starting.starts(begin, min(os.sched_getaffinity(0)), tmp_path / "log")


def test_a_missing_program_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that is not installed is named in the error."""
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(build.CannotBuildError, match="gcc is not installed"):
        build.find("gcc")


def test_an_interpreter_that_is_not_there_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is named, and no environment is made."""
    monkeypatch.setattr(build, "CACHE", tmp_path)
    with pytest.raises(build.CannotBuildError, match=r"llmproxy cannot be built: .*python9\.9"):
        build.environment("llmproxy", "python9.9", "twisted")
    assert not list(tmp_path.iterdir())


def test_the_daemon_has_a_line_for_each_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is compared with the daemon's usual line, and one that cannot be had is left out."""

    def have(python: str) -> tuple[str, str]:
        if python == "none":
            raise build.CannotBuildError("none cannot be had")
        return "3.12.1", python

    monkeypatch.setattr(build, "daemon_python", have)
    monkeypatch.setattr(peers, "PEERS", dict(peers.PEERS))
    monkeypatch.setattr(compare, "PEERS", peers.PEERS)
    asked = compare.options(["--peer", "go", "--python", "python3.12", "--python", "none"])
    names = compare.other_interpreters(asked.python, asked.peer)
    assert names == ["llmproxy-3.12.1"]
    assert "left out: none cannot be had" in capsys.readouterr().out
    assert compare.available(names) == {"llmproxy-3.12.1": "python3.12"}
    assert peers.takes(names[0], works.WORKS["W9"])
    assert table.ours_for(names[0]) == "llmproxy"


def test_an_environment_is_made_once_and_anew_for_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is kept as long as the interpreter and what is installed are the same."""
    ran = []

    def run(what: str, *command: str) -> str:
        ran.append(command)
        (tmp_path / "env-x").mkdir(exist_ok=True)
        return "3.12"

    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setattr(build, "_run", run)
    assert build.environment("x", "python3.12", "one==1").endswith("env-x/bin/python")
    assert [command[1:3] for command in ran[1:]] == [("-m", "venv"), ("-m", "pip")]
    build.environment("x", "python3.12", "one==1")
    assert len(ran) == 4
    build.environment("x", "python3.12", "one==2")
    assert ran[-1][-1] == "one==2"


def test_every_configuration_can_be_written(tmp_path: Path) -> None:
    """No placeholder is left, plain and by TLS, and the daemon takes its own."""
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    pair = tmp_path / "localhost.pem"
    pair.write_text("KEY\n-----BEGIN CERTIFICATE-----\n")
    for upstream in (peers.Upstream(9000), peers.Upstream(9000, authority)):
        for name in ("nginx", "haproxy", "envoy", "caddy", "traefik", "litellm", "llmproxy"):
            if name != "nginx" or upstream.authority is not None:
                peers.PEERS[name].start("program", Listen(8000), upstream, tmp_path)
    for name, peer in peers.PEERS.items():
        if peer.ends_tls:
            peer.start(name, Listen(8001, pair), peers.Upstream(9000, authority), tmp_path)
    for made in tmp_path.iterdir():
        assert made.is_dir() or "$" not in made.read_text()


# -- bench-quick ----------------------------------------------------------------------------------


def test_a_change_is_that_of_the_least_figures() -> None:
    """A line compares the least figures, where there is an earlier result."""
    now = quick.Spread(11.0, 12.0, 13.0)
    assert quick.line("event", now, {"event": [10.0, 99.0, 99.0]}).split()[-2:] == ["+10", "%"]
    assert quick.line("event", now, {}).split() == ["event", "11.00", "12.00", "13.00"]


def test_figures_of_another_machine_are_not_compared(tmp_path: Path) -> None:
    """A result is compared with one of the same machine, and a broken or missing one with none."""
    path, machine = tmp_path / "quick.json", results.machine()
    assert quick.earlier(path, machine)[0] == {}
    path.write_text("{")
    assert quick.earlier(path, machine)[0] == {}
    content = {"date": "d", "commit": "c", "machine": machine, "figures": {"event": [1, 2, 3]}}
    results.keep(path, content)
    assert quick.earlier(path, machine)[0] == {"event": [1, 2, 3]}
    figures, why = quick.earlier(path, {**machine, "kernel": "other"})
    assert figures == {}
    assert "another machine" in why


def test_bench_quick_runs(tmp_path: Path) -> None:
    """Every case runs, a few times, and the result is kept where it is wanted."""
    path = tmp_path / "quick.json"
    command = [sys.executable, "-m", "bench.quick", "--scale", "0.0001", "--file", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(path.read_text())["figures"]
    assert [name.partition(",")[0] for name in figures] == [
        "grammar: parse_fields",
        *["grammar: ChunkedReader.feed"] * 2,
        *["event in memory"] * 5,
        *["event over loopback"] * 2,
        "request over loopback",
    ]
    assert all(name in done.stdout for name in figures)
