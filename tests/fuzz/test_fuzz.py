"""Short runs of a coverage-guided fuzzer over both readers, which finds faults that are planted."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import harness

HERE = Path(__file__).parent
CORPUS = sorted(path for path in (HERE / "corpus").glob("*/*") if path.is_file())

SEED = int(os.environ["LLMPROXY_TEST_SEED"])  # tests/conftest.py

FAULTS = {
    "plus": "accepted what is refused elsewhere",
    "extra": "what follows changes nothing but the connection",
}

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: it has wheels for Linux on x86-64 only",
)


def fuzz(target: str, folder: Path, *options: str, seed: int, corpus: str = "*") -> tuple[int, str]:
    """Run the fuzzer on a copy of the corpus; return its exit status and what it printed."""
    copied = folder / "corpus"
    copied.mkdir()
    for path in (HERE / "corpus" / f"{target}s").glob(corpus):
        shutil.copy(path, copied)
    command = [sys.executable, "-m", "tests.fuzz.run", target, f"-seed={seed}", "-max_len=640"]
    command += ["-len_control=0", "-mutate_depth=1", f"-artifact_prefix={folder}/"]
    command += [*options, str(copied)]
    done = subprocess.run(
        command, cwd=HERE.parents[1], capture_output=True, text=True, errors="replace", check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus_holds(path: Path) -> None:
    """Each input of the corpus breaks nothing, also where there is no fuzzer."""
    target = harness.response if path.parent.name == "responses" else harness.request
    data = path.read_bytes()

    for control in range(0, 256, 15):
        target(data[:1] + bytes([control]) + data[2:])


@needs_atheris
@pytest.mark.parametrize("target", ["response", "request"])
def test_a_short_run_finds_nothing(target: str, tmp_path: Path) -> None:
    """Some seconds of fuzzing break nothing that must hold, and do reach our code."""
    status, output = fuzz(target, tmp_path, "-max_total_time=4", seed=SEED)

    assert status == 0, output[-4000:]
    done = re.search(r"DONE +cov: (\d+)", output)
    assert done is not None
    assert int(done[1]) > 100


@needs_atheris
@pytest.mark.parametrize(
    ("target", "plant", "message"),
    [
        ("response", "plus", "chunked"),
        ("request", "plus", "chunked"),
        ("response", "extra", "length"),
    ],
)
def test_a_planted_fault_is_found(target: str, plant: str, message: str, tmp_path: Path) -> None:
    """A sign before a chunk's size, and bytes left for the next response, do not go unseen.

    It begins with one good message, and always tries the same, so that what it finds depends
    neither on the machine's pace nor on the commit.
    """
    status, output = fuzz(
        target, tmp_path, f"--plant={plant}", "-runs=20000", seed=1, corpus=message
    )

    assert status != 0
    assert f"Broken: {FAULTS[plant]}" in output
