"""Training programs: train, the demo of the pipeline, the embedded model's recipe."""
