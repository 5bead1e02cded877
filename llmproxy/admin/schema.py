"""The JSON of the admin site as a JSON Schema, made of the structs that it is encoded from.

``make docs`` writes it into ``docs/admin-api.json``, for programs that ask the site.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import msgspec

from llmproxy.admin.clients import ClientRow
from llmproxy.admin.overview import State
from llmproxy.admin.providers import ProviderRow
from llmproxy.admin.streams import StreamRow, StreamWindow
from llmproxy.record.flight import Capsule

RESPONSES = {
    "GET /streams": StreamWindow,
    "GET /streams/ID": StreamRow,
    "DELETE /streams/ID": StreamRow,
    "GET /streams/ended": list[Capsule],
    "GET /streams/ended/ID": Capsule,
    "GET /providers": list[ProviderRow],
    "POST /providers/NAME/disable": ProviderRow,
    "POST /providers/NAME/enable": ProviderRow,
    "GET /clients": list[ClientRow],
    "GET /config": dict[str, Any],
    "GET /events": State,
}
"""What a response holds, by its request; of ``/events`` the data of each event.

``/config`` has the tables and keys of the configuration file (docs/configuration.rst).
"""


def schema() -> dict[str, object]:
    """Return the schema: below ``responses`` by request, and what these refer to."""
    found, parts = msgspec.json.schema_components(RESPONSES.values(), ref_template="#/$defs/{name}")
    for part in parts.values():
        part["description"] = inspect.cleandoc(part["description"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The admin site of llmproxy",
        "responses": dict(zip(RESPONSES, found, strict=True)),
        "$defs": parts,
    }


def text() -> bytes:
    """Return the schema as it stands in the documentation."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2) + b"\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(text())
