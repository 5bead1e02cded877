"""``llmproxy top``: what one daemon does, in a terminal."""
