"""The page: talk to a server's models in a browser, in words and pictures (Gradio)."""
