"""A server: OpenAI's protocol with pictures in and out, and LLaVA's."""
