"""``make bench-sandbox``: what an interception costs, and what a tunnel does.

The daemon stands beside a proxy of Go's standard library that ends TLS (``proxies/mitm.go``), and
beside HAProxy as a forwarder of TCP.  The load generator knows no proxy: ``src/sandboxed.go`` puts
each of its connections through a CONNECT, and TLS where it is ended; it runs beside the load
generator, and what it costs does not count.  The provider is reached by TLS where a row says so.
``docs/benchmark.rst`` has figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import build, peers, results
from bench.peers import Start, Upstream
from bench.processes import Program, free_port
from bench.rig import Bench, Target, open_bench
from bench.table import number
from bench.works import WORKS, Figures, Work
from llmproxy.cli.ca import make_authority

HOST = "inference.local"

NEW = Work(
    "new",
    "3,000 streams of one event within five seconds, each on a connection of its own",
    "--mode stream --conns 3000 --events 1 --interval-us 1000 --ramp 5 --timeout 60",
    "us_event",
    (),
    5,
)


class Way(NamedTuple):
    """One way from the load generator to the provider.

    Attributes:
        start: starts the proxy: from port, provider, folder.
        asks: the authority that each connection asks for, or None where it asks for none.
        ends_tls: the proxy ends TLS.
    """

    start: Callable[[int, Upstream, Path], Start]
    asks: Callable[[Upstream], str] | None
    ends_tls: bool


def daemon(port: int, upstream: Upstream, folder: Path) -> Start:
    """Start the daemon, which intercepts one host and has tunnels to the provider."""
    config = peers.daemon_config(upstream, folder, port, free_port(), peers.KEY)
    made = folder / "authority"
    if not made.exists():
        report = make_authority(str(made), [HOST], days=2)
        Path(report.ca_key).rename(folder / "credentials" / "ca-key")
    more = f'[intercept]\nhosts = ["{HOST}"]\nca_certificate = {json.dumps(str(made / "ca.pem"))}\n'
    more += f'ca_key = "ca-key"\n[tunnel]\nallow = ["127.0.0.1:{upstream.port}"]\n'
    config.write_text(config.read_text() + more + "allow_private = true\nmax_per_client = 0\n")
    run = ["-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", "llmproxy"]
    command = [sys.executable, *run, "--config", str(config)]
    return Start(command, {"PYTHONPATH": str(build.ROOT)}, f"/openai{peers.PATH}")


def mitm(port: int, upstream: Upstream, folder: Path) -> Start:
    """Start Go's proxy, which ends TLS for every host."""
    _, certificate = build.certificates()
    command = [build.go_program("proxies/mitm.go"), str(port), str(certificate), str(certificate)]
    return Start(command, {"UPSTREAM": upstream.url, "GOMAXPROCS": "1"}, peers.PATH)


def blind(port: int, upstream: Upstream, folder: Path) -> Start:
    """Start Go's proxy, which tunnels to every host."""
    return mitm(port, upstream, folder)._replace(environ={"GOMAXPROCS": "1"})


def forwarder(port: int, upstream: Upstream, folder: Path) -> Start:
    """Start HAProxy, which forwards TCP."""
    config = folder / f"forwarder-{port}.cfg"
    peers.render("forwarder.cfg", config, port=port, upstream=upstream.port)
    return Start([build.find("haproxy"), "-f", str(config)], {}, peers.PATH)


def _tunnelled(start: Start) -> Start:
    return start._replace(path=peers.PATH)


WAYS = {
    "plain": Way(daemon, None, ends_tls=False),
    "intercepted": Way(daemon, lambda _: f"{HOST}:443", ends_tls=True),
    "go": Way(mitm, lambda _: f"{HOST}:443", ends_tls=True),
    "tunnel": Way(
        lambda *given: _tunnelled(daemon(*given)),
        lambda upstream: f"127.0.0.1:{upstream.port}",
        ends_tls=False,
    ),
    "go-tunnel": Way(blind, lambda upstream: f"127.0.0.1:{upstream.port}", ends_tls=False),
    "haproxy": Way(forwarder, None, ends_tls=False),
}

ROWS: tuple[tuple[str, Work, bool, tuple[str, ...], str], ...] = (
    ("an event", WORKS["W1"], False, ("plain", "intercepted", "go"), "us_event"),
    (
        "an event, TLS to the provider",
        WORKS["W1"],
        True,
        ("plain", "intercepted", "go"),
        "us_event",
    ),
    ("a request", WORKS["W3"], False, ("plain", "intercepted", "go"), "us_request"),
    (
        "a connection of its own",
        NEW,
        False,
        ("plain", "intercepted", "go", "tunnel", "go-tunnel"),
        "us_event",
    ),
    ("11 MB through a tunnel", WORKS["W5"], False, ("tunnel", "haproxy"), "us_request"),
)


def run(bench: Bench, folder: Path, way: Way, upstream: Upstream, work: Work) -> Figures:
    """Measure one way with one workload, once.

    Raises:
        CannotBuildError: a program cannot be built, or does not start.
    """
    port, log = free_port(), folder / "programs.log"
    start = way.start(port, upstream, folder)
    with Program(start.command, bench.where.proxy, log, start.environ) as proxy:
        if not proxy.wait_for(port):
            raise build.CannotBuildError(f"a proxy does not start: {log.read_text()[-300:]}")
        if way.asks is None:
            return bench.measure(work, proxy, Target(port, start.path), 3.0)
        own, key = free_port(), b64encode(f"bench:{peers.KEY}".encode()).decode()
        command = [build.go_program("src/sandboxed.go"), str(own), str(port), way.asks(upstream)]
        command += [] if way.ends_tls else ["plain"]
        environ = {"GOMAXPROCS": "1"}
        if not way.ends_tls:
            environ["PROXY_AUTHORIZATION"] = f"Basic {key}"
        with Program(command, bench.where.load, log, environ) as between:
            if not between.wait_for(own):
                raise build.CannotBuildError("the sandbox does not start")
            return bench.measure(work, proxy, Target(own, start.path), 3.0)


def main(args: Sequence[str]) -> int:
    """Measure in turn, and print a line for each row."""
    parser = argparse.ArgumentParser(prog="make bench-sandbox ARGS=...", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    asked = parser.parse_args(args)
    build.CACHE.mkdir(parents=True, exist_ok=True)
    print(f"{results.describe(results.machine())}; commit {results.commit() or 'unknown'}")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=build.CACHE))
    try:
        with open_bench(folder, secure=True) as bench:
            for title, work, secure, names, figure in ROWS:
                upstream = bench.secure if secure else bench.plain
                if upstream is None:
                    continue
                seen: dict[str, list[float]] = {name: [] for name in names}
                for at in range(asked.rounds):
                    for name in names if at % 2 == 0 else reversed(names):
                        found = run(bench, folder, WAYS[name], upstream, work)
                        if found.get("failures"):
                            print(f"{title}: {name}: {number(found['failures'])} failures")
                        seen[name].append(found[figure])
                told = (f"{name} {number(median(values))}" for name, values in seen.items())
                print(f"{title}, µs: {', '.join(told)}", flush=True)
    except build.CannotBuildError as error:
        print(f"nothing more is measured: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
