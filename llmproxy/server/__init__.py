"""An HTTP/1.1 server that knows no provider."""
