"""An HTTP/1.1 server that knows no provider: from listening sockets to requests and handlers."""
