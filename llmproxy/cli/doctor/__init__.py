"""``llmproxy doctor``: what holds a stream back, and what cuts it."""
