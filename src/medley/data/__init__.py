"""Vocabulary, documents, token sequences and their stores."""
