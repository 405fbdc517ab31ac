"""Claims of the papers on dynamics."""
