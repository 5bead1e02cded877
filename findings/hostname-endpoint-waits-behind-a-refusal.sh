#!/bin/sh
# Twisted's HostnameEndpoint waits 0.3 s for the next address although the one before has refused.
#
# Packages: Twisted 26.10.0.
#
# RFC 8305, section 5: the next attempt begins when the one before has failed, or after the delay.
# HostnameEndpoint begins it after the delay alone.  So each new connection to a name whose first
# address refuses takes 0.3 s: "localhost" with ::1 first and a server on IPv4, for example.  A
# connection to the second address by itself takes a millisecond.
#
# Seen:
#     second address alone: connected in less than 0.1 s
#     first address refuses: connected after 0.3 s
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check twisted==26.10.0 \
    2>"$folder/pip" || { cat "$folder/pip"; exit 1; }
cat > "$folder/run.py" <<'PYTHON'
import sys
import time

from twisted.internet import reactor
from twisted.internet._resolver import HostResolution
from twisted.internet.address import IPv4Address
from twisted.internet.defer import ensureDeferred
from twisted.internet.endpoints import HostnameEndpoint, connectProtocol
from twisted.internet.interfaces import IHostnameResolver
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer


@implementer(IHostnameResolver)
class Resolver:
    def __init__(self, hosts):
        self.hosts = hosts

    def resolveHostName(self, receiver, name, portNumber=0, **_):
        resolution = HostResolution(name)
        receiver.resolutionBegan(resolution)
        for host in self.hosts:
            receiver.addressResolved(IPv4Address("TCP", host, portNumber))
        receiver.resolutionComplete()
        return resolution


async def seconds(port, hosts):
    reactor.installNameResolver(Resolver(hosts))
    began = time.monotonic()
    protocol = await connectProtocol(HostnameEndpoint(reactor, "name.example", port), Protocol())
    protocol.transport.abortConnection()
    return time.monotonic() - began


async def main():
    listening = reactor.listenTCP(0, Factory.forProtocol(Protocol), interface="127.0.0.2")
    port = listening.getHost().port
    alone = await seconds(port, ["127.0.0.2"])
    behind = await seconds(port, ["127.0.0.1", "127.0.0.2"])  # nobody listens on the first
    print(f"second address alone: {alone:.3f} s; behind a refusal: {behind:.3f} s")
    return alone < 0.1 and 0.28 < behind < 1.5


ended = []
ensureDeferred(main()).addBoth(lambda result: (ended.append(result), reactor.stop()))
reactor.run()
sys.exit(0 if ended == [True] else str(ended))
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
