"""Stage 3, programs: merging, converting between layouts and formats."""
