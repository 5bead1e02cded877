"""The command that prints a credential: what it may print, how long it may take, what is killed."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path

import pytest

from llmproxy.upstream.command import CommandFailed, Run
from tests.support.commands import script

SECRET = "tok-SECRET"
LONG = 64 * 1024


def run(path: Path, *arguments: str, deadline_s: float = 20.0, **environ: str) -> str:
    """Run a program, and return what it printed."""
    environ.setdefault("PATH", os.environ["PATH"])
    return Run((str(path), *arguments), time.monotonic, environ)(deadline_s).reveal()


def failure(path: Path, **options: float) -> str:
    """Run a program that prints no credential, and return why."""
    with pytest.raises(CommandFailed) as caught:
        run(path, **options)  # type: ignore[arg-type]  # of the deadline alone
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        ("echo tok-1", "tok-1"),
        ("printf tok-2", "tok-2"),
        ("printf 'tok-3\\r\\n'", "tok-3"),
        ("printf 'a b\\n'", "a b"),
        ("echo tok-4; echo noise >&2", "tok-4"),
        ("exec 1>&-; exit 0 2>/dev/null", None),
        ("printf tok; sleep 0.1; printf -- -5", "tok-5"),
        (f"head -c {LONG} /dev/zero | tr '\\0' x; echo", "x" * LONG),
    ],
)
def test_what_is_printed_is_the_credential(tmp_path: Path, body: str, printed: str | None) -> None:
    """It is one line, as in a credential file; standard error does not belong to it."""
    path = script(tmp_path, body)
    if printed is None:
        assert failure(path) == "expected an output that is not empty"
    else:
        assert run(path) == printed


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"echo {SECRET}; exit 3", "it ended with exit status 3"),
        (f"echo {SECRET}; kill -9 $$", "it was ended by signal 9"),
        ("true", "expected an output that is not empty"),
        (f"echo {SECRET}; echo more", "expected an output of one line of visible ASCII"),
        (f"printf '{SECRET}\\001\\n'", "expected an output of one line of visible ASCII"),
        (f"echo ' {SECRET}'", "without white space at its beginning"),
        (f"head -c {LONG + 1} /dev/zero | tr '\\0' x", "expected an output of at most 64KiB"),
        ("yes", "it printed more than 64KiB, and was killed"),
    ],
)
def test_what_is_no_credential_is_a_failure_that_says_why(
    tmp_path: Path, body: str, why: str
) -> None:
    """The text has nothing of what was printed."""
    assert why in failure(script(tmp_path, body))


def test_a_program_that_cannot_be_run_is_a_failure(tmp_path: Path) -> None:
    """It is missing, or no program."""
    path = tmp_path / "nothing"
    assert failure(path) == "it cannot be run (No such file or directory)"
    path.write_text("x")
    assert failure(path) == "it cannot be run (Permission denied)"


def is_alive(path: Path) -> bool:
    """Tell whether the process lives whose id is in a file."""
    try:
        with open(f"/proc/{int(path.read_text())}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ValueError):
        return False


def await_end(path: Path) -> None:
    """Wait until a process is gone whose id is in a file."""
    deadline = time.monotonic() + 20
    while is_alive(path):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("body", ["", "exec >&-\n"], ids=["silent", "without output"])
def test_a_command_that_hangs_is_killed_with_all_its_processes(tmp_path: Path, body: str) -> None:
    """Its process group goes: a child of a shell would live on."""
    hanging = body + "sleep 1000 & echo $! > FOLDER/child; echo $$ > FOLDER/itself; wait"
    path = script(tmp_path, hanging)
    began = time.monotonic()
    assert failure(path, deadline_s=0.5) == "it took too long, and was killed"
    assert time.monotonic() - began > 0.45
    for name in ("child", "itself"):
        assert (tmp_path / name).exists()
        await_end(tmp_path / name)


def test_a_process_that_is_left_behind_does_not_hold_the_output_up(tmp_path: Path) -> None:
    """A helper may start a daemon of its own, which has the same standard output."""
    body = "sleep 1000 & echo $! > FOLDER/child; echo tok"
    began = time.monotonic()
    assert run(script(tmp_path, body)) == "tok"
    assert time.monotonic() - began < 15
    child = tmp_path / "child"
    assert is_alive(child)
    os.kill(int(child.read_text()), 9)


def test_no_shell_reads_the_arguments(tmp_path: Path) -> None:
    """They reach the program as they are."""
    path = script(tmp_path, 'printf "%s|" "$@"')
    assert run(path, "$HOME", "a b", "*", ";ls", "") == "$HOME|a b|*|;ls||"


def test_the_environment_is_the_daemons_without_what_systemd_tells_it_alone(
    tmp_path: Path,
) -> None:
    """A command that said READY=1 to the manager would be wrong."""
    path = script(tmp_path, 'echo "$KEPT.$NOTIFY_SOCKET.$LISTEN_FDS.$(pwd)"')
    assert run(path, KEPT="kept", NOTIFY_SOCKET="/run/n", LISTEN_FDS="1") == "kept.../"


def test_a_run_can_be_killed_from_another_thread(tmp_path: Path) -> None:
    """The shutdown does not wait for it; killed before it began, it does not begin."""
    path = script(tmp_path, "echo $$ > FOLDER/itself; exec sleep 1000")
    one = Run((str(path),), time.monotonic, {"PATH": os.environ["PATH"]})
    caught: list[CommandFailed] = []

    def target() -> None:
        try:
            one(20.0)
        except CommandFailed as error:
            caught.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    deadline = time.monotonic() + 20
    while not is_alive(tmp_path / "itself"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    one.kill()
    thread.join(20)
    assert [str(error) for error in caught] == ["it was ended by signal 9"]
    with pytest.raises(CommandFailed, match="not run any more"):
        one()


def test_descriptors_beyond_those_of_select_are_no_obstacle(tmp_path: Path) -> None:
    """A busy daemon has thousands; select() takes none above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("needs 2048 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert run(script(tmp_path, "echo tok")) == "tok"
        mine = os.listdir("/proc/self/fd")
        seen = int(run(script(tmp_path, "ls /proc/self/fd | wc -l")))
        assert seen < 10 < 1100 < len(mine)
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
