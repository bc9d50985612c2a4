"""Checkpoint layouts, weight names, adapters."""
