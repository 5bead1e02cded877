#!/bin/sh
# wsproto inflates one frame of permessage-deflate to whatever it becomes, in one piece.
#
# Package: wsproto 1.3.2.
#
# RFC 7692, section 8, leaves limits to the implementation.  A frame of 40 KB can hold 40 MB of zeros:
# receive_data() returns when all of it is in memory, as one event.  There is no option for a bound,
# and the caller sees nothing before it.  So whoever reads frames of strangers needs an extension of
# its own in the place of wsproto's PerMessageDeflate (llmproxy/stream/websocket.py has one).
#
# Seen:
#     40775 bytes on the wire, 1 event, 41943040 bytes
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check wsproto==1.3.2 \
    2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import struct, zlib

from wsproto.connection import Connection, ConnectionType
from wsproto.extensions import PerMessageDeflate

packer = zlib.compressobj(9, zlib.DEFLATED, -15)
packed = (packer.compress(b"\0" * 40 * 1024**2) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]
wire = b"\xc2\x7e" + struct.pack("!H", len(packed)) + packed

extension = PerMessageDeflate()
extension.finalize("permessage-deflate")
client = Connection(ConnectionType.CLIENT, [extension])
client.receive_data(wire)
events = list(client.events())
size = sum(len(event.data) for event in events)
print(f"{len(wire)} bytes on the wire, {len(events)} event, {size} bytes")
raise SystemExit(0 if len(events) == 1 and size == 40 * 1024**2 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
