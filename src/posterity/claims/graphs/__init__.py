"""Claims of the papers on graphs."""
