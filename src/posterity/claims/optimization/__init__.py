"""Claims of the papers on optimization."""
