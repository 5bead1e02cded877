#!/bin/sh
# Parsers refuse a blank before a chunk extension, which RFC 9112 allows.
#
# Packages: h11 0.16.0, httptools 0.7.1 (llhttp), urllib3 2.6.3 over Python's http.client.
#
# RFC 9112, section 7.1.1: chunk-ext = *( BWS ";" BWS chunk-ext-name ... ).  "Bad" white space must
# be taken by whoever reads (RFC 9110, section 5.6.3).  The same body without the blank is taken by
# all three.  So a proxy that hands chunks on as they came can turn a response that it could read
# into one that its client cannot; it has to write the size line anew, or refuse.
#
# Seen:
#     h11        "5;a=b": hello   "5 ;a=b": RemoteProtocolError
#     httptools  "5;a=b": hello   "5 ;a=b": HttpParserError
#     urllib3    "5;a=b": hello   "5 ;a=b": hello
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check h11==0.16.0 httptools==0.7.1 urllib3==2.6.3 \
    2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import socket, threading

import h11, httptools, urllib3

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


def by_h11(data):
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    body = b""
    while type(event := client.next_event()) is not h11.EndOfMessage:
        if type(event) is h11.Data:
            body += event.data
    return body


def by_httptools(data):
    class Reader:
        body = b""

        def on_body(self, piece):
            self.body += piece

    reader = Reader()
    httptools.HttpResponseParser(reader).feed_data(data)
    return reader.body


def by_urllib3(data):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            peer, _ = listener.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(data)

        server = threading.Thread(target=serve)
        server.start()
        try:
            url = "http://127.0.0.1:%d/" % listener.getsockname()[1]
            return urllib3.PoolManager(retries=False).request("GET", url).data
        finally:
            server.join()


for name, read in ("h11", by_h11), ("httptools", by_httptools), ("urllib3", by_urllib3):
    said = []
    for size in "5;a=b", "5 ;a=b":
        try:
            result = read(HEAD + size.encode() + b"\r\nhello\r\n0\r\n\r\n").decode()
        except Exception as error:
            result = type(error).__name__
        said.append(f'"{size}": {result}')
    print(f"{name:10} " + "   ".join(said))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" | tee "$folder/out"
sed -n 's/^#     \([a-z0-9]*  *"5\)/\1/p' "$0" | cmp - "$folder/out"
