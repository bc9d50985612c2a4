"""The recipe of the embedded model; it needs no data but seeds."""
