"""A machine of its own with a real systemd: a Debian base, an overlay over it, a boot by nspawn.

The base is made once, by debootstrap, and kept under ``build/``; whatever a boot writes is gone
with it.  The overlay is mounted in a mount namespace that dies with the machine, which is told to
die with this process: nothing stays behind.  The network is the host's, so that both see the same
ports of loopback.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

from tests.support.daemon import ROOT
from tests.support.live_proxy import until

TOOLS = ("debootstrap", "systemd-nspawn", "nsenter", "unshare", "mount")
SUITE = "bookworm"
BASE = ROOT / "build" / "systemd" / SUITE
PACKAGES = "systemd,systemd-sysv,python3,python3-venv"

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_BOOT = """\
mount -t tmpfs tmpfs "$1" &&
mkdir "$1/upper" "$1/work" "$1/root" &&
mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" overlay "$1/root" &&
exec systemd-nspawn -q -D "$1/root" --register=no --keep-unit --boot --resolv-conf=off \
    --console=pipe --bind-ro="$3:/srv"
"""
_APART = ("unshare", "--mount", "--propagation", "private")
_PR_SET_PDEATHSIG = 1


class Impossible(Exception):
    """No machine can be had here; the text says why."""


def why_not() -> str | None:
    """Return what is missing for a machine, or None."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    return f"not here: {', '.join(missing)}" if missing else None


def base() -> Path:
    """Return the base system's folder; it is made where it is not there yet (about a minute).

    Raises:
        Impossible: debootstrap failed, as without a network.
    """
    if not BASE.exists():
        new = BASE.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.parent.mkdir(parents=True, exist_ok=True)
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(new)],
            env={**os.environ, "PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            shutil.rmtree(new, ignore_errors=True)
            last = made.stdout.strip().splitlines()[-1:]
            raise Impossible(f"debootstrap failed: {''.join(last)}")
        new.rename(BASE)
    if not (BASE / f"usr/bin/python3.{sys.version_info.minor}").exists():
        raise Impossible(f"{SUITE} has another Python than this one, whose wheels would not fit")
    return BASE


class Machine:
    """A booted machine; leaving the context powers it off.

    Args:
        srv: a folder of the host's that it sees as ``/srv``.

    Raises:
        Impossible: it does not boot.
    """

    def __init__(self, srv: Path) -> None:
        self._srv = srv
        self._base = base()

    def __enter__(self) -> Self:
        self._place = tempfile.mkdtemp(prefix="llmproxy-machine-")
        self._console = tempfile.TemporaryFile()
        self._nspawn = subprocess.Popen(
            [*_APART, "sh", "-c", _BOOT, "boot", self._place, str(self._base), str(self._srv)],
            env={"PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_us,
            start_new_session=True,
        )
        try:
            until(self._is_up, "the machine is up", seconds=60)
        except BaseException as error:
            self._end()
            if isinstance(error, TimeoutError | Impossible):
                raise Impossible(f"no boot: {error}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, command: str, *, stdin: str = "", check: bool = True) -> str:
        """Run a shell command in the machine; return what it printed, errors included.

        Raises:
            AssertionError: its exit code is not 0, and ``check`` asks for that.
        """
        done = subprocess.run(
            [*self._enter, "/bin/sh", "-c", command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.returncode}: {done.stdout}"
        return done.stdout

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a shell command in the machine, and do not wait for its end."""
        return subprocess.Popen(
            [*self._enter, "/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def write(self, path: str, text: str, *, mode: str = "644") -> None:
        """Write a file in the machine, and the folders above it."""
        folder = path.rpartition("/")[0]
        self.run(f"mkdir -p {folder} && cat > {path} && chmod {mode} {path}", stdin=text)

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run(f"systemctl show --value -p {name} {unit}").strip()

    def journal(self, unit: str) -> str:
        """Return what a unit wrote to the journal, without the journal's own columns."""
        self.run("journalctl --sync")
        return self.run(f"journalctl -u {unit} -o cat --no-pager")

    def _is_up(self) -> bool:
        if self._nspawn.poll() is not None:
            self._console.seek(0)
            raise Impossible(self._console.read().decode(errors="replace").strip()[-300:])
        pid = self._nspawn.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            return False
        self._enter = ["nsenter", "-t", children[0], "-m", "-u", "-i", "-p", "-n"]
        state = self.run("systemctl is-system-running", check=False).strip()
        return state in ("running", "degraded")

    def _end(self) -> None:
        """Power off; where that takes too long, by force."""
        if self._nspawn.poll() is None:
            self._nspawn.send_signal(signal.SIGTERM)
        try:
            self._nspawn.wait(20)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        self._console.close()
        os.rmdir(self._place)


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
