"""Conversion scripts: merge adapters, convert checkpoint layouts, prepare datasets."""
