"""What is kept of a request once it has ended: trace, metrics, log lines."""
