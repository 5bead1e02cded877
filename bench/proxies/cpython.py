"""The least that a proxy in CPython costs: epoll, recv and send.  Arguments: PORT PROVIDER-PORT.

No proxy, but a yardstick: it has a connection to the provider for each client's, and looks at
nothing that passes.
"""

from __future__ import annotations

import select
import socket
import sys

READ = 65536
epoll = select.epoll()


class End:
    """One side of a client's way to the provider."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.fd = sock.fileno()
        self.other: End
        self.waits = b""  # for room in the kernel
        ends[self.fd] = self
        epoll.register(self.fd, select.EPOLLIN)

    def read(self) -> None:
        """Forward what came; while not all of it could be sent, nothing more is read."""
        data = self.sock.recv(READ)
        if not data:
            self.close()
            return
        sent = self.other.send(data)
        if sent < len(data):
            self.other.waits = data[sent:]
            epoll.modify(self.other.fd, select.EPOLLIN | select.EPOLLOUT)
            epoll.modify(self.fd, 0)

    def send(self, data: bytes) -> int:
        """Send what the kernel takes."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0

    def go_on(self) -> None:
        """Send what waits."""
        self.waits = self.waits[self.send(self.waits) :]
        if not self.waits:
            epoll.modify(self.fd, select.EPOLLIN)
            epoll.modify(self.other.fd, select.EPOLLIN)

    def close(self) -> None:
        """End both sides."""
        for end in (self, self.other):
            ends.pop(end.fd, None)
            end.sock.close()


ends: dict[int, End] = {}


def main() -> None:
    """Serve for ever."""
    port, provider = (int(arg) for arg in sys.argv[1:])
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    listener.setblocking(False)
    accepts = listener.fileno()
    epoll.register(accepts, select.EPOLLIN)
    while True:
        for fd, event in epoll.poll(-1, 256):
            end = ends.get(fd)
            if end is not None:
                try:
                    if event == select.EPOLLIN:
                        end.read()
                    elif event & select.EPOLLOUT and end.waits:
                        end.go_on()
                    else:
                        end.close()
                except OSError:
                    end.close()
            elif fd == accepts:
                client = End(listener.accept()[0])
                client.other = End(socket.create_connection(("127.0.0.1", provider)))
                client.other.other = client


main()
