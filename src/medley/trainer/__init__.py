"""Training: options, datasets of packed sequences, trainer, callbacks, checkpoints, resuming."""
