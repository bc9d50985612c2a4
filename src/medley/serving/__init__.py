"""HTTP server: OpenAI's API with image input and output, LLaVA's worker protocol, and a web UI."""
