"""Runs the harness under atheris: ``python -m tests.fuzz.run TARGET``, then options.

The options are libFuzzer's; ``--plant=NAME`` first puts a fault into the readers.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from typing import Any

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]  # has no types

with atheris.instrument_imports(include=["llmproxy"]):
    from llmproxy.http1 import framing
    from llmproxy.upstream.http1 import Connection
    from tests.fuzz import harness

TARGETS: dict[str, Callable[[bytes], None]] = {
    "response": harness.response,
    "request": harness.request,
}

STRANGE = [
    b"+",
    b"-",
    b"0",
    b"0x",
    b"_",
    b" ",
    b"\t",
    b",",
    b";",
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b"f",
]
STRANGE += [b"X: y\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"]
STRANGE += [b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"0\r\n\r\n", b"1\r\nx\r\n"]
STRANGE += [b"HTTP/1.1 100 X\r\n\r\n", b"HTTP/1.0 200 X\r\n", b"chunked", b"gzip", b"9" * 19]


def plant_plus() -> None:
    """Let the size of a chunk begin with a sign, as ``int`` alone would."""
    framing._CHUNK_LINE = re.compile(rb"(\+?" + framing._CHUNK_LINE.pattern[1:])


def plant_extra() -> None:
    """Keep a connection on which something followed a response."""
    settle: Any = Connection._settle
    Connection._settle = lambda self, extra: settle(self, b"")  # type: ignore[method-assign]  # a stand-in


PLANTS = {"plus": plant_plus, "extra": plant_extra}


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Change an input: as libFuzzer does, or by something strange where a line or value begins."""
    choose = random.Random(seed)
    if choose.random() < 0.3:
        return bytes(atheris.Mutate(data, most))
    starts = [at + 1 for at in range(2, len(data)) if data[at] in b"\n: ,;"] or [len(data)]
    at = choose.choice(starts)
    gone = choose.choice((0, 0, 0, 1, 2))
    return (data[:at] + choose.choice(STRANGE) + data[at + gone :])[:most]


def main(arguments: list[str]) -> None:
    """Fuzz one target until the options say that it is enough, or a fault is found."""
    name, *options = arguments
    for option in list(options):
        if option.startswith("--plant="):
            PLANTS[option.partition("=")[2]]()
            options.remove(option)
    atheris.Setup([sys.argv[0], *options], TARGETS[name], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
