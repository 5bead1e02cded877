#!/bin/sh
# OpenSSL answers a FIN without close_notify with an alert of its own.
#
# Packages: pyOpenSSL 26.4.0, with the OpenSSL that cryptography 50.0.2 carries.
#
# A TLS 1.3 client reads a whole response and closes its socket's sending side without close_notify,
# as many HTTP clients do.  The server's next SSL_read fails, and that call itself
# writes a record to the socket: a fatal alert of 24 bytes (19 after the header).  Nobody asked for
# it, and send() was not called.  Two consequences for a program that watches its socket:
#
#  - the kernel's send queue (SIOCOUTQ) is not empty any more although every byte of the response was
#    acknowledged, so "is everything acknowledged?" must be asked before the read that finds the end;
#  - a client that has closed its whole socket answers that record with a reset, which follows an
#    exchange in which nothing went wrong.
#
# Seen:
#     read at the server: SysCallError -1 Unexpected EOF
#     written by the read: 24 bytes, record type 23
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyopenssl==26.4.0 cryptography==50.0.2 2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import datetime, socket

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL, crypto

key = ec.generate_private_key(ec.SECP256R1())
name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server.example")])
now = datetime.datetime.now(datetime.timezone.utc)
certificate = (
    x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    .sign(key, hashes.SHA256())
)
context = SSL.Context(SSL.TLS_METHOD)
context.use_certificate(certificate)
context.use_privatekey(key)

ours, theirs = socket.socketpair()
server, client = SSL.Connection(context, ours), SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
server.set_accept_state()
client.set_connect_state()
ours.setblocking(False)
theirs.setblocking(False)


def turn(call):
    try:
        call()
    except (SSL.WantReadError, BlockingIOError):
        pass
    try:
        theirs.sendall(client.bio_read(65536))
    except SSL.WantReadError:
        pass
    try:
        client.bio_write(theirs.recv(65536))
    except BlockingIOError:
        pass


for _ in range(6):
    turn(client.do_handshake)
    turn(server.do_handshake)
server.send(b"a whole response")
turn(lambda: None)
assert client.recv(100) == b"a whole response"
assert client.get_protocol_version_name() == "TLSv1.3"
theirs.shutdown(socket.SHUT_WR)  # a FIN, and no close_notify
try:
    server.recv(100)
except SSL.Error as error:
    print("read at the server:", type(error).__name__, *error.args)
written = theirs.recv(65536)
print(f"written by the read: {len(written)} bytes, record type {written[0] if written else None}")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" | tee "$folder/out"
grep -qx 'read at the server: SysCallError -1 Unexpected EOF' "$folder/out"
grep -qx 'written by the read: 24 bytes, record type 23' "$folder/out"
