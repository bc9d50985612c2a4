"""Checkpoint layouts, weight names, adapters, and conversion between layouts."""
