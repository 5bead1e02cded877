"""Bytes on their way back."""
