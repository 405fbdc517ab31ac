"""Claims of the papers on rl."""
