#!/bin/sh
# Each TLS record costs pyOpenSSL and Python's ssl two reads of the socket, and nothing can change it.
#
# Packages: pyOpenSSL 26.4.0, cryptography 50.0.2 (OpenSSL 4.0.3), and the ssl module of the python3 in use.
#
# OpenSSL reads the five bytes of a record's header first, and then the record, unless it is told to
# read ahead (SSL_CTX_set_read_ahead).  cryptography's bindings, on which pyOpenSSL stands, have no
# such call, and neither has the ssl module.  A proxy that forwards a stream of small events pays
# this for each of them; nginx and Go read ahead, or keep a buffer of their own.  A memory BIO does
# with one read of the socket, and pays for the copy instead.
#
# Seen (reads counted by Linux in /proc/self/io, 1000 records of 200 bytes that come one by one):
#     pyOpenSSL     2.0 reads a record, read_ahead in the bindings: False
#     ssl           2.0 reads a record, read_ahead in the module: False
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pyOpenSSL==26.4.0 cryptography==50.0.2 trustme==1.2.1 \
    2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import os, socket, ssl, sys, threading

import trustme
from OpenSSL import SSL
from OpenSSL._util import lib

RECORDS, SIZE = 1000, 200
authority = trustme.CA()
own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
authority.issue_cert("localhost").configure_cert(own)


def reads():
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("syscr")).split()[1])


def serve(listener, wanted):
    """Send a record for each byte that is written to the pipe; in a process of its own."""
    peer, _ = listener.accept()
    with own.wrap_socket(peer, server_side=True) as peer:
        for _ in range(RECORDS):
            if not os.read(wanted, 1):
                return
            peer.sendall(bytes(SIZE))


def measured(connect):
    listener = socket.create_server(("127.0.0.1", 0))
    wanted, want = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(want)
        serve(listener, wanted)
        os._exit(0)
    os.close(wanted)
    receive = connect(listener.getsockname()[1])
    os.write(want, b"x")
    receive()  # with the session tickets
    before = reads()
    for _ in range(RECORDS - 1):
        os.write(want, b"x")
        assert len(receive()) == SIZE
    counted = reads() - before
    os.close(want)
    os.waitpid(child, 0)
    return counted / (RECORDS - 1)


def by_pyopenssl(port):
    sock = socket.create_connection(("127.0.0.1", port))
    tls = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), sock)
    tls.set_connect_state()
    tls.do_handshake()
    return lambda: tls.recv(16384)


def by_ssl(port):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    tls = context.wrap_socket(
        socket.create_connection(("127.0.0.1", port)), server_hostname="localhost"
    )
    return lambda: tls.recv(16384)


bound = any("read_ahead" in name for name in dir(lib))
print(f"pyOpenSSL     {measured(by_pyopenssl):.1f} reads a record, read_ahead in the bindings: {bound}")
known = any("read_ahead" in name for name in (*dir(ssl), *dir(ssl.SSLContext)))
print(f"ssl           {measured(by_ssl):.1f} reads a record, read_ahead in the module: {known}")
PYTHON
"$folder/venv/bin/python" "$folder/run.py" | tee "$folder/out"
sed -n 's/^#     \([a-zA-Z]*  *[0-9.]* reads\)/\1/p' "$0" | cmp - "$folder/out"
