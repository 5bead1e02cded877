"""The reference of all keys, as ``docs/configuration.rst`` holds it.

The page has a block between two comments for each section.  The keys in it are written from the
declarations of ``settings.py``: what a key takes, its default, and its docstring.  ``make docs``
runs this module, and a test compares the page with what it would write.  The daemon does not need
this module.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

from llmproxy.config import settings
from llmproxy.config.schema import Key, Section
from llmproxy.config.settings import SECTIONS

_BEGIN = '.. keys of {}: "make docs" writes them from llmproxy/config/settings.py'
_END = ".. end of keys"
_BLOCK = re.compile(
    rf"^{re.escape(_BEGIN).replace(re.escape('{}'), '([^ ]+)')}$.*?^{re.escape(_END)}$",
    re.MULTILINE | re.DOTALL,
)


def rewritten(page: str) -> str:
    """Return ``page`` with the keys of every section written anew.

    Raises:
        ValueError: the blocks of ``page`` are not just those of all sections.
    """
    found = _BLOCK.findall(page)
    if sorted(found) != sorted(SECTIONS):
        raise ValueError(f"expected a block for each of {', '.join(SECTIONS)}, got {found}")
    return _BLOCK.sub(lambda block: _block(block[1]), page)


def _block(path: str) -> str:
    section = SECTIONS[path]
    if section.elsewhere:
        names = ", ".join(f"``{name}``" for name in section.names)
        entries = [f"{names}\n    As in ``[timeouts]``."]
    else:
        entries = [_entry(key, section) for key in section.keys.values()]
    return "\n\n".join([_BEGIN.format(path), *entries, _END])


def _entry(key: Key, section: Section) -> str:
    meaning = textwrap.indent(_meaning(key, section), " " * 4)
    return f"``{key.name}`` ({key.kind.words}, {_default(key)})\n{meaning}"


def _default(key: Key) -> str:
    if key.stated:
        return key.stated
    if key.make is None:
        return "needed"
    default = key.make()
    shown = key.kind.show(default)
    if default in (None, (), {}) and not shown:  # a deadline's None is shown as "off"
        return "default: none"
    return f"default ``{json.dumps(shown)}``"


def _meaning(key: Key, section: Section) -> str:
    """Return the docstring of the key's field; if several keys fill it, the key's paragraph."""
    text = _DOCSTRINGS[key.struct, key.field]
    filling = [one.name for one in section.keys.values() if one.field == key.field]
    return text if len(filling) == 1 else text.split("\n\n")[filling.index(key.name)]


def _docstrings() -> dict[tuple[str, str], str]:
    """Return the docstrings of all fields, by struct and field.

    Python does not keep the string below a field: it is read from the module's source.
    """
    found = {}
    statements = ast.parse(inspect.getsource(settings)).body
    for struct in (one for one in statements if isinstance(one, ast.ClassDef)):
        for field, below in pairwise(struct.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                    found[struct.name, name] = inspect.cleandoc(text)
    return found


_DOCSTRINGS = _docstrings()

if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        file.write_text(rewritten(file.read_text(encoding="utf-8")), encoding="utf-8")
