"""HTTP/1.1 as bytes: grammar, framing and headers.  No socket is known here."""
