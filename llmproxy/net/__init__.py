"""Sockets and time: no HTTP is known here."""
