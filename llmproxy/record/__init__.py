"""What is remembered of a request."""
