"""HTTP/1.1 as bytes: no socket is known here."""
