"""Prompts and HTML report of `training/pipeline.sh`, the demo of the pipeline."""
