"""All that is known of OpenAI, Anthropic and Ollama: requests, responses and errors."""
