"""Bytes on their way back from the provider to the client, and the tap that reads a copy."""
