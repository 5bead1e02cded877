#!/bin/sh
# txredisapi says "Lost connection" where the server's certificate was refused, and not why.
#
# Packages: txredisapi 1.6.0, twisted 26.10.0 with its TLS, trustme 1.2.1.
#
# A server shows a certificate for another name.  The client is given optionsForClientTLS(), which checks
# that; the library's own ssl_context_factory=True checks nothing.  A connection without a password counts as
# ready before the handshake, so the first command is under way when the certificate is refused.  It fails
# with ConnectionError("Lost connection").  Twisted tells the protocol's connectionLost() the reason, a
# VerificationError; the library drops it, and whenDisconnected() fires with the protocol alone.
#
# So an operator cannot tell a wrong name from a server that was restarted.  llmproxy's own connectionLost()
# keeps the reason.
#
# Seen:
#     the command: ConnectionError: Lost connection
#     connectionLost() was told: VerificationError
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    txredisapi==1.6.0 'twisted[tls]==26.10.0' trustme==1.2.1 2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import trustme
from twisted.internet import reactor, ssl
from twisted.internet.endpoints import TCP4ClientEndpoint, wrapClientTLS
from twisted.internet.protocol import Factory, Protocol
from txredisapi import RedisProtocol

authority = trustme.CA()
leaf = authority.issue_cert("other.example")
pem = b"".join(one.bytes() for one in (leaf.private_key_pem, *leaf.cert_chain_pems))
server = reactor.listenSSL(
    0, Factory.forProtocol(Protocol), ssl.PrivateCertificate.loadPEM(pem).options(), interface="127.0.0.1"
)
trust = ssl.Certificate.loadPEM(authority.cert_pem.bytes())
seen = {}


class Connection(RedisProtocol):
    def connectionLost(self, why):
        seen["told"] = type(why.value).__name__
        super().connectionLost(why)


class Connections(Factory):
    isLazy = True
    noisy = False

    def buildProtocol(self, address):
        made = Connection(charset=None)
        made.factory = self
        return made


def ask(connection):
    done = connection.whenConnected().addCallback(lambda _: connection.execute_command("PING"))
    done.addErrback(lambda failure: seen.update(command=f"{type(failure.value).__name__}: {failure.value}"))
    return done


endpoint = wrapClientTLS(
    ssl.optionsForClientTLS("engine.example", trustRoot=trust),
    TCP4ClientEndpoint(reactor, "127.0.0.1", server.getHost().port),
)
endpoint.connect(Connections()).addCallback(ask)
reactor.callLater(2, reactor.stop)
reactor.run()
print("the command:", seen.get("command"))
print("connectionLost() was told:", seen.get("told"))
PYTHON
"$folder/venv/bin/python" "$folder/run.py" > "$folder/seen"
cat "$folder/seen"
cat > "$folder/wanted" <<'WANTED'
the command: ConnectionError: Lost connection
connectionLost() was told: VerificationError
WANTED
cmp -s "$folder/seen" "$folder/wanted" || { echo "this is not what was seen before"; exit 1; }
