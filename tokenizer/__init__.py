"""Stage 1, programs: pictures to codes, documents to token sequences."""
