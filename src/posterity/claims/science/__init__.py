"""Claims of the papers on science."""
