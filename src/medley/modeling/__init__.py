"""The decoder, its attention, loss and quantization."""
