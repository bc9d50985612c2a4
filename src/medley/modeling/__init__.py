"""The decoder: architecture, attention kernels, training loss, quantization."""
