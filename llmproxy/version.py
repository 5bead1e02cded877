"""Which version of the program runs."""

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """Return the version that was installed at the first call.

    A process calls it at its start: what is installed beneath it later is not what runs.

    Returns:
        ``(not installed)`` where only the source is there.
    """
    try:
        return metadata.version("llmproxy")
    except metadata.PackageNotFoundError:
        return "(not installed)"
