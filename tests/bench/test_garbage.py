"""What requests leave behind: no objects that hold each other, for the collector to find.

The daemon runs over loopback as for ``make bench-quick``, in a process of its own, because its
reactor is run again and again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import gc, sys, tempfile
from pathlib import Path
from bench import quick_loop as loop

count = 50
with tempfile.TemporaryDirectory() as folder:
    stage = loop.Stage(Path(folder))

    def requests():
        stage.reply = loop.RESPONSE
        loop.exchange(
            stage, count, lambda end: end.sock.sendall(loop.request()), loop.MARK, proxied=True
        )

    def streams():
        piece = loop.chunk(loop.event(223))
        stage.reply = loop.HEAD + piece
        for _ in range(count):  # each is left by its client
            loop.exchange(
                stage,
                3,
                lambda _: stage.asked.sock.sendall(piece),
                loop.MARK + b"\\r\\n",
                proxied=True,
            )

    work = {"requests": requests, "streams": streams}[sys.argv[1]]
    work()
    gc.collect()
    gc.disable()
    work()
    print(gc.collect() / count)
    stage.close()
"""


@pytest.mark.parametrize(("work", "most"), [("requests", 1), ("streams", 60)])
def test_little_is_left_for_the_collector(work: str, most: float) -> None:
    """A request leaves no object that only the collector could find, a broken one a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, work], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= most
