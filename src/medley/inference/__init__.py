"""Inference: a model with its tokenizers, loading, single prompts, batches and conversations."""
