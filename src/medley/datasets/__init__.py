"""Dataset formats to documents and back."""
