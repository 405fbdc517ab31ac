"""Claims of the papers on transfer."""
