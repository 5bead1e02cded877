"""Which version of the program is installed."""

from importlib import metadata


def version() -> str:
    """Return the installed version, or ``(not installed)`` where only the source is there."""
    try:
        return metadata.version("llmproxy")
    except metadata.PackageNotFoundError:
        return "(not installed)"
