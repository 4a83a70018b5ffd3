"""The proof that the two agree."""
