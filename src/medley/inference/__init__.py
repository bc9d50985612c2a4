"""A model with its tokenizers: loading, generation, batch runs."""
