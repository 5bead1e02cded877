#!/bin/sh
# tinyproxy without BasicAuth hands a client's Proxy-Authorization on to the origin server.
#
# Packages: Debian 12's tinyproxy-bin 1.11.1-2.1+deb12u1.
#
# A client asks for http://HOST/ in the absolute form, and shows credentials that are meant for the
# proxy.  If tinyproxy is configured to ask for credentials, it takes the field out.  Otherwise it
# forwards the field as any other, so that the origin server reads the password.  RFC 9110, 11.7.2 says
# that the field is for the next proxy that asks for credentials, which here is nobody.  Squid takes it
# out in both cases.  In a CONNECT the field goes no further than the proxy, with both programs.
#
# So a program that is given a password for a proxy that does not ask for one (an old setting, or the
# wrong port) tells it to every http:// server, unless it uses CONNECT for these, too.
#
# Seen:
#     without BasicAuth: the origin got Proxy-Authorization: Basic dGVhbTpwYXNz
#     with BasicAuth: the origin got no Proxy-Authorization
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(cd "$folder" && apt-get -qq download tinyproxy-bin=1.11.1-2.1+deb12u1 2>apt) || { cat "$folder/apt"; exit 1; }
dpkg -x "$folder"/tinyproxy-bin_*.deb "$folder/root"
cat > "$folder/run.py" <<'PYTHON'
import base64, socket, subprocess, sys, time

program, folder = sys.argv[1:]
CREDENTIALS = base64.b64encode(b"team:pass").decode()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def seen_by_origin(setting):
    """Ask through a tinyproxy with this setting; return the field as the origin server gets it."""
    port = free_port()
    settings = f"{folder}/tinyproxy.conf"
    with open(settings, "w") as file:
        file.write(f"Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nLogLevel Critical\n{setting}\n")
    proxy = subprocess.Popen([program, "-d", "-c", settings], stdout=subprocess.DEVNULL)
    try:
        with socket.create_server(("127.0.0.1", 0)) as origin:
            where = f"127.0.0.1:{origin.getsockname()[1]}"
            for _ in range(100):
                try:
                    client = socket.create_connection(("127.0.0.1", port))
                    break
                except OSError:
                    time.sleep(0.05)
            client.sendall(
                f"GET http://{where}/ HTTP/1.1\r\nHost: {where}\r\n"
                f"Proxy-Authorization: Basic {CREDENTIALS}\r\n\r\n".encode()
            )
            origin.settimeout(10)
            server, _ = origin.accept()
            head = b""
            while b"\r\n\r\n" not in head:
                head += server.recv(65536)
            server.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            server.close()
            client.close()
    finally:
        proxy.kill()
        proxy.wait()
    for line in head.decode().splitlines():
        name, _, value = line.partition(": ")
        if name.lower() == "proxy-authorization":
            return f"Proxy-Authorization: {value}"
    return "no Proxy-Authorization"


without, known = seen_by_origin(""), seen_by_origin("BasicAuth team pass")
print("without BasicAuth: the origin got", without)
print("with BasicAuth: the origin got", known)
assert without == f"Proxy-Authorization: Basic {CREDENTIALS}", "a release has changed this"
assert known == "no Proxy-Authorization", "a release has changed this"
PYTHON
python3 "$folder/run.py" "$folder/root/usr/bin/tinyproxy" "$folder"
