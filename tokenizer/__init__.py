"""Tokenization scripts: images to image codes, documents to token sequences."""
