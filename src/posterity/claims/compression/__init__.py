"""Claims of the papers on compression."""
