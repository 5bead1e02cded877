"""Which version of the program runs."""

import os
import re
import sys
from contextlib import suppress
from functools import cache

_dist_info = re.compile(r"llmproxy-([^-]+)\.dist-info").fullmatch
"""The folder of an installed distribution, whose name has the version (PEP 427)."""


@cache
def version() -> str:
    """Return the version that was installed at the first call.

    A process calls it at its start: what is installed beneath it later is not what runs.
    ``importlib.metadata`` would take half a MB and as long as reading a configuration.

    Returns:
        ``(not installed)`` where only the source is there.
    """
    for folder in sys.path:
        with suppress(OSError):
            for found in filter(None, map(_dist_info, os.listdir(folder or os.curdir))):
                return found[1]
    return "(not installed)"
