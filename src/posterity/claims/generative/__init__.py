"""Claims of the papers on generative."""
