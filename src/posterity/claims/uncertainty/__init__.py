"""Claims of the papers on uncertainty."""
