"""Claims of the papers on clustering."""
