"""Web UI of the server: conversations with its models in a browser (Gradio)."""
