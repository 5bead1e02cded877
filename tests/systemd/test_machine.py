"""The units under a real systemd: start, watchdog, reload, stop, and restarts under load."""

from __future__ import annotations

import errno
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.support.daemon import ROOT
from tests.support.demo import Demo
from tests.support.live_proxy import read_response, until
from tests.support.load import Load, ask
from tests.support.scripts import DONE
from tests.support.sockets import Wire, connect
from tests.systemd.machine import Impossible, Machine, why_not
from tests.systemd.wheels import checkout, newer

# The first test waits for the base system, the wheels, the boot and the installation.
pytestmark = pytest.mark.timeout(400)

CONFIG_PATH = "/etc/llmproxy/llmproxy.toml"
CONFIG = """\
[proxy]
listen = ["{listen}"]
anonymous = true
[admin]
listen = "unix:/run/{folder}/admin.sock"
[providers.p]
url = "{url}"
dialect = "openai"
credential = "openai-key"
[[routes]]
path = "/p"
providers = ["p"]
[trace]
jsonl = "/var/log/llmproxy/trace-{{instance}}.jsonl"
"""
KEY = "sk-the-providers-own"

DROP_IN = """\
[Service]
LoadCredential=openai-key:/etc/llmproxy/credentials/openai-key
SetCredential=openai-key:\\n
Environment=LLMPROXY_STUCK=/run/stuck
RestartSec=100ms
WatchdogSec=2s
TimeoutStopSec=2s
"""
"""What tests cannot wait for is shortened; a stop may take less time than a stream."""

FETCH = """\
import socket
admin = socket.socket(socket.AF_UNIX)
admin.connect("/run/llmproxy/admin.sock")
admin.sendall(b"GET /metrics HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
print(admin.makefile().read())
"""

OFFLINE = "cd {} && export PIP_NO_INDEX=1 PIP_FIND_LINKS=/srv/dist && set -e\n"

# What makes a reactor stuck: imported at each start of the environment's Python, it does nothing
# unless a file appears.
STUCK = """\
import os, threading, time

def wait(path):
    while not os.path.exists(path):
        time.sleep(0.05)
    from twisted.internet import reactor
    reactor.callFromThread(time.sleep, 120)

if "LLMPROXY_STUCK" in os.environ:
    threading.Thread(target=wait, args=[os.environ["LLMPROXY_STUCK"]], daemon=True).start()
"""


def sequence(heading: str) -> str:
    """Return the first shell commands that stand below a heading of the operators' guide."""
    guide = (ROOT / "docs" / "operations.rst").read_text(encoding="utf-8")
    section = re.split(rf"\n{heading}\n[-~]{{3,}}\n", guide)[-1]
    block = re.search(r"::\n\n((?:    .*\n|\n)+)", section)
    assert block is not None, heading
    return "\n".join(line[4:] for line in block[1].splitlines())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the program was installed as the guide says."""
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no machine of its own: {reason}")
    tree = tmp_path_factory.mktemp("machine") / "llmproxy"
    try:
        with ThreadPoolExecutor() as pool:  # the wheels are ready before the base system is
            wheels = pool.submit(build_wheels, tree)
            machine = Machine(tree)
            wheels.result()
        with machine:
            install(machine)
            yield machine
    except Impossible as error:
        pytest.skip(f"no machine of its own: {error}")


def build_wheels(tree: Path) -> None:
    """Copy this tree with all that an installation needs; a later version lies in it."""
    checkout(tree)
    newer(tree / "newer", "7.7.7")


def install(machine: Machine) -> None:
    """Install, as the guide says, from the tree that the machine sees; without an index."""
    machine.run(OFFLINE.format("/srv") + sequence("Install it"))
    machine.run("cat > $(echo /opt/llmproxy/lib/python3.*/site-packages)/stuck.py", stdin=STUCK)
    machine.run("echo import stuck > $(echo /opt/llmproxy/lib/python3.*/site-packages)/stuck.pth")
    machine.run("install -d -m 700 /etc/llmproxy/credentials")
    machine.write("/etc/llmproxy/credentials/openai-key", f"{KEY}\n", mode="600")
    for unit in ("llmproxy.service", "llmproxy@.service"):
        machine.write(f"/etc/systemd/system/{unit}.d/test.conf", DROP_IN)
    machine.run("systemctl daemon-reload")


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    """The demo provider, on the loopback that host and machine share."""
    with Demo() as demo:
        yield demo


@pytest.fixture
def port() -> int:
    """A port of loopback that is free on host and machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
    return found


@pytest.fixture
def simple(machine: Machine, demo: Demo, port: int) -> Iterator[Machine]:
    """The machine with ``llmproxy.service``."""
    listen = f"tcp:{port}:interface=127.0.0.1"
    machine.write(CONFIG_PATH, CONFIG.format(listen=listen, folder="llmproxy", url=demo.url))
    machine.run("systemctl start llmproxy")
    yield machine
    machine.run("systemctl stop llmproxy; systemctl reset-failed; rm -f /run/stuck")


@pytest.fixture
def several(machine: Machine, demo: Demo, port: int) -> Iterator[Machine]:
    """The machine with ``llmproxy.target``: the socket, and two instances."""
    listen, folder = "systemd:domain=INET:name=proxy", "llmproxy-{instance}"
    machine.write(CONFIG_PATH, CONFIG.format(listen=listen, folder=folder, url=demo.url))
    machine.write(
        "/etc/systemd/system/llmproxy.socket.d/test.conf",
        f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n",
    )
    machine.run("systemctl daemon-reload")
    machine.run("systemctl start llmproxy.socket llmproxy@1 llmproxy@2 llmproxy.target")
    yield machine
    machine.run("systemctl stop llmproxy.target 'llmproxy@*'; systemctl reset-failed")


def serves(port: int) -> bool:
    """Return whether one call gets a response."""
    with connect(port) as wire:
        wire.send(ask(1, "demo-fast"))
        return read_response(wire).status == 200


def begin(port: int, words: int) -> Wire:
    """Begin a stream of twenty words a second."""
    wire = connect(port)
    wire.send(ask(words, "demo-20tps"))
    assert wire.read_head()[0] == b"HTTP/1.1 200 OK"
    return wire


def invocation(machine: Machine, unit: str) -> str:
    """Return the id of this run of a unit."""
    return machine.show(unit, "InvocationID")


def lines(machine: Machine, unit: str, run: str = "") -> list[dict[str, object]]:
    """Return what one run of a unit logged, by default the present one; not systemd's own lines."""
    text = machine.journal(f"{unit} _SYSTEMD_INVOCATION_ID={run or invocation(machine, unit)}")
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_start_waits_until_it_listens(simple: Machine, port: int) -> None:
    """`systemctl start` returns when the daemon serves calls and has its status line."""
    assert serves(port)
    assert simple.show("llmproxy", "ActiveState") == "active"
    assert re.fullmatch(
        r"\d+ streams, \d+ connections, version \S+", simple.show("llmproxy", "StatusText")
    )


def test_the_journal_is_readable(simple: Machine, port: int) -> None:
    """Each line is a JSON object, without a complaint about twistd's cache and without a key."""
    assert serves(port)
    until(
        lambda: any(
            str(line.get("message")).endswith("complete") for line in lines(simple, "llmproxy")
        ),
        "the journal has the request",
    )
    whole = simple.journal("llmproxy")
    assert "dropin.cache" not in whole
    assert "Traceback" not in whole
    assert KEY not in whole


def test_errors_are_found_by_their_priority(simple: Machine, port: int) -> None:
    """`journalctl -p err` has what failed, and each line of ours is still JSON and nothing else."""
    ours = "journalctl -u llmproxy -t llmproxy -o cat --no-pager"
    good = simple.run(f"cat {CONFIG_PATH}")
    simple.run("systemctl reload llmproxy")
    simple.write(CONFIG_PATH, f"{good}\n[limits]\nspeed = 3\n")
    assert "code 0" not in simple.run("systemctl reload llmproxy; echo code $?")
    simple.run("systemctl kill --kill-who=main -s HUP llmproxy")  # what no check has seen
    until(lambda: "reload failed" in simple.run(f"{ours} -p err"), "the daemon's own error")
    simple.run("systemctl restart llmproxy; true")
    simple.write(CONFIG_PATH, good)
    simple.run("systemctl start llmproxy; journalctl --sync")
    errors = [json.loads(line) for line in simple.run(f"{ours} -p err").splitlines()]
    words = [str(one.get("message", one.get("problems"))) for one in errors]
    for said in ("reload failed, nothing has changed: limits", "cannot start: limits", "['limits"):
        assert any(said in word for word in words), (said, words)
    assert not any("listens on" in word for word in words)
    every = [json.loads(line) for line in simple.run(ours).splitlines()]
    assert any("listens on" in str(one.get("message")) for one in every)


def test_the_sandbox_hides_no_metric_of_the_process(simple: Machine, port: int) -> None:
    """Memory, descriptors and start are there, although the units hide most of /proc."""
    page = simple.run(f"python3 -c '{FETCH}'")
    found = dict(re.findall(r"^(process_\w+) (\S+)$", page, re.MULTILINE))
    assert float(found["process_resident_memory_bytes"]) > 10 << 20
    assert float(found["process_open_fds"]) > 5
    now = float(simple.run("date +%s"))
    assert now - 3600 < float(found["process_start_time_seconds"]) < now + 2


def test_files_belong_to_a_user_of_the_services_own(simple: Machine, port: int) -> None:
    """Traces are closed to others, and only root can read the keys."""
    assert serves(port)
    until(lambda: simple.run("cat /var/log/llmproxy/trace-0.jsonl"), "a trace is written")
    pid = simple.show("llmproxy", "MainPID")
    user = simple.run(f"stat -c %u /proc/{pid}").strip()
    assert int(user) >= 61184  # systemd's range of dynamic users
    assert simple.run("stat -L -c '%u %a' /var/log/llmproxy").split() == [user, "750"]
    assert simple.run("stat -c '%u %a' /var/log/llmproxy/trace-0.jsonl").split() == [user, "600"]
    assert simple.run("stat -c %a /etc/llmproxy/credentials/openai-key").strip() == "600"


def test_an_upgrade_and_the_way_back(simple: Machine, port: int) -> None:
    """As the guide has it: both versions are shown, and the status is of what runs."""

    def runs() -> str:
        return simple.show("llmproxy", "StatusText").rpartition(" ")[2]

    assert runs() == "0.0"
    said = simple.run(OFFLINE.format("/srv/newer") + sequence("Upgrade"))
    assert re.findall(r"^llmproxy (\S+)$", said, re.MULTILINE) == ["0.0", "7.7.7"]
    before = invocation(simple, "llmproxy")
    simple.run("systemctl reload llmproxy")
    until(
        lambda: any("reloaded" in str(line.get("message")) for line in lines(simple, "llmproxy")),
        "the process has said something new",
    )
    assert runs() == "0.0"
    simple.run("systemctl restart llmproxy")
    assert invocation(simple, "llmproxy") != before
    assert runs() == "7.7.7"
    assert serves(port)
    said = simple.run(OFFLINE.format("/srv") + sequence("Upgrade"))
    assert re.findall(r"^llmproxy (\S+)$", said, re.MULTILINE) == ["7.7.7", "0.0"]
    simple.run("systemctl restart llmproxy")
    assert runs() == "0.0"
    assert serves(port)


def test_logrotate_asks_by_a_signal(simple: Machine, port: int) -> None:
    """What the guide lets logrotate do reaches the daemon, which opens its trace file again."""
    path = "/var/log/llmproxy/trace-0.jsonl"
    guide = (ROOT / "docs" / "operations.rst").read_text(encoding="utf-8")
    (ask_it,) = re.findall(r"postrotate\n +(.*)\n +endscript", guide)
    until(lambda: simple.run(f"test -e {path} && echo yes; true"), "it writes traces")
    simple.run(f"mv {path} {path}.1")
    simple.run(ask_it)
    until(lambda: simple.run(f"test -e {path} && echo yes; true"), "it is there again")
    assert serves(port)


def test_a_reload_of_a_good_file(simple: Machine, port: int) -> None:
    """The same process goes on; the journal says that it read its file."""
    before = simple.show("llmproxy", "MainPID")
    simple.run("systemctl reload llmproxy || { journalctl -u llmproxy -n 20; false; }")
    until(
        lambda: any("reloaded" in str(line.get("message")) for line in lines(simple, "llmproxy")),
        "the reload is in the journal",
    )
    until(lambda: simple.show("llmproxy", "ActiveState") == "active", "it is ready again")
    assert simple.show("llmproxy", "MainPID") == before
    assert serves(port)


def test_a_reload_of_a_bad_file_fails_visibly(simple: Machine, port: int) -> None:
    """`systemctl` fails, the journal has the reason, and the process goes on as it was."""
    before = simple.show("llmproxy", "MainPID")
    good = simple.run(f"cat {CONFIG_PATH}")
    simple.write(CONFIG_PATH, f"{good}\n[limits]\nspeed = 3\n")
    said = simple.run("systemctl reload llmproxy; echo code $?")
    simple.write(CONFIG_PATH, good)
    assert "code 0" not in said
    assert "limits.speed: unknown key" in simple.journal("llmproxy")
    assert simple.show("llmproxy", "ActiveState") == "active"
    assert simple.show("llmproxy", "MainPID") == before
    assert not any(
        "reload failed" in str(line.get("message")) for line in lines(simple, "llmproxy")
    )
    assert serves(port)


def assert_failed(machine: Machine, unit: str, reason: str) -> None:
    """Check that systemd has given a unit up, and that both of its views have the reason."""
    assert machine.run(f"systemctl is-failed {unit}; true").strip() == "failed"
    assert reason in machine.show(unit, "StatusText")
    assert reason in machine.run(f"systemctl status --no-pager {unit}; true")


def test_a_mistake_in_the_file_is_a_failure_at_once(simple: Machine, port: int) -> None:
    """`is-failed` is true after one start, whose reason `systemctl status` has."""
    good = simple.run(f"cat {CONFIG_PATH}")
    simple.write(CONFIG_PATH, f"{good}\n[limits]\nspeed = 3\n")
    assert "code 0" not in simple.run("systemctl restart llmproxy; echo code $?")
    assert_failed(simple, "llmproxy", "cannot start: limits.speed: unknown key")
    assert simple.show("llmproxy", "NRestarts") == "0"
    simple.write(CONFIG_PATH, good)
    simple.run("systemctl start llmproxy")
    assert serves(port)


def test_a_credential_file_that_is_missing_is_named(simple: Machine, port: int) -> None:
    """By the key of the configuration that asks for it; systemd itself would name nothing."""
    path = "/etc/llmproxy/credentials/openai-key"
    simple.run(f"mv {path} {path}.away")
    assert "code 0" not in simple.run("systemctl restart llmproxy; echo code $?")
    assert_failed(simple, "llmproxy", "cannot start: providers.p.credential")
    simple.run(f"mv {path}.away {path}; systemctl start llmproxy")
    assert serves(port)


def test_a_start_that_fails_for_ever_is_a_failure(simple: Machine, port: int) -> None:
    """What might heal is tried until the limit of starts; then `is-failed` is true."""
    limit = "/etc/systemd/system/llmproxy.service.d/limit.conf"
    good = simple.run(f"cat {CONFIG_PATH}")
    simple.write(limit, "[Unit]\nStartLimitBurst=4\n")
    simple.write(CONFIG_PATH, good.replace("/var/log/llmproxy/trace", "/nowhere/trace"))
    simple.run("systemctl daemon-reload; systemctl restart llmproxy; true")
    until(lambda: simple.show("llmproxy", "ActiveState") == "failed", "systemd gives up")
    assert_failed(simple, "llmproxy", "/nowhere/trace-0.jsonl")
    assert int(simple.show("llmproxy", "NRestarts")) > 1
    simple.write(CONFIG_PATH, good)
    simple.run(f"rm {limit}; systemctl daemon-reload; systemctl reset-failed llmproxy")
    simple.run("systemctl start llmproxy")
    assert serves(port)


def test_a_reactor_that_is_stuck_is_restarted(simple: Machine, port: int) -> None:
    """The watchdog kills the process, and the next one serves."""
    before = invocation(simple, "llmproxy")
    simple.run("touch /run/stuck")
    until(lambda: simple.show("llmproxy", "ActiveState") != "active", "the watchdog has bitten")
    simple.run("rm /run/stuck")
    until(lambda: simple.show("llmproxy", "ActiveState") == "active", "it has started again")
    assert invocation(simple, "llmproxy") != before
    assert simple.show("llmproxy", "NRestarts") == "1"
    journal = simple.journal("llmproxy")
    assert "Watchdog timeout" in journal
    stack = journal.partition("Fatal Python error: Aborted")[2]
    assert "most recent call first" in stack
    assert "in runUntilCurrent" in stack
    assert serves(port)


def test_a_stop_lets_a_stream_end(simple: Machine, port: int) -> None:
    """The daemon gets more time than the unit gives, and `systemctl status` has the reason."""
    run = invocation(simple, "llmproxy")
    with begin(port, 120) as stream:
        stopping = simple.start("systemctl stop llmproxy")
        until(
            lambda: "draining: 1 streams are left" in simple.show("llmproxy", "StatusText"),
            "the status shows the drain",
        )
        assert stream.read_chunks().endswith(DONE)
    said, _ = stopping.communicate(timeout=20)
    assert stopping.returncode == 0, said
    assert simple.show("llmproxy", "Result") == "success"
    drained = [line for line in lines(simple, "llmproxy", run) if "finished" in line]
    assert [(line["finished"], line["cut"]) for line in drained] == [(1, 0)]


def test_instances_are_restarted_in_turn_under_load(several: Machine, port: int) -> None:
    """Short calls and streams are served without a retry: none is refused, and none is broken."""
    before = {name: invocation(several, f"llmproxy@{name}") for name in "12"}
    with Load(port, words=60) as load:
        load.wait_more("fresh", 20)
        for name in "12":
            several.run(f"systemctl restart llmproxy@{name}")
    load.assert_whole("fresh", "kept", "stream")
    for name in "12":
        assert invocation(several, f"llmproxy@{name}") != before[name]
        assert several.show(f"llmproxy@{name}", "Result") == "success"


@pytest.mark.parametrize("what", ["'llmproxy@*.service'", "llmproxy.target"])
def test_a_restart_of_all_keeps_the_port(several: Machine, port: int, what: str) -> None:
    """A client that connects while no instance runs waits in the socket's queue."""
    before = {name: invocation(several, f"llmproxy@{name}") for name in "12"}

    def all_are_new() -> bool:
        return all(
            several.show(f"llmproxy@{name}", "ActiveState") == "active"
            and invocation(several, f"llmproxy@{name}") != before[name]
            for name in "12"
        )

    with Load(port, fresh=2, kept=0, streams=0) as load:
        load.wait_more("fresh", 5)
        several.run(f"systemctl restart {what}")
        until(all_are_new, "both have started again")
        load.wait_more("fresh", 5)
    load.assert_whole("fresh")


def test_an_instance_that_cannot_start_harms_no_other(several: Machine, port: int) -> None:
    """It is tried again and again, and says why; socket and other instance stay."""
    good = several.run(f"cat {CONFIG_PATH}")
    several.write(CONFIG_PATH, good.replace("/var/log/llmproxy/trace", "/nowhere/trace"))
    assert "code 0" not in several.run("systemctl restart llmproxy@2; echo code $?")
    until(lambda: int(several.show("llmproxy@2", "NRestarts")) > 6, "it is tried again and again")
    assert several.show("llmproxy.socket", "ActiveState") == "active"
    assert several.show("llmproxy@1", "ActiveState") == "active"
    until(
        lambda: "/nowhere/trace-2.jsonl" in several.show("llmproxy@2", "StatusText"),
        "the reason is shown",
    )
    assert serves(port)
    several.write(CONFIG_PATH, good)
    until(lambda: several.show("llmproxy@2", "ActiveState") == "active", "it has started")
    assert serves(port)


def test_an_instance_whose_file_has_a_mistake_has_failed(several: Machine, port: int) -> None:
    """It is not tried again; socket and other instance stay, and a start by hand is enough."""
    good = several.run(f"cat {CONFIG_PATH}")
    several.write(CONFIG_PATH, "speed = 3\n")
    assert "code 0" not in several.run("systemctl restart llmproxy@2; echo code $?")
    assert_failed(several, "llmproxy@2", "cannot start: speed: unknown key")
    assert several.show("llmproxy.socket", "ActiveState") == "active"
    assert several.show("llmproxy@1", "ActiveState") == "active"
    assert serves(port)
    several.write(CONFIG_PATH, good)
    several.run("systemctl start llmproxy@2")
    assert serves(port)


def test_the_target_stops_everything(several: Machine, port: int) -> None:
    """Socket and instances stop with the target, and the port is closed."""
    several.run("systemctl stop llmproxy.target")
    units = ("llmproxy.socket", "llmproxy@1", "llmproxy@2")
    until(
        lambda: {several.show(unit, "ActiveState") for unit in units} == {"inactive"},
        "all have ended",
    )
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_service_and_target_exclude_each_other(several: Machine, demo: Demo, port: int) -> None:
    """A start of the one stops the other."""
    listen = f"tcp:{port}:interface=127.0.0.1"
    several.write(CONFIG_PATH, CONFIG.format(listen=listen, folder="llmproxy", url=demo.url))
    several.run("systemctl start llmproxy")
    assert several.show("llmproxy.socket", "ActiveState") == "inactive"
    assert several.show("llmproxy@1", "ActiveState") == "inactive"
    assert serves(port)
    several.run("systemctl start llmproxy.target; systemctl stop llmproxy.target")
    assert several.show("llmproxy", "ActiveState") == "inactive"


BOTH = "llmproxy llmproxy.socket llmproxy@1 llmproxy@2 llmproxy.target"


def test_both_ways_at_boot_are_one_or_an_error(several: Machine, demo: Demo, port: int) -> None:
    """If both are enabled, the port has one owner; instances without their file say so."""
    several.run(f"systemctl stop llmproxy.target; systemctl enable {BOTH}")
    try:
        several.run("systemctl isolate multi-user.target")
        until(lambda: serving(several, port), "one of both serves")
        assert several.show("llmproxy", "ActiveState") == "inactive"

        listen = f"tcp:{port}:interface=127.0.0.1"
        several.run(f"systemctl stop {BOTH}")
        several.write(CONFIG_PATH, CONFIG.format(listen=listen, folder="llmproxy", url=demo.url))
        several.run("systemctl isolate multi-user.target")
        for name in "12":
            unit = f"llmproxy@{name}"
            until(partial(has_failed, several, unit), f"{unit} has failed")
            assert_failed(several, unit, "proxy.listen: expected an endpoint such as systemd:")
    finally:
        several.run(f"systemctl disable {BOTH}; systemctl stop {BOTH}; true")


def has_failed(machine: Machine, unit: str) -> bool:
    """Return whether systemd has given a unit up."""
    return machine.show(unit, "ActiveState") == "failed"


def serving(machine: Machine, port: int) -> bool:
    """Return whether both instances are active and serve."""
    active = all(machine.show(f"llmproxy@{name}", "ActiveState") == "active" for name in "12")
    return active and serves(port)


def test_the_port_moves(several: Machine, port: int) -> None:
    """With the lines of the guide; the file of the configuration stays as it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        moved = free.getsockname()[1]
    several.run(f"systemctl enable {BOTH.removeprefix('llmproxy ')}")
    try:
        several.write(
            "/etc/systemd/system/llmproxy.socket.d/test.conf",
            f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{moved}\n",
        )
        several.run("systemctl daemon-reload")  # as `systemctl edit` does
        assert serves(port)
        several.run(sequence("Move the port"))
        until(lambda: serving(several, moved), "it serves there")
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
    finally:
        several.run(f"systemctl disable {BOTH.removeprefix('llmproxy ')}")


def test_nothing_of_a_machine_stays() -> None:
    """No mount of an earlier machine is left on the host."""
    assert "llmproxy-machine-" not in Path("/proc/self/mounts").read_text()
