"""What is built from this tree, and that twistd finds the plugin wherever it is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Builds and fresh environments; on a slow machine the first test waits for all of them.
pytestmark = pytest.mark.timeout(300)

FOLDERS = ("llmproxy", "tests", "systemd", "monitoring", "docs", "changelog.d")
FILES = (
    "CONTRIBUTING.rst",
    "Containerfile",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.rst",
    "constraints.txt",
    "pyproject.toml",
    "setup.cfg",
    "twisted/plugins/llmproxy_plugin.py",
)
# What a checkout collects, and what of the repository has no place in an sdist.
LITTER = (
    ".ci/run",
    ".gitignore",
    ".venv/bin/python",
    "bench/run.py",
    "build/lib/llmproxy/old.py",
    "docs/.mypy_cache/x.json",
    "llmproxy.egg-info/SOURCES.txt",
    "llmproxy/__pycache__/errors.cpython-311.pyc",
    "tests/.pytest_cache/v",
    "tests/__pycache__/conftest.cpython-311.pyc",
    "twisted/plugins/__pycache__/llmproxy_plugin.cpython-311.pyc",
    "twisted/plugins/dropin.cache",
    "twistd.log",
)
RUN_TWISTD = "import sys; from twisted.scripts.twistd import run; sys.argv[0] = 'twistd'; run()"


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program without anything of our own environment's Python; give back what it printed."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy(target: Path) -> set[str]:
    """Copy what an sdist is made of to an empty folder; give back the names of its files."""
    for folder in FOLDERS:
        skip = shutil.ignore_patterns("__pycache__", "*_cache", ".hypothesis", "node_modules")
        shutil.copytree(ROOT / folder, target / folder, ignore=skip)
    for file in FILES:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target / file)
    return {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}


def build(tree: Path, *options: str, into: Path | None = None) -> Path:
    """Build with the tools of this environment; give back the folder of what was built."""
    folder = tree / "dist" if into is None else into
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", folder, *options, tree, cwd=tree.parent)
    return folder


def in_wheel(folder: Path) -> set[str]:
    """The names in the one wheel of a folder, the metadata's as ``dist-info/NAME``."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return {re.sub(r"^llmproxy-[^/]*\.dist-info/", "dist-info/", name) for name in names}


def in_sdist(folder: Path) -> set[str]:
    """The names in the one sdist of a folder, without its first folder."""
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


def version_of(folder: Path) -> str:
    """The version in the name of the one wheel of a folder."""
    (wheel,) = folder.glob("*.whl")
    return wheel.name.split("-")[1]


def commit(tree: Path) -> None:
    """Commit all of a tree, which becomes a repository if it is none."""
    run("git", "init", "-q", cwd=tree)
    run("git", "add", "--all", cwd=tree)
    who = ("-c", "user.name=Tester", "-c", "user.email=tester@example.com")
    run("git", *who, "commit", "-q", "--allow-empty", "-m", "one more", cwd=tree)


def edit_setup(tree: Path, section: str, key: str, value: str | None) -> None:
    """Change one value of a copy's setup.cfg, or take it out."""
    setup = ConfigParser(interpolation=None)
    setup.read(tree / "setup.cfg")
    if value is None:
        setup.remove_option(section, key)
    else:
        setup[section][key] = value
    with (tree / "setup.cfg").open("w") as file:
        setup.write(file)


class Environment:
    """A fresh virtual environment that holds one llmproxy, and finds its requirements elsewhere.

    They are those of the environment that runs the tests, linked one by one, so that neither an
    llmproxy nor a plugin that is installed there can be taken for the one under test.
    """

    def __init__(self, root: Path) -> None:
        self.elsewhere = root / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        venv.create(root / "venv", symlinks=True)
        self.bin = root / "venv" / "bin"
        ours = Path(sysconfig.get_path("purelib"))
        linked = root / "requirements"
        own = {path.name for path in ours.glob("*llmproxy*")}
        _link(ours, linked, but={*own, "twisted"})
        _link(ours / "twisted", linked / "twisted", but={"plugins"})
        plugins = Path("twisted", "plugins")
        _link(ours / plugins, linked / plugins, but={"llmproxy_plugin.py", "dropin.cache"})
        site = root / "venv" / ours.relative_to(sys.prefix)
        (site / "requirements.pth").write_text(f"{linked}\n")

    def install(self, *what: str | Path) -> None:
        """Install with this environment's pip and nothing from outside this machine."""
        pip = (sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-qq")
        alone = ("--no-deps", "--no-index", "--no-build-isolation")
        run(*pip, *alone, *what, cwd=self.elsewhere)

    def lists_the_plugin(self) -> bool:
        """Whether ``twistd --help``, called in a folder that is not ours, lists it."""
        listed = run(self.bin / "python", "-P", "-c", RUN_TWISTD, "--help", cwd=self.elsewhere)
        assert re.search(r"^ +web +", listed, re.MULTILINE), listed
        return re.search(r"^ +llmproxy +\w", listed, re.MULTILINE) is not None


def _link(source: Path, target: Path, but: set[str]) -> None:
    target.mkdir()
    for entry in source.iterdir():
        if entry.name not in but:
            (target / entry.name).symlink_to(entry)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A copy of the tree with the litter of a used checkout, and the names that are no litter."""
    tree = tmp_path_factory.mktemp("source") / "llmproxy"
    names = copy(tree)
    for name in LITTER:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    # What setuptools wrote at an earlier build, when a file had not yet been left out.
    (tree / "llmproxy.egg-info" / "SOURCES.txt").write_text("setup.cfg\nbench/run.py\n")
    return tree, names


@pytest.fixture(scope="session")
def built(source: tuple[Path, set[str]]) -> Path:
    """The folder with the sdist and, built from that, the wheel."""
    return build(source[0])


@pytest.fixture(scope="session")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel."""
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(*built.glob("*.whl"))
    return environment


@pytest.fixture
def variant(tmp_path: Path) -> Callable[[str, str, str | None], Path]:
    """Make a copy of the tree with one value of setup.cfg changed."""

    def make(section: str, key: str, value: str | None) -> Path:
        copy(tmp_path / "llmproxy")
        edit_setup(tmp_path / "llmproxy", section, key, value)
        return tmp_path / "llmproxy"

    return make


def wheel_of(names: set[str]) -> set[str]:
    """What the wheel of a tree with these files holds, and nothing else."""
    kinds = (".py", "py.typed", ".html", ".css", ".mjs", ".lua")
    modules = {n for n in names if n.startswith("llmproxy/") and n.endswith(kinds)}
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    plugin = "twisted/plugins/llmproxy_plugin.py"
    return modules | {plugin, "dist-info/licenses/LICENSE"} | {f"dist-info/{n}" for n in metadata}


@pytest.mark.trap("P1")
def test_the_wheel_holds_the_package_and_the_plugin(
    source: tuple[Path, set[str]], built: Path
) -> None:
    """It holds modules, py.typed, pages, the plugin and metadata: no tests, no documents."""
    assert in_wheel(built) == wheel_of(source[1])
    assert {"llmproxy/py.typed", "llmproxy/gateway/assets/page.html"} <= in_wheel(built)


def test_the_sdist_holds_the_source(source: tuple[Path, set[str]], built: Path) -> None:
    """The sdist holds what is built, tested and read, and nothing that a checkout collects."""
    made = {"PKG-INFO", "llmproxy.egg-info/SOURCES.txt"}
    assert in_sdist(built) == source[1] | made


@pytest.mark.trap("P1")
def test_twistd_finds_the_plugin_of_the_wheel(installed: Environment) -> None:
    """``twistd --help`` lists llmproxy where the wheel is installed."""
    assert installed.lists_the_plugin()


def test_the_command_of_the_wheel_runs(installed: Environment) -> None:
    """The ``llmproxy`` command starts and explains itself where the wheel is installed."""
    usage = run(installed.bin / "llmproxy", "--help", cwd=installed.elsewhere)
    assert usage.lower().startswith("usage: llmproxy")


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")


@needs_git
def test_each_commit_is_a_version_of_its_own(tmp_path: Path) -> None:
    """``pip install --upgrade`` of a later commit's wheel replaces what is installed, and back."""
    tree = tmp_path / "llmproxy"
    copy(tree)
    environment = Environment(tmp_path / "environment")
    wheels: list[Path] = []
    for number in ("first", "second"):
        commit(tree)
        wheels += build(tree, "--wheel", into=tmp_path / number).glob("*.whl")
    versions = []
    for wheel in (*wheels, wheels[0]):
        environment.install("--upgrade", wheel)
        said = run(environment.bin / "llmproxy", "--version", cwd=environment.elsewhere)
        versions.append(said.split()[1])
        assert versions[-1] == wheel.name.split("-")[1]
    assert versions[0] != versions[1]


@needs_git
def test_an_sdist_has_the_version_of_its_commit(tmp_path: Path) -> None:
    """What is built from it, where there is no git, has the same version."""
    tree = tmp_path / "llmproxy"
    copy(tree)
    commit(tree)
    (sdist,) = build(tree, "--sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert not (source / ".git").exists()
    version = version_of(build(source, "--wheel"))
    assert source.name == f"llmproxy-{version}"
    assert version != "0.0"


def test_a_tree_without_git_can_be_built(built: Path) -> None:
    """Its version says that nothing is known."""
    assert version_of(built) == "0.0"


@pytest.mark.trap("P1")
@pytest.mark.parametrize(
    ("section", "key", "value", "missing", "surplus"),
    [
        ("options", "packages", "find:", "twisted/plugins/llmproxy_plugin.py", None),
        ("options.packages.find", "include", None, None, "tests/conftest.py"),
    ],
    ids=["find:", "find_namespace: without include"],
)
def test_other_ways_to_find_packages_are_wrong(
    variant: Callable[[str, str, str | None], Path],
    section: str,
    key: str,
    value: str | None,
    missing: str | None,
    surplus: str | None,
) -> None:
    """``find:`` drops the plugin and a bare ``find_namespace:`` ships the tests: both are seen."""
    tree = variant(section, key, value)
    wanted = wheel_of({str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()})
    found = in_wheel(build(tree, "--wheel"))
    assert missing is None or missing in wanted - found
    assert surplus is None or surplus in found - wanted


@pytest.mark.trap("P2")
def test_twistd_finds_the_plugin_of_an_editable_install(tmp_path: Path) -> None:
    """``twistd --help`` lists llmproxy where the tree is installed by ``pip install -e``."""
    copy(tmp_path / "llmproxy")
    environment = Environment(tmp_path / "environment")
    environment.install("-e", tmp_path / "llmproxy")
    assert environment.lists_the_plugin()


@pytest.mark.trap("P2")
def test_an_editable_install_of_the_default_mode_hides_the_plugin(
    variant: Callable[[str, str, str | None], Path], tmp_path: Path
) -> None:
    """Without ``mode = compat`` twistd does not see the plugin: the setting is still needed."""
    environment = Environment(tmp_path / "environment")
    environment.install("-e", variant("editable_wheel", "mode", None))
    assert not environment.lists_the_plugin()
