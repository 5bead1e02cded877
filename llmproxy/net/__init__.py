"""Sockets and time: transports, the reactor's loop, timers, coroutines.  No HTTP is known here."""
