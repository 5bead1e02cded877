"""All that is known of OpenAI, Anthropic, Ollama and Gemini: requests, responses and errors."""
