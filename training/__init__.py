"""Stage 2, programs: training, and making the embedded model."""
