"""Training: what the rows are, how a run is watched, saved, proven and gone on with."""
