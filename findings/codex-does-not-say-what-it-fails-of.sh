#!/bin/sh
# Codex does not say that it does not trust a certificate: it says that it waits for the network.
#
# Packages: npm's @openai/codex 0.171.0; OpenSSL's command and Python of the system.
#
# Codex asks a provider of its own configuration, whose server has a certificate of an authority that
# is not among the system's.  Both of its counts of retries are 0.  It prints "Reconnecting... waiting
# for network" and goes on for minutes; neither its output nor its log at the level of warnings
# (RUST_LOG=warn) has a word of the certificate.  A host name that nobody knows looks the same.  curl
# names the certificate at once.
#
# So who sets Codex up behind a proxy that ends TLS, and forgets SSL_CERT_FILE or CODEX_CA_CERTIFICATE,
# looks for a fault of the network.  Whether the file is right can be tried with a program that speaks.
#
# Seen:
#     codex: 2 x "Reconnecting... waiting for network" in 15 s, the word "certificate" nowhere
#     curl: unable to get local issuer certificate
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund --prefix "$folder" @openai/codex@0.171.0 >npm 2>&1 || { cat npm; exit 1; }
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ca \
    -keyout ca.key -out ca.pem 2>made
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost \
    -keyout key.pem -out request.pem 2>>made
printf 'subjectAltName=DNS:localhost\n' > names
openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names \
    -out leaf.pem 2>>made
cat > run.py <<'PYTHON'
import http.server, os, re, signal, ssl, subprocess, threading

context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("leaf.pem", "key.pem")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
server.handle_error = lambda request, address: None
server.socket = context.wrap_socket(server.socket, server_side=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"https://localhost:{server.server_address[1]}/v1"

os.makedirs("home")
setting = "model_providers.own"
command = [
    *("node_modules/.bin/codex", "exec", "--skip-git-repo-check", "-m", "any"),
    *("-c", 'model_provider="own"', "-c", f'{setting}.name="own"'),
    *("-c", f'{setting}.base_url="{url}"', "-c", f'{setting}.wire_api="responses"'),
    *("-c", f"{setting}.request_max_retries=0", "-c", f"{setting}.stream_max_retries=0"),
    "Say hello",
]
names = ("SSL_CERT_FILE", "SSL_CERT_DIR", "CODEX_CA_CERTIFICATE", "CURL_CA_BUNDLE")
plain = {name: value for name, value in os.environ.items() if name not in names}
plain = {name: value for name, value in plain.items() if not name.lower().endswith("_proxy")}
with open("said", "w+b") as said:
    codex = subprocess.Popen(
        command,
        env={**plain, "CODEX_HOME": os.path.abspath("home"), "RUST_LOG": "warn"},
        stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
    )
    try:
        code = codex.wait(15)
    except subprocess.TimeoutExpired:
        code = None
        os.killpg(codex.pid, signal.SIGKILL)
        codex.wait()
    said.seek(0)
    text = said.read().decode(errors="replace")
waits = len(re.findall("Reconnecting... waiting for network", text))
# What it says of its plugins, which it fetches from elsewhere, is another matter.
own = "\n".join(line for line in text.splitlines() if "plugin" not in line)
words = len(re.findall("(?i)certificate|UnknownIssuer|tls", own))
print(f'codex: {waits} x "Reconnecting... waiting for network" in 15 s, {words} words of a certificate')
curl = subprocess.run(["curl", "-sS", url], env=plain, capture_output=True, text=True)
print("curl:", curl.stderr.strip().splitlines()[0])
assert code is None and waits >= 1 and words == 0, text
assert "issuer certificate" in curl.stderr or "self-signed" in curl.stderr, curl.stderr
PYTHON
python3 run.py
