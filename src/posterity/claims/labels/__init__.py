"""Claims of the papers on labels."""
