"""What must be built before anything is measured, in a folder that is kept: ``build/bench``.

What cannot be built is left out, and one line says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "bench"
SOURCES = ROOT / "bench" / "src"
PROXIES = ROOT / "bench" / "proxies"

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


class CannotBuildError(Exception):
    """Something that is needed is not there; the text is for whoever started the benchmark."""


def find(program: str) -> str:
    """Return the path of a program.

    Raises:
        CannotBuildError: it is not installed.
    """
    found = shutil.which(program) or shutil.which(program, path=_SYSTEM_PATH)
    if found is None:
        raise CannotBuildError(f"{program} is not installed")
    return found


def find_peer(program: str) -> str:
    """Return the path of a program that ``make peers`` has from PyPI, or of another one.

    Raises:
        CannotBuildError: it is not installed.
    """
    newest = ROOT / ".venv-peers" / "bin" / program
    return str(newest) if newest.exists() else find(program)


def is_fresh(made: Path, *sources: Path) -> bool:
    """Tell whether ``made`` is there and younger than all that it is made from."""
    if not made.exists():
        return False
    return all(made.stat().st_mtime >= source.stat().st_mtime for source in sources)


def tool(name: str) -> str:
    """Build the provider (``mock``) or the load generator (``load``); return its path."""
    made = CACHE / name
    if not is_fresh(made, *SOURCES.iterdir()):
        _compile(name, made, str(SOURCES / f"{name}.c"))
    return str(made)


def _compile(what: str, made: Path, *options: str) -> None:
    """Build a program of C; another process may build the same one meanwhile."""
    made.parent.mkdir(parents=True, exist_ok=True)
    new = made.with_name(f"{made.name}.{os.getpid()}")
    _run(what, find("gcc"), "-O2", "-o", str(new), *options)
    new.replace(made)


def load_by_tls() -> str:
    """Build the load generator whose connections are by TLS; return its path.

    Raises:
        CannotBuildError: gcc or OpenSSL's headers are missing.
    """
    made = CACHE / "load-tls"
    if not is_fresh(made, *SOURCES.iterdir()):
        source = str(SOURCES / "load.c")
        _compile("load by TLS", made, "-DWITH_TLS", source, "-lssl", "-lcrypto")
    return str(made)


def go_proxy() -> str:
    """Build Go's ReverseProxy; return its path."""
    return go_program("proxies/reverseproxy.go")


def go_program(name: str) -> str:
    """Build a program from a file below ``bench/``; return its path."""
    source = ROOT / "bench" / name
    made = CACHE / source.stem
    if not is_fresh(made, source):
        _run(source.stem, find("go"), "build", "-o", str(made), str(source))
    return str(made)


def daemon_python(python: str) -> tuple[str, str]:
    """Install what the daemon needs for another CPython; return its version, and its Python there.

    Raises:
        CannotBuildError: there is no such interpreter, or pip cannot do that.
    """
    told = "import platform; print(platform.python_version())"
    version = _run(f"llmproxy for {python}", python, "-c", told).strip()
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needs = setup["options"]["install_requires"].split("\n")
    pins = ("-c", str(ROOT / "constraints.txt"))
    name = f"llmproxy-{version}"
    return version, environment(name, python, *pins, *(line for line in needs if line))


def aiohttp_python() -> str:
    """Install aiohttp and uvloop into a folder of their own; return that one's Python.

    It is the interpreter that runs the daemon, too.
    """
    return environment("aiohttp", sys.executable, "aiohttp", "uvloop")


def litellm_python() -> str:
    """Install LiteLLM's proxy into a folder of its own, 0.8 GB; return that one's Python."""
    return environment("litellm", sys.executable, "litellm[proxy]==1.108.7")


def portkey() -> str:
    """Install Portkey's gateway by npm; return the path of its program."""
    folder, source = CACHE / "portkey", PROXIES / "portkey" / "package.json"
    made = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if not is_fresh(made.parent, source):
        npm, node = find("npm"), find("node")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(source, folder)
        options = ("--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund")
        _run("portkey", npm, "install", *options, "--prefix", str(folder))
        _run("portkey", node, "--check", str(made))
        os.utime(made.parent)  # npm keeps the times of its packages
    return str(made)


def environment(name: str, python: str, *what: str) -> str:
    """Install something by pip into a folder of its own; return that one's Python.

    Args:
        name: the folder's, and what an error is about.
        python: the interpreter that the folder is for.
        what: arguments of ``pip install``.

    Raises:
        CannotBuildError: pip cannot do that.
    """
    folder = CACHE / f"env-{name}"
    made, stamp = folder / "bin" / "python", folder / "installed"
    told = "import sys; print(sys.base_prefix, sys.version)"
    wanted = " ".join([_run(name, python, "-c", told).strip(), *what])
    if not stamp.exists() or stamp.read_text() != wanted:
        _run(name, python, "-m", "venv", "--clear", str(folder))
        options = ("--disable-pip-version-check", "--no-input", "-qq", "--retries", "1")
        _run(name, str(made), "-m", "pip", "install", *options, *what)
        stamp.write_text(wanted)
    return str(made)


def certificates() -> tuple[Path, Path]:
    """Make an authority, and a certificate for ``localhost``; return both files.

    Raises:
        CannotBuildError: trustme is not installed.
    """
    authority, certificate = CACHE / "ca.pem", CACHE / "localhost.pem"
    if not (authority.exists() and certificate.exists()):
        try:
            import trustme
        except ImportError:
            raise CannotBuildError("trustme is not installed") from None
        made = trustme.CA()
        issued = made.issue_cert("localhost", "127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(str(certificate))
        made.cert_pem.write_to_path(str(authority))
    return authority, certificate


def _run(what: str, *command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuildError(f"{what} cannot be built: {error}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise CannotBuildError(f"{what} cannot be built: {lines[-1]}")
    return done.stdout
