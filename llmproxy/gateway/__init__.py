"""The story of one request."""
