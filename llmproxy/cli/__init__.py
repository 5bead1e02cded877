"""The ``llmproxy`` command: what an operator runs by hand."""
